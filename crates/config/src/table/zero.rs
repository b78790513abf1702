//! ZeRO: how far the model state is sharded, and how.

use super::{
    Asks::{NonDefault, Present},
    Kind, Setting, built, no_effect, not_built, removed,
};

const QUANTIZED: &str = "ZeRO++ (hierarchical partitioning and quantized communication)";
const SUPER_OFFLOAD: &str = "SuperOffload";

/// A setting of stage 3 that chooses how weights are gathered, where nothing is left to choose.
const fn gathering(path: &'static str, kind: Kind, default: &'static str, meaning: &'static str) -> Setting {
    no_effect(
        path,
        kind,
        default,
        meaning,
        "units are gathered in one way, and not at all where the ranks of a host share one copy of the weights",
    )
}

/// Why nothing tunes how weights are read from a disk.
const MAPPED: &str =
    "weights on a disk are mapped: the system reads them when they are used and keeps what fits";

const DEVICES: Kind = Kind::Choice(&["none", "cpu", "nvme"]);

pub(super) const SETTINGS: &[Setting] = &[
    built(
        "zero_optimization",
        Kind::BoolOrBlock,
        "{}",
        "Sharding of the model state over the data-parallel ranks (ZeRO). true means stage 1, false stage 0.",
    ),
    built(
        "zero_optimization.stage",
        Kind::Int { min: 0, max: 3 },
        "0",
        "What is sharded: 0 nothing, 1 the optimizer state, 2 the gradients too, 3 the parameters too.",
    ),
    built(
        "zero_optimization.reduce_bucket_size",
        Kind::POSITIVE,
        "500000000",
        "Gradients are reduced in pieces of about this many elements, or fewer where the engine prefers it.",
    ),
    no_effect(
        "zero_optimization.allgather_bucket_size",
        Kind::COUNT,
        "500000000",
        "The greatest number of elements that are gathered in one piece.",
        "updated parameters are gathered unit by unit",
    ),
    no_effect(
        "zero_optimization.contiguous_gradients",
        Kind::Bool,
        "true",
        "Copy gradients into one contiguous buffer as they appear.",
        "gradients always lie in one contiguous span per unit",
    ),
    no_effect(
        "zero_optimization.reduce_scatter",
        Kind::Bool,
        "true",
        "Average gradients by reduce-scatter instead of all-reduce.",
        "both give the same numbers here; the stage decides",
    ),
    no_effect(
        "zero_optimization.allgather_partitions",
        Kind::Bool,
        "true",
        "Share updated parameters by all-gather instead of broadcasts.",
        "the transport decides how updated parameters are shared",
    ),
    no_effect(
        "zero_optimization.use_multi_rank_bucket_allreduce",
        Kind::Bool,
        "true",
        "Reduce the gradients of several owners in one bucket.",
        "shards are cut so that every bucket belongs to all ranks",
    ),
    no_effect(
        "zero_optimization.overlap_comm",
        Kind::Bool,
        "null",
        "Reduce gradients while backward still runs.",
        "the engine decides when to reduce, and the numbers are the same",
    ),
    no_effect(
        "zero_optimization.round_robin_gradients",
        Kind::Bool,
        "false",
        "Deal gradients to ranks in turn, to balance copies to the host.",
        "every unit is cut into equal shards",
    ),
    no_effect(
        "zero_optimization.parameter_alignment",
        Kind::Bool,
        "false",
        "Align every parameter in its flat buffer.",
        "the layout aligns shards itself",
    ),
    built(
        "zero_optimization.ignore_unused_parameters",
        Kind::Bool,
        "true",
        "Allow parameters that get no gradient; they contribute zeros on all ranks. false makes them an error.",
    ),
    no_effect(
        "zero_optimization.compute_grad_norm",
        Kind::Bool,
        "true",
        "Compute the gradient norm even where it is not needed.",
        "the norm falls out of a pass that is made anyway",
    ),
    no_effect(
        "zero_optimization.elastic_checkpoint",
        Kind::Bool,
        "false",
        "Save checkpoints that another number of ranks can load.",
        "every checkpoint is of that kind",
    ),
    not_built(
        "zero_optimization.load_from_fp32_weights",
        Kind::Bool,
        "true",
        "Restore master weights from the fp32 copies of a checkpoint; false takes the model's weights.",
        "master weights restored from 16-bit weights",
        NonDefault,
    ),
    built(
        "zero_optimization.sub_group_size",
        Kind::POSITIVE,
        "1000000000",
        "The most elements of a rank's part of a unit that stream between nvme and the update in one piece (stage 3).",
    ),
    no_effect(
        "zero_optimization.pipeline_loading_checkpoint",
        Kind::Bool,
        "false",
        "Load a checkpoint piece by piece.",
        "each rank reads only the slices it needs",
    ),
    built(
        "zero_optimization.offload_param",
        Kind::Block,
        "null",
        "Where the shards of the parameters lie while they are not used (stage 3).",
    ),
    built(
        "zero_optimization.offload_param.device",
        DEVICES,
        "\"none\"",
        "The device they lie on: cpu is the host's memory, nvme files in a folder.",
    ),
    built(
        "zero_optimization.offload_param.nvme_path",
        Kind::Text,
        "null",
        "The folder for nvme, on a local disk of every host.",
    ),
    no_effect(
        "zero_optimization.offload_param.buffer_count", Kind::COUNT, "5", "Buffers for nvme.",
        MAPPED,
    ),
    no_effect(
        "zero_optimization.offload_param.buffer_size",
        Kind::COUNT,
        "100000000",
        "Elements in a buffer for nvme.",
        MAPPED,
    ),
    built(
        "zero_optimization.offload_param.max_in_cpu",
        Kind::COUNT,
        "1000000000",
        "Elements of a rank's part that stay in the host's memory with nvme; the others leave it after each use.",
    ),
    built(
        "zero_optimization.offload_param.pin_memory",
        Kind::Bool,
        "true",
        "Pin the host's memory that weights wait in, where there is an accelerator; a CPU has no use for it.",
    ),
    built(
        "zero_optimization.offload_optimizer",
        Kind::Block,
        "null",
        "Where the optimizer's state lies, fp32 master weights included (stages 1 to 3).",
    ),
    built(
        "zero_optimization.offload_optimizer.device",
        DEVICES,
        "\"none\"",
        "The device it lies on: cpu is the host's memory, nvme files in a folder.",
    ),
    built(
        "zero_optimization.offload_optimizer.nvme_path",
        Kind::Text,
        "null",
        "The folder for nvme, on a local disk of every host.",
    ),
    built(
        "zero_optimization.offload_optimizer.buffer_count",
        Kind::COUNT,
        "4",
        "Units whose state is in memory at one time with nvme, where reading or writing is pipelined.",
    ),
    built(
        "zero_optimization.offload_optimizer.pin_memory",
        Kind::Bool,
        "true",
        "Pin the host's memory that gradients come to, where there is an accelerator; a CPU has no use for it.",
    ),
    built(
        "zero_optimization.offload_optimizer.pipeline_read",
        Kind::Bool,
        "false",
        "Read the next piece from nvme during the update.",
    ),
    built(
        "zero_optimization.offload_optimizer.pipeline_write",
        Kind::Bool,
        "false",
        "Write the last piece to nvme during the update.",
    ),
    no_effect(
        "zero_optimization.offload_optimizer.fast_init",
        Kind::Bool,
        "false",
        "Initialise faster when offloading to nvme.",
        "the state starts as a file of zeros, which takes no time",
    ),
    built(
        "zero_optimization.offload_optimizer.ratio",
        Kind::Float { min: 0.0, max: 1.0, above: false },
        "1.0",
        "The part of the state that is offloaded.",
    ),
    not_built(
        "zero_optimization.offload_optimizer.super_offload",
        Kind::Bool,
        "false",
        "Overlap the update on the host with backward.",
        SUPER_OFFLOAD,
        NonDefault,
    ),
    no_effect(
        "zero_optimization.offload_optimizer.cpuadam_cores_perc",
        Kind::Float { min: 0.0, max: 1.0, above: true },
        "0.8",
        "The part of the host's cores that updates.",
        "it belongs to super_offload, and every rank updates on the threads it is given",
    ),
    built(
        "zero_optimization.cpu_offload",
        Kind::Bool,
        "false",
        "Old form of offload_optimizer with device cpu.",
    ),
    built(
        "zero_optimization.cpu_offload_param",
        Kind::Bool,
        "false",
        "Old form of offload_param with device cpu.",
    ),
    built(
        "zero_optimization.cpu_offload_use_pin_memory",
        Kind::Bool,
        "null",
        "Old form of pin_memory, for the two old forms.",
    ),
    built(
        "zero_optimization.stage3_prefetch_bucket_size",
        Kind::COUNT,
        "50000000",
        "Elements to gather ahead of their use, together with what is needed; where ranks share no memory.",
    )
    .alias(&["prefetch_bucket_size"]),
    built(
        "zero_optimization.stage3_param_persistence_threshold",
        Kind::COUNT,
        "100000",
        "Units whose parameters are all at most this large stay whole from their first use to the next update, where ranks \
         share no memory.",
    )
    .alias(&["param_persistence_threshold"]),
    built(
        "zero_optimization.stage3_model_persistence_threshold",
        Kind::COUNT,
        "9223372036854775807",
        "The greatest number of elements that stay whole for being small.",
    )
    .alias(&["model_persistence_threshold"]),
    built(
        "zero_optimization.stage3_max_live_parameters",
        Kind::COUNT,
        "1000000000",
        "The greatest number of elements that are whole at one time, but for what is needed; where ranks share no memory.",
    )
    .alias(&["max_live_parameters"]),
    built(
        "zero_optimization.stage3_max_reuse_distance",
        Kind::COUNT,
        "1000000000",
        "Weights used again after at most this many elements of others stay whole, where ranks share no memory.",
    )
    .alias(&["max_reuse_distance"]),
    built(
        "zero_optimization.stage3_module_granularity_threshold",
        Kind::COUNT,
        "0",
        "Modules of at most this many elements gather everything below them at once, where ranks share no memory.",
    )
    .alias(&["module_granularity_threshold"]),
    gathering(
        "zero_optimization.stage3_use_all_reduce_for_fetch_params",
        Kind::Bool,
        "false",
        "Gather parameters by all-reduce.",
    )
    .alias(&["use_all_reduce_for_fetch_params"]),
    gathering(
        "zero_optimization.stage3_allgather_sequential",
        Kind::Bool,
        "false",
        "Gather parameters one after the other.",
    )
    .alias(&["allgather_sequential"]),
    built(
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        Kind::Bool,
        "false",
        "Gather whole 16-bit weights when the model is saved; below stage 3 they are whole anyway.",
    )
    .alias(&["gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save"]),
    gathering(
        "zero_optimization.memory_efficient_linear",
        Kind::Bool,
        "true",
        "Save parameters, not gathered weights, for the backward of linear layers.",
    ),
    gathering(
        "zero_optimization.override_module_apply",
        Kind::Bool,
        "true",
        "Gather parameters during Module.apply.",
    ),
    gathering(
        "zero_optimization.log_trace_cache_warnings",
        Kind::Bool,
        "false",
        "Warn when the recorded order of use changes.",
    ),
    gathering(
        "zero_optimization.enable_sanity_checks",
        Kind::Bool,
        "false",
        "Check the bookkeeping of gathered parameters.",
    ),
    built(
        "zero_optimization.leaf_module",
        Kind::Open,
        "null",
        "Modules whose parameters are gathered together (classes, names, name_suffixes), where ranks share no memory.",
    ),
    not_built(
        "zero_optimization.zero_hpz_partition_size",
        Kind::POSITIVE,
        "1",
        "Ranks in a secondary partition of the parameters.",
        QUANTIZED,
        NonDefault,
    ),
    not_built(
        "zero_optimization.zero_quantized_weights",
        Kind::Bool,
        "false",
        "Gather quantized weights.",
        QUANTIZED,
        NonDefault,
    ),
    not_built(
        "zero_optimization.zero_quantized_nontrainable_weights",
        Kind::Bool,
        "false",
        "Gather quantized frozen weights.",
        QUANTIZED,
        NonDefault,
    ),
    not_built(
        "zero_optimization.zero_quantized_gradients",
        Kind::Bool,
        "false",
        "Reduce quantized gradients.",
        QUANTIZED,
        NonDefault,
    ),
    not_built(
        "zero_optimization.zenflow",
        Kind::Open,
        "null",
        "Selective updates overlapped with training.",
        "ZenFlow",
        NonDefault,
    ),
    not_built(
        "zero_optimization.save_muon_momentum_buffer_in_memory",
        Kind::Bool,
        "false",
        "Keep the momentum of Muon out of the swapper.",
        "the Muon optimizer",
        NonDefault,
    ),
    removed("zero_optimization.legacy_stage1", NonDefault, "stage 1 has one implementation"),
    removed("zero_optimization.mics_shard_size", Present, "shard over all ranks"),
    removed("zero_optimization.mics_hierarchical_params_gather", Present, "shard over all ranks"),
    removed("zero_optimization.zeropp_loco_param", Present, "gradients are reduced without error feedback"),
];
