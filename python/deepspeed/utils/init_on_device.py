"""`OnDevice`: building a model in a dtype and on a device, "meta" for one without memory."""

from __future__ import annotations

import contextlib
from types import TracebackType

import torch


class OnDevice(contextlib.AbstractContextManager["OnDevice"]):
    """Context in which tensors are made on `device`, and floating-point ones in `dtype` unless they name their own.

    dtype    the dtype of weights; None leaves it as it is.
    device   "meta" makes tensors that have shapes and no memory; any other device makes them there.
    enabled  False does nothing.
    """

    def __init__(
        self, dtype: torch.dtype | None = None, device: str | torch.device | int = "meta", enabled: bool = True
    ):
        self.dtype, self.device, self.enabled = dtype, torch.device(device), enabled
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> OnDevice:
        if self.enabled:
            self._stack.enter_context(self.device)
            if self.dtype is not None:
                self._stack.callback(torch.set_default_dtype, torch.get_default_dtype())
                torch.set_default_dtype(self.dtype)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()
