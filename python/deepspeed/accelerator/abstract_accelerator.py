"""What an accelerator offers. Sizes are in bytes, devices are numbered on this host."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from deepspeed._features import not_built


class DeepSpeedAccelerator(ABC):
    """One kind of device. The defaults are those of a device without queues: nothing to wait for."""

    _name: str
    _communication_backend_name: str
    _compile_backend: str = "inductor"

    def device_name(self, device_index: int | None = None) -> str:
        """ "cuda", or "cuda:1" for a given index."""
        return self._name if device_index is None else f"{self._name}:{device_index}"

    def communication_backend_name(self) -> str:
        """torch.distributed's backend for this device."""
        return self._communication_backend_name

    @abstractmethod
    def is_available(self) -> bool: ...

    @abstractmethod
    def device_count(self) -> int: ...

    @abstractmethod
    def current_device(self) -> int: ...

    @abstractmethod
    def current_device_name(self) -> str: ...

    @abstractmethod
    def set_device(self, device_index: int) -> None: ...

    @abstractmethod
    def device(self, device_index: int | None = None) -> contextlib.AbstractContextManager[Any]: ...

    @abstractmethod
    def visible_devices_envs(self) -> list[str]:
        """Environment variables that choose which devices a process sees."""

    def set_visible_devices_envs(self, current_env: dict[str, str], local_accelerator_ids: list[int]) -> None:
        """Writes these device numbers to the variables of `visible_devices_envs`."""
        for name in self.visible_devices_envs():
            current_env[name] = ",".join(map(str, local_accelerator_ids))

    def export_envs(self) -> list[str]:
        """Prefixes of environment variables that a launcher hands on."""
        return []

    def is_synchronized_device(self) -> bool:
        """Whether an operation has finished when its call returns."""
        return True

    def use_host_timers(self) -> bool:
        return self.is_synchronized_device()

    def resolves_data_dependency(self) -> bool:
        return self.is_synchronized_device()

    def handles_memory_backpressure(self) -> bool:
        return self.is_synchronized_device()

    def synchronize(self, device_index: int | None = None) -> None:
        """Waits for the work queued on a device."""

    def current_stream(self, device_index: int | None = None) -> Any:
        return None

    def default_stream(self, device_index: int | None = None) -> Any:
        return None

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext(stream)

    @property
    def Stream(self) -> Any:
        return None

    @property
    def Event(self) -> Any:
        return None

    def random(self) -> Any:
        return torch.random

    def manual_seed(self, seed: int) -> Any:
        return torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> Any:
        return torch.manual_seed(seed)

    def initial_seed(self) -> int:
        return torch.initial_seed()

    def get_rng_state(self, device_index: int | None = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, new_state: torch.Tensor, device_index: int | None = None) -> None:
        torch.set_rng_state(new_state)

    def default_generator(self, device_index: int) -> torch.Generator:
        return torch.default_generator

    def empty_cache(self) -> None:
        """Gives memory that torch keeps for reuse back to the device."""

    @abstractmethod
    def memory_allocated(self, device_index: int | None = None) -> int: ...

    @abstractmethod
    def max_memory_allocated(self, device_index: int | None = None) -> int: ...

    @abstractmethod
    def total_memory(self, device_index: int | None = None) -> int: ...

    @abstractmethod
    def available_memory(self, device_index: int | None = None) -> int: ...

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None: ...

    def reset_max_memory_allocated(self, device_index: int | None = None) -> None:
        self.reset_peak_memory_stats(device_index)

    def memory_reserved(self, device_index: int | None = None) -> int:
        return self.memory_allocated(device_index)

    def max_memory_reserved(self, device_index: int | None = None) -> int:
        return self.max_memory_allocated(device_index)

    def memory_cached(self, device_index: int | None = None) -> int:
        return self.memory_reserved(device_index)

    def max_memory_cached(self, device_index: int | None = None) -> int:
        return self.max_memory_reserved(device_index)

    def reset_max_memory_cached(self, device_index: int | None = None) -> None:
        self.reset_peak_memory_stats(device_index)

    def memory_stats(self, device_index: int | None = None) -> dict[str, Any]:
        return {}

    def is_bf16_supported(self) -> bool:
        return True

    def is_fp16_supported(self) -> bool:
        return True

    def supported_dtypes(self) -> list[torch.dtype]:
        kinds = [torch.float32]
        if self.is_fp16_supported():
            kinds.append(torch.float16)
        if self.is_bf16_supported():
            kinds.append(torch.bfloat16)
        return kinds

    def is_triton_supported(self) -> bool:
        return False

    def amp(self) -> Any:
        """The torch module with this device's autocast."""
        return torch.amp

    def range_push(self, msg: str) -> None: ...

    def range_pop(self) -> None: ...

    def lazy_call(self, callback: Callable[[], Any]) -> Any:
        return callback()

    def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.is_pinned()

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self._name

    def get_compile_backend(self) -> str:
        return self._compile_backend

    def set_compile_backend(self, backend: str) -> None:
        self._compile_backend = backend

    def create_op_builder(self, class_name: str) -> Any:
        not_built(f"get_accelerator().create_op_builder({class_name!r})", "compilation of operators on this machine")

    def get_op_builder(self, class_name: str) -> Any:
        not_built(f"get_accelerator().get_op_builder({class_name!r})", "compilation of operators on this machine")

    @property
    def BFloat16Tensor(self) -> Callable[..., torch.Tensor]:
        return self._tensor_of(torch.bfloat16)

    @property
    def ByteTensor(self) -> Callable[..., torch.Tensor]:
        return self._tensor_of(torch.uint8)

    @property
    def DoubleTensor(self) -> Callable[..., torch.Tensor]:
        return self._tensor_of(torch.float64)

    @property
    def FloatTensor(self) -> Callable[..., torch.Tensor]:
        return self._tensor_of(torch.float32)

    @property
    def HalfTensor(self) -> Callable[..., torch.Tensor]:
        return self._tensor_of(torch.float16)

    @property
    def IntTensor(self) -> Callable[..., torch.Tensor]:
        return self._tensor_of(torch.int32)

    @property
    def LongTensor(self) -> Callable[..., torch.Tensor]:
        return self._tensor_of(torch.int64)

    def _tensor_of(self, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
        def create(values: Any) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self.current_device_name())

        return create
