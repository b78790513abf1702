"""`offload_states` and `reload_states`: moving the engine's state off the accelerator for a while."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from deepspeed.utils.logging import logger

if TYPE_CHECKING:
    from deepspeed._native import Engine


class StateMethods:
    """Mixed into the engine."""

    _native: Engine

    def offload_states(
        self,
        include: Iterable[OffloadStateTypeEnum | str] | None = None,
        device: OffloadDeviceEnum | str = OffloadDeviceEnum.cpu,
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Moves state (all kinds, or those in `include`) from the accelerator to the host until `reload_states`.

        Without an accelerator all state is in the host's memory, or on the disk the config names: nothing moves. With
        `lp_params` moved, the module cannot run until then. The host's memory is pinned unless `pin_memory` is false.
        Memory of the accelerator is free when this returns: copies are waited for, whatever `non_blocking` says.
        """
        kinds = [OffloadStateTypeEnum(kind).value for kind in (include or OffloadStateTypeEnum)]
        if OffloadDeviceEnum(device) is not OffloadDeviceEnum.cpu:
            raise ValueError(
                f"offload_states(device={OffloadDeviceEnum(device).value!r}): state moves to 'cpu'; "
                "zero_optimization.offload_optimizer keeps it on NVMe all the time"
            )
        if not self._native.offload_states(kinds, pin_memory):
            logger.info("offload_states(%s): the state of a model on the CPU is in the host's memory", ", ".join(kinds))

    def reload_states(self, non_blocking: bool = False) -> None:
        """Takes `offload_states` back."""
        self._native.reload_states()

    def empty_partition_cache(self) -> None:
        """Gives memory that the engine has freed back to the system."""
        self._native.give_back_freed()
