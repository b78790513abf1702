"""Counts what torch does: operations by torch's own counter, time by hooks on the modules."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from deepspeed import _native
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.sharded_parameter import true_shape


class FlopsProfiler:
    """Profiles forward passes of `model` between `start_profile()` and `stop_profile()`.

    Counted are matrix products, convolutions and attention; a multiply-accumulate (MAC) is two operations.
    ds_engine            an engine, for the times of backward and step in the report.
    recompute_fwd_factor the cost of recomputation over that of forward.
    """

    def __init__(self, model: torch.nn.Module, ds_engine: Any = None, recompute_fwd_factor: float = 0.0):
        self.model = model
        self.ds_engine = ds_engine
        self.recompute_fwd_factor = recompute_fwd_factor
        self.started = False
        self._counter: Any = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._profile = _native.ModuleProfile([])

    def start_profile(self, ignore_list: Sequence[type] | None = None) -> None:
        """Begins to count; modules of the classes in `ignore_list` are not reported."""
        ignored = tuple(ignore_list or ())
        modules = [(name, module) for name, module in self.model.named_modules() if not isinstance(module, ignored)]
        self._profile = _native.ModuleProfile(
            [
                (name, type(module).__name__, sum(true_shape(p).numel() for p in module.parameters()))
                for name, module in modules
            ]
        )
        for index, (_, module) in enumerate(modules):
            self._handles += _timed(module, index, self._profile)
        self._counter = FlopCounterMode(display=False)
        self._counter.__enter__()
        self.started = True

    def stop_profile(self) -> None:
        """Ends counting."""
        if not self.started:
            return
        self._counter.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        root = type(self.model).__name__
        for name, counts in self._counter.get_flop_counts().items():
            path = "" if name == "Global" else name.removeprefix(f"{root}.") if name != root else None
            if path is not None:
                self._profile.add_operations(path, sum(counts.values()))
        self.started = False

    def reset_profile(self) -> None:
        """Forgets what was counted."""
        self._profile.reset()

    def end_profile(self) -> None:
        """Ends counting and forgets."""
        self.stop_profile()
        self.reset_profile()

    def get_total_flops(self, as_string: bool = False) -> Any:
        """Floating-point operations of forward."""
        return self._profile.total("flops", as_string)

    def get_total_macs(self, as_string: bool = False) -> Any:
        """Multiply-accumulates of forward."""
        return self._profile.total("macs", as_string)

    def get_total_params(self, as_string: bool = False) -> Any:
        """Parameters of the model."""
        return self._profile.total("params", as_string)

    def get_total_duration(self, as_string: bool = False) -> Any:
        """Seconds of forward."""
        return self._profile.total("seconds", as_string)

    def print_model_profile(
        self,
        profile_step: int = 1,
        module_depth: int = -1,
        top_modules: int = 1,
        detailed: bool = True,
        output_file: str | None = None,
    ) -> None:
        """Prints the report, or writes it to `output_file`: totals, the `top_modules` at each depth, and with `detailed`
        every module down to `module_depth` (-1 is all)."""
        report = self._profile.report(profile_step, module_depth, top_modules, detailed, self.recompute_fwd_factor)
        if output_file is None:
            print(report, flush=True)
            return
        with open(output_file, "w", encoding="utf-8") as file:
            file.write(report + "\n")


def get_model_profile(
    model: torch.nn.Module,
    input_shape: Sequence[int] | None = None,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    print_profile: bool = True,
    detailed: bool = True,
    module_depth: int = -1,
    top_modules: int = 1,
    warm_up: int = 1,
    as_string: bool = True,
    output_file: str | None = None,
    ignore_modules: Sequence[type] | None = None,
    mode: str = "forward",
) -> tuple[Any, Any, Any]:
    """(operations, multiply-accumulates, parameters) of one forward pass of `model`, as text unless `as_string` is False.

    input_shape  shape of the one input, batch first; or `args` and `kwargs` are the inputs.
    warm_up      passes before the one that is counted.
    mode         "forward", or "generate" for `model.generate(...)`.
    """
    assert mode in ("forward", "generate"), f"mode={mode!r}, expected 'forward' or 'generate'"
    inputs, named = list(args), dict(kwargs or {})
    if input_shape is not None:
        assert not inputs and not named, "input_shape and args or kwargs: give one of them"
        like = next(model.parameters(), torch.empty(0))
        inputs = [torch.ones(tuple(input_shape), dtype=like.dtype, device=like.device)]
    assert inputs or named, "no input: give input_shape, args or kwargs"
    function: Any = model if mode == "forward" else model.generate
    was_training = model.training
    model.eval()
    profiler = FlopsProfiler(model)
    try:
        with torch.no_grad():
            for _ in range(warm_up):
                function(*inputs, **named)
            profiler.start_profile(ignore_modules)
            try:
                function(*inputs, **named)
            finally:
                profiler.stop_profile()
    finally:
        model.train(was_training)
    if print_profile:
        profiler.print_model_profile(warm_up, module_depth, top_modules, detailed, output_file)
    return (
        profiler.get_total_flops(as_string),
        profiler.get_total_macs(as_string),
        profiler.get_total_params(as_string),
    )


def _timed(
    module: torch.nn.Module, index: int, profile: _native.ModuleProfile
) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that tell `profile` how long the module's forward takes."""
    began: list[float] = []

    def before(*_arguments: Any) -> None:
        get_accelerator().synchronize()
        began.append(time.perf_counter())

    def after(*_arguments: Any) -> None:
        get_accelerator().synchronize()
        profile.add_time(index, time.perf_counter() - began.pop())

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
