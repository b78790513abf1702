"""A judged config."""

from pathlib import Path
from typing import Any, final

import torch

@final
class Config:
    """A judged config."""

    @staticmethod
    def load(spec: str, strict: str | None = None, template: bool = False) -> Config:
        """From the path of a file or base64 of JSON. `strict` is the value of DS_CONFIG_STRICT; in a `template` "auto" may be
        left where somebody else fills it in later."""

    @staticmethod
    def from_dict_text(text: str, strict: str | None = None, template: bool = False) -> Config:
        """From a dict that Python's json module has written."""

    @property
    def warnings(self) -> list[str]:
        """What is worth saying about it, one text each."""

    def raw(self) -> dict[str, Any]:
        """The config as it was written, defaults not filled in."""

    def resolve_batch(self, world: int, world_origin: str) -> tuple[int, int, int]:
        """(train_batch_size, micro batch size, accumulation steps) for `world` data-parallel ranks; `world_origin` says
        where that number came from."""

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a floating-point tensor of `dtype` is trained: that of the precision in bf16 and fp16, its
        own in fp32."""

    def optimizer_class(self) -> tuple[str, dict[str, Any]] | None:
        """What `optimizer` names as ("module:class", arguments); None where the config has no optimizer."""

    def scheduler_class(self) -> tuple[str, dict[str, Any]] | None:
        """What `scheduler` names as ("module:class", arguments); None where the config has no scheduler."""

    def block(self, name: str) -> dict[str, Any]:
        """A block of plain settings, as "tensorboard": every key with its value or its default."""

    def weights_folder(self) -> Path | None:
        """The folder in which weights lie while they are not used; None unless offload_param.device is nvme."""

    def differences(self) -> str:
        """The settings that differ from their defaults, a line each."""

    def attributes(self) -> dict[str, Any]:
        """The settings under the attribute names of DeepSpeedConfig."""
