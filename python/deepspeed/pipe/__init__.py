"""Pipeline parallelism."""

from deepspeed._features import unbuilt_class

_FEATURE = "pipeline parallelism"

PipelineModule = unbuilt_class("deepspeed.pipe.PipelineModule", _FEATURE)
PipelineEngine = unbuilt_class("deepspeed.PipelineEngine", _FEATURE)
LayerSpec = unbuilt_class("deepspeed.pipe.LayerSpec", _FEATURE)
TiedLayerSpec = unbuilt_class("deepspeed.pipe.TiedLayerSpec", _FEATURE)
ProcessTopology = unbuilt_class("deepspeed.pipe.ProcessTopology", _FEATURE)
PipeDataParallelTopology = unbuilt_class("deepspeed.pipe.PipeDataParallelTopology", _FEATURE)
PipeModelDataParallelTopology = unbuilt_class("deepspeed.pipe.PipeModelDataParallelTopology", _FEATURE)
