"""`DeepSpeedEngine`: a module, and the native engine that trains it.

What happens in a step is decided and done in Rust (`_native.Engine`); this class hands it tensors at the three
moments that matter (end of backward, step, checkpoint) and keeps the face that scripts and libraries know.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from deepspeed import _native
from deepspeed import comm as dist
from deepspeed._features import not_built
from deepspeed.runtime import process_group
from deepspeed.runtime.agreement import check_agreement
from deepspeed.runtime.carried_state import describe_state
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.devices import choose_device, moves_memory_of, take_to, torch_device
from deepspeed.runtime.engine_checkpoint import CheckpointMethods
from deepspeed.runtime.engine_config import ConfigMethods
from deepspeed.runtime.engine_states import StateMethods
from deepspeed.runtime.observation import Observation
from deepspeed.runtime.optimizer_setup import build_optimizer, build_scheduler
from deepspeed.runtime.parameters import TrainedParameters, cast_buffers, cast_floating, grad_tensors
from deepspeed.runtime.unit_hooks import UnitHooks
from deepspeed.runtime.zero.gather_hooks import GatherHooks
from deepspeed.runtime.zero.gathered_weights import gather_weights, let_go, unshare_drafts, whole_state_dict
from deepspeed.runtime.zero.sharded_parameter import is_sharded
from deepspeed.runtime.zero.shared_weights import give_back_after_use, share_weights
from deepspeed.runtime.zero_optimizer import DESTROYED, DeepSpeedZeroOptimizer
from deepspeed.utils.logging import log_dist, logger
from deepspeed.utils.tensor_fragment import TrainedBy
from deepspeed.utils.timer import SynchronizedWallClockTimer
from deepspeed.utils.z3_leaf_module import mark_leaves

# Attributes of the engine itself, which never fall through to the module.
_OWN = frozenset({"module", "_native", "optimizer", "lr_scheduler"})


class DeepSpeedEngine(CheckpointMethods, ConfigMethods, StateMethods, torch.nn.Module):
    """What `deepspeed.initialize` returns first.

    Call it like the module, then `backward(loss)` and `step()`; the loop is the same whatever the ZeRO stage,
    the precision and the number of ranks. Attributes it does not have are looked up on the module.
    """

    def __init__(
        self,
        args: Any,
        model: torch.nn.Module,
        optimizer: Any = None,
        model_parameters: Any = None,
        training_data: Any = None,
        lr_scheduler: Any = None,
        mpu: Any = None,
        dist_init_required: bool | None = None,
        collate_fn: Callable[..., Any] | None = None,
        config: Any = None,
        config_class: DeepSpeedConfig | None = None,
    ):
        super().__init__()
        self.module = model
        self.mpu = mpu
        self.collate_fn = collate_fn
        self.client_optimizer = optimizer
        self.client_lr_scheduler = lr_scheduler
        self._config = config_class or DeepSpeedConfig(config, mpu)
        self.config: dict[str, Any] = self._config._param_dict
        self.global_rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.dp_world_size = self.seq_dp_world_size = self.world_size
        self.mp_world_size = 1
        self.loaded_checkpoint_dp_world_size: int | None = None
        self.training_dataloader = None
        self.losses: torch.Tensor | None = None
        self._compiled = False
        self._collect_queued = False
        self._in_backward = False
        self._loss_scaled = False
        self._without_sync = False
        self._gather_hooks: GatherHooks | None = None
        self._page_hooks: list[torch.utils.hooks.RemovableHandle] = []

        dist.configure(self._config)
        group = process_group.recorded(process_group.native_group())
        self._group: _native.Group | None = group  # until destroy()
        native_config = self._config.native
        self._trained = TrainedParameters(model)
        self.device = choose_device(model)
        self._broadcast_model(group)
        if self._config.zero_optimization_stage < 3:
            unshare_drafts(model)
        if self.device.type != "cpu":
            take_to(model, self.device, self._config.zero_optimization_stage)
        self.basic_optimizer = build_optimizer(optimizer, model_parameters, model, native_config)
        self._trained.select(self.basic_optimizer)
        check_agreement(group, self._facts_of_all_ranks())
        self._native = _native.Engine(
            config=native_config,
            names=self._trained.names,
            tensors=self._trained.tensors,
            dtypes=[native_config.compute_dtype(p.dtype) for p in self._trained.tensors],
            groups=self._trained.groups,
            frozen=self._shardable_frozen(),
            optimizer=getattr(self.basic_optimizer, "ds_kind", None),
            client=_class_name(self.basic_optimizer),
            param_groups=self._group_options(),
            group=group,
            threads=torch.get_num_threads(),
            ranks_per_host=process_group.ranks_per_host(),
            device=torch_device(self.device),
            direct=moves_memory_of(self.device),
        )
        # The optimizer is wrapped before the cast: the masters of a client's optimizer keep the original precision.
        self.optimizer = self._wrap_optimizer()
        frozen = dict(self._frozen_shards)
        if self._native.gathers_weights():
            mark_leaves(model, self.config)
            self._gather_hooks = gather_weights(self._native, group, model, self._trained, frozen)
        elif self._native.keeps_weights():
            share_weights(self._native, group, self._trained, frozen, native_config.compute_dtype)
            self._page_hooks = give_back_after_use(self._native, model, [*self._trained.tensors, *frozen.values()])
        else:
            self._native.adopt_parameters()
        cast_floating(model, native_config.compute_dtype)
        for index, parameter in enumerate(self._trained.tensors):
            parameter._ds_trained_by = TrainedBy(self, self._native, index)  # type: ignore[attr-defined]
        on_gradient = self._gather_hooks.native.gradient if self._gather_hooks is not None else None
        self._unit_hooks = UnitHooks(self._native, self._trained.tensors, self._loss_facts, on_gradient)
        cast_buffers(model, self._config.buffer_dtype)
        self.lr_scheduler = build_scheduler(lr_scheduler, self.basic_optimizer, native_config)
        if training_data is not None:
            self.training_dataloader = self.deepspeed_io(training_data)
        self._observation = Observation(self._config, model, self.global_rank)
        self.monitor, self.flops_profiler = self._observation.monitor, self._observation.flops_profiler
        self.tput_timer, self.timers = self._observation.throughput, SynchronizedWallClockTimer()
        self._native.give_back_freed()
        log_dist(f"{self._native.summary()}\n{self._native.memory_block()}", ranks=[0])
        self._memory_told = False
        warning = self._native.memory_warning()
        if warning is not None and self.global_rank == 0:
            logger.warning(warning)
        if self._config.dump_state:
            log_dist(native_config.differences(), ranks=[0])

    # -- construction ----------------------------------------------------------------------------------------------

    def _broadcast_model(self, group: _native.Group) -> None:
        # What zero.Init has made is one copy already.
        own = {name: p for name, p in self.module.named_parameters() if not is_sharded(p)}
        tensors = own | dict(self.module.named_buffers())
        # Ranks with different models are told apart by what is sent: its name says enough to see how they differ.
        named = {f"{name} {list(tensor.shape)} {tensor.dtype}": tensor.data for name, tensor in tensors.items()}
        group.broadcast(named, 0)

    def _shardable_frozen(self) -> list[tuple[str, torch.Tensor, torch.dtype]]:
        """What stage 3 shards beside the trained parameters."""
        self._frozen_shards = []
        if self._config.zero_optimization_stage < 3:
            return []
        dtype_for = self._config.native.compute_dtype
        sharded = {torch.float32, torch.bfloat16, torch.float16}
        self._frozen_shards = [(name, p) for name, p in self._trained.frozen.items() if p.dtype in sharded]
        return [(name, p.contiguous(), dtype_for(p.dtype)) for name, p in self._frozen_shards]

    def _loss_facts(self) -> tuple[bool, bool]:
        """Whether the loss of the backward pass that is running was scaled, and divided by the accumulation steps."""
        return (True, True) if self._in_backward else (self._loss_scaled, False)

    def _facts_of_all_ranks(self) -> dict[str, Any]:
        judged = self._config
        trained = zip(self._trained.names, self._trained.tensors, self._trained.groups, strict=True)
        return {
            "the trainable parameters": [f"{name} {list(p.shape)} in group {group}" for name, p, group in trained],
            "the optimizer": _class_name(self.basic_optimizer),
            "the optimizer's state": describe_state(self.basic_optimizer, self._trained),
            "the ZeRO stage": judged.zero_optimization_stage,
            "fp16": judged.fp16_enabled,
            "bf16": judged.bfloat16_enabled,
            "train_batch_size": judged.train_batch_size,
            "gradient_accumulation_steps": judged.gradient_accumulation_steps,
            "gradient_clipping": judged.gradient_clipping,
        }

    def _wrap_optimizer(self) -> DeepSpeedZeroOptimizer | None:
        if self.basic_optimizer is None:
            return None
        dtype_for = self._config.native.compute_dtype
        return DeepSpeedZeroOptimizer(self.basic_optimizer, self._native, self._trained, dtype_for, self)

    def _group_options(self) -> list[dict[str, Any]]:
        groups = self.basic_optimizer.param_groups if self.basic_optimizer is not None else []
        return [{key: value for key, value in group.items() if key != "params"} for group in groups]

    def deepspeed_io(
        self,
        dataset: Any,
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Callable[..., Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> Any:
        """A loader of this rank's share of `dataset` in micro-batches of `batch_size` samples (the config's by
        default). `route` is "train", "eval" or "predict"; only "train" shuffles."""
        from deepspeed.runtime.dataloader import DeepSpeedDataLoader

        if route not in ("train", "eval", "predict"):
            raise ValueError(f"unknown route {route!r}, expected train, eval or predict")
        if route != "train" and data_sampler is None:
            data_sampler = DistributedSampler(
                dataset, num_replicas=self.dp_world_size, rank=self.global_rank, shuffle=False
            )
        return DeepSpeedDataLoader(
            dataset,
            batch_size or self.train_micro_batch_size_per_gpu(),
            pin_memory=pin_memory and self.device.type != "cpu",
            local_rank=self.local_rank,
            collate_fn=collate_fn or self.collate_fn,
            num_local_io_workers=num_local_io_workers,
            data_sampler=data_sampler,
            data_parallel_world_size=self.dp_world_size,
            data_parallel_rank=self.global_rank,
            dataloader_drop_last=self._config.dataloader_drop_last,
        )

    # -- the loop --------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Runs the module and returns what it returns."""
        if self._collect_queued:
            # A backward pass that raised has left this behind; what comes now is another pass.
            self._collect_queued = self._loss_scaled = False
        self._native.mark("forward")
        try:
            if self._config.fp16_auto_cast:
                inputs, kwargs = cast_floating((inputs, kwargs), self._config.native.compute_dtype)
            output = self._observation.run(self.module, inputs, kwargs)
        finally:
            self._native.mark(None)
        if self.training and torch.is_grad_enabled():
            for tensor in grad_tensors(output):
                tensor.register_hook(self._on_output_gradient)
        return output

    def _on_output_gradient(self, _gradient: torch.Tensor) -> None:
        # Fires when a backward pass reaches the module's output, also when the client calls loss.backward() itself:
        # the engine then takes the gradients when that pass is over.
        if not self._in_backward and not self._collect_queued:
            self._collect_queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._after_client_backward)

    def _after_client_backward(self) -> None:
        self._collect_queued = False
        self._native.end_backward(scaled=self._loss_scaled, averaged=False)
        self._after_pass()
        self._loss_scaled = False

    def _after_pass(self) -> None:
        self._unit_hooks.settle()
        if self._gather_hooks is not None:
            self._gather_hooks.native.end_pass()

    def _weights_changed(self) -> None:
        """The engine's shards have new values."""
        if self._gather_hooks is not None:
            self._gather_hooks.native.updated()

    def backward(
        self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True, **kwargs: Any
    ) -> torch.Tensor:
        """Computes gradients of `loss` (a scalar) and reduces or accumulates them. Returns the loss divided by the
        accumulation steps, or as it is with `scale_wrt_gas=False`."""
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ValueError(f"backward() needs a scalar loss, got {shape}: take .mean() or .sum() of it")
        if not loss.requires_grad:
            raise ValueError(
                "the loss given to backward() does not depend on any trainable parameter: was it computed under "
                "torch.no_grad(), with .detach() or .item(), or from outputs of another model?"
            )
        if self._native.wants_loss():
            self._native.set_loss(loss.item())
        self._observation.saw_loss(loss)
        self._native.mark("backward")
        self._in_backward = True
        try:
            factor = self._native.loss_factor(scale_wrt_gas)
            scaled = loss if factor == 1.0 else loss.float() * factor
            scaled.backward(retain_graph=retain_graph, **kwargs)
        finally:
            self._in_backward = False
            self._native.mark(None)
        self._native.end_backward(scaled=True, averaged=True)
        self._after_pass()
        return loss.detach() / self.gradient_accumulation_steps() if scale_wrt_gas else loss.detach()

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """`loss` times the loss scale, for a client that then calls `.backward()` on the result itself."""
        factor = self._native.loss_factor(False)
        self._loss_scaled = True
        return loss if factor == 1.0 else loss.float() * factor

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Ends the micro-batch; at an accumulation boundary updates the weights and the learning rate."""
        assert not self._without_sync, "step() inside no_sync(): gradients are not reduced there; step after it"
        if self.optimizer is None:
            if self._gather_hooks is not None:
                raise RuntimeError(
                    "engine.step() without an optimizer leaves the averaged gradients on the parameters, and at ZeRO stage "
                    "3, where weights are gathered, these are empty between steps: give an optimizer, or use a stage below 3"
                )
            report = self._native.step_without_optimizer()
        else:
            self._native.collect_leftovers()
            report = self.optimizer.engine_step()
            self._weights_changed()
        if report.unused:
            logger.warning(
                "no gradient reached %d trainable parameters in the first step, on any rank: %s. They stay as they "
                "are; freeze them, or set zero_optimization.ignore_unused_parameters to false to make this an error",
                len(report.unused),
                ", ".join(report.unused[:5]) + (", ..." if len(report.unused) > 5 else ""),
            )
        if report.skipped is not None:
            log_dist(f"step {self.global_steps} skipped: {report.skipped}", ranks=[0], level=30)
        if report.checkpoint is not None:
            log_dist(report.checkpoint, ranks=[0])
        if report.applied and self.lr_scheduler is not None:
            self.lr_scheduler.step(**(lr_kwargs or {}))
        if report.boundary:
            self._observation.after_step(self._native, next(iter(self.get_lr()), 0.0))
        if report.line is not None and self.global_rank == 0:
            print(report.line, flush=True)
        if report.applied and not self._memory_told:
            # Everything the plan speaks of exists by now.
            self._memory_told = True
            if logger.isEnabledFor(logging.INFO):
                log_dist(self._native.memory_line() or "", ranks=[0])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients of the current accumulation."""
        self._native.discard_gradients()
        self.module.zero_grad(set_to_none=set_to_none)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """A stretch in which backward passes accumulate on this rank alone; below stage 2, and without step()."""
        assert self.zero_optimization_stage() < 2, (
            f"no_sync() is not possible at ZeRO stage {self.zero_optimization_stage()}: the stage reduces gradients "
            "after every backward; use gradient_accumulation_steps, or stage 0 or 1"
        )
        assert not self._without_sync, "no_sync() inside no_sync()"
        self._native.suspend(True)
        self._without_sync = True
        try:
            yield
        finally:
            self._without_sync = False
            self._native.suspend(False)

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-batch is the last before an update."""
        return self._native.is_boundary()

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """From here on the caller decides which micro-batch is the last before an update."""
        self._native.force_boundary(is_boundary)

    @contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        """A stretch with several backward passes before step(). They are added up as elsewhere: there is nothing to wait with."""
        yield

    def allreduce_gradients(self, bucket_size: int = 500_000_000) -> None:
        """Takes part in reducing what backward left; nothing to do where backward already has."""
        self._native.collect_leftovers()

    # -- facts -----------------------------------------------------------------------------------------------------

    @property
    def global_steps(self) -> int:
        """Accumulation boundaries passed, skipped updates included."""
        return self._native.counters()["global_steps"]

    @property
    def global_samples(self) -> int:
        """Samples of all ranks up to the last boundary."""
        return self._native.counters()["global_samples"]

    @property
    def micro_steps(self) -> int:
        """Calls of step()."""
        return self._native.counters()["micro_steps"]

    @property
    def skipped_steps(self) -> int:
        """Boundaries without an update because a gradient was not finite."""
        return self._native.counters()["skipped_steps"]

    def get_global_grad_norm(self) -> float | None:
        """L2 norm of all averaged gradients of the last boundary, unscaled, before clipping; inf where the update
        was skipped; None before the first."""
        return self._native.norm()

    def was_step_applied(self) -> bool:
        """Whether the last boundary updated the weights."""
        return self._native.was_applied()

    def get_lr(self) -> list[float]:
        """Learning rate of each parameter group."""
        return [group["lr"] for group in self.basic_optimizer.param_groups] if self.basic_optimizer else []

    def get_mom(self) -> list[Any]:
        """Momentum, or betas, of each parameter group."""
        if self.basic_optimizer is None:
            return []
        return [group.get("betas", group.get("momentum")) for group in self.basic_optimizer.param_groups]

    def get_type(self) -> list[str]:
        """Name of the optimizer for each parameter group."""
        return [type(self.basic_optimizer).__name__ for _ in (self.get_lr())]

    def get_wall_clock_timers(self) -> dict[str, float]:
        """With `wall_clock_breakdown`: milliseconds of a step in "fwd", "bwd_inner", "bwd_allreduce", "bwd" (these two) and "step",
        the means that the last step line told; else, and before the first line, nothing."""
        return dict(self._observation.phases)

    def set_data_post_process_func(self, post_process_func: Callable[[Any, Any], Any]) -> None:
        """What `training_dataloader` makes of a batch and its sampler before it gives the batch out."""
        if self.training_dataloader is not None:
            self.training_dataloader.post_process_func = post_process_func

    def collect_python_gc(self) -> None:
        """Collects Python's garbage now."""
        gc.collect()

    def get_data_parallel_rank(self) -> int:
        """This rank among those that share the model's state."""
        return self.global_rank

    def get_model_parallel_rank(self) -> int:
        """0: there is no model parallelism."""
        return 0

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Changes the samples per update by changing the accumulation steps."""
        self._native.set_train_batch_size(train_batch_size)

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Changes the samples per rank and micro-batch; the accumulation steps stay."""
        self._native.set_micro_batch_size(micro_batch_size)

    def get_batch_info(self) -> tuple[int, int, int]:
        """train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps."""
        return self._native.batch()

    def module_state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        """The module's state dict, in the dtype it computes in. With `keep_vars` the parameters themselves, which at stage 3
        may be whole only within `zero.GatheredParameters`."""
        if self._gather_hooks is None or keep_vars:
            return self.module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        state = whole_state_dict(self.module, prefix)
        if destination is None:
            return state
        destination.update(state)
        return destination

    def load_module_state_dict(
        self, checkpoint: dict[str, Any], strict: bool = True, custom_load_fn: Callable[..., Any] | None = None
    ) -> None:
        """Loads weights, from `checkpoint["module"]` or from `checkpoint` itself, and refreshes the fp32 masters."""
        state = checkpoint.get("module", checkpoint)
        with self._writing_weights():
            if custom_load_fn is not None:
                custom_load_fn(src=state, dst=self.module)
            else:
                self.module.load_state_dict(state, strict=strict)
        if self.optimizer is not None:
            self.optimizer.refresh_fp32_params()
        else:
            self._native.load_masters()

    @contextmanager
    def _writing_weights(self) -> Iterator[None]:
        """A stretch in which all ranks write the same weights: at stage 3 they write to one copy."""
        parameters: Iterator[Any] = self.module.parameters()
        homes: set[Any] = {p.ds_home for p in parameters if is_sharded(p)}
        for home in homes:
            home.group.barrier("before writing weights")
            home.begin_read([])
            home.begin_write([])
        try:
            yield
        finally:
            for home in homes:
                home.end_write([], None)
                home.end_read([])

    def compile(
        self,
        backend: Any = "inductor",
        compile_kwargs: dict[str, Any] | None = None,
        schedule: Any = None,
        compiled_autograd_enabled: bool = False,
    ) -> None:
        """Compiles the module in place with torch.compile; at stage 3 where weights are gathered, module by module: what
        runs between two gatherings."""
        if schedule is not None:
            not_built("engine.compile(schedule=...)", "DeepCompile")
        if compiled_autograd_enabled:
            not_built("engine.compile(compiled_autograd_enabled=True)", "compiled autograd")
        options = {"backend": backend, **(compile_kwargs or {})}
        if self._gather_hooks is not None:
            self._gather_hooks.compile(options)
        else:
            self.module.compile(**options)
        self._compiled = True

    @property
    def is_compiled(self) -> bool:
        """Whether compile() was called."""
        return self._compiled

    def train(self, mode: bool = True) -> DeepSpeedEngine:
        """Puts the module in training mode, or out of it."""
        self.training = mode
        self.module.train(mode)
        return self

    def destroy(self) -> None:
        """Frees the engine's memory and its shared memory; the engine is of no use afterwards, the module is, but for
        weights that are gathered from the ranks: copy what is needed of them within `zero.GatheredParameters` first.

        Waits for a checkpoint that is being written behind training, and raises its error if it has one."""
        try:
            if self._native is not DESTROYED:
                self._native.finish_save_alone()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        if self.optimizer is not None:
            self.optimizer.destroy()
        self._unit_hooks.remove()
        for handle in self._page_hooks:
            handle.remove()
        if self._gather_hooks is not None:
            self._gather_hooks.remove()
            let_go(self.module.parameters())
            self._gather_hooks = None
        self._native = DESTROYED
        self._group = None

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        if name not in _OWN and "module" in modules:
            try:
                return getattr(modules["module"], name)
            except AttributeError:
                pass
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")


def _class_name(optimizer: Any) -> str | None:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}" if optimizer is not None else None
