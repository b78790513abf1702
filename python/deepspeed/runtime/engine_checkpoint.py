"""`save_checkpoint` and `load_checkpoint`: what Python adds to the native checkpoint.

The native part saves and restores weights, masters, optimizer state, counters and the loss scale. Python hands it
buffers, the parameter groups, the schedule's state, random states and the client's state.
"""

from __future__ import annotations

import atexit
import io
import json
import logging
import os
import random
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from deepspeed import _native
from deepspeed.checkpoint.export_script import place_scripts
from deepspeed.runtime.devices import on_host
from deepspeed.runtime.model_file import save_weights
from deepspeed.runtime.zero.gathered_weights import whole_state_dict
from deepspeed.utils.logging import log_dist, logger, warning_once

if TYPE_CHECKING:
    from deepspeed._native import Engine, LoadedCheckpoint
    from deepspeed.runtime.client_optimizer import ClientOptimizer
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.parameters import TrainedParameters
    from deepspeed.runtime.zero.gather_hooks import GatherHooks


class CheckpointMethods:
    """Mixed into the engine."""

    module: torch.nn.Module
    device: torch.device
    _native: Engine
    _group: Any
    _trained: TrainedParameters
    _gather_hooks: GatherHooks | None
    _frozen_shards: list[tuple[str, torch.nn.Parameter]]
    _config: DeepSpeedConfig
    basic_optimizer: Any
    optimizer: Any
    lr_scheduler: Any
    global_rank: int
    loaded_checkpoint_dp_world_size: int | None

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: Any = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        client_sd: dict[str, Any] | None = None,
    ) -> bool:
        """Saves the whole state of the run as `save_dir/tag`, whole or not at all. Every rank calls it.

        tag           any printable value, by default `global_step{N}`; where ranks differ, rank 0's.
        client_state  what `load_checkpoint` gives back (`client_sd` is another name for it); each rank its own.
        save_latest   whether `load_checkpoint` without a tag takes this one from now on.

        With `"checkpoint": {"async": true}` it returns as soon as everything has been copied; the next call of the engine
        on which all ranks meet raises what goes wrong afterwards. `wait_for_checkpoint` waits for the end.
        """
        if not os.fspath(save_dir):
            raise ValueError("save_dir is empty: give the folder in which checkpoints are kept")
        if client_state is not None and client_sd is not None:
            raise ValueError("client_sd is another name for client_state: give one of them")
        tag = str(tag) if tag is not None else f"global_step{self.global_steps}"
        state = client_state if client_state is not None else client_sd
        slices, python_state = self._state_to_save()
        saved = _native.save_checkpoint(
            self._native,
            save_dir=os.fspath(save_dir),
            tag=tag,
            fail_on_different_tags=self._config.checkpoint_tag_validation_fail,
            save_latest=save_latest,
            param_groups=self._group_options(),
            slices=slices,
            frozen=on_host(self._frozen()),
            exclude_frozen=exclude_frozen_parameters,
            tied=self._tied_names(),
            buffers=self._saved_buffers(),
            blobs=[("client_state", _pack(dict(state or {}))), ("python", _pack(python_state))],
            face=json.dumps({"module": type(self.module).__name__}),
        )
        if saved.tags_differ and self._config.checkpoint_tag_validation_enabled and self.global_rank == 0:
            warning_once(
                "ranks save under different tags: rank 0's are used. Set checkpoint.tag_validation to FAIL to make this "
                "an error, or to IGNORE to silence it"
            )
        if self.global_rank == 0 and self._native.stage() > 0:
            try:
                place_scripts(save_dir)
            except OSError as error:
                logger.warning("zero_to_fp32.py could not be put beside the checkpoint: %s", error)
        if saved.behind:
            log_dist(f"checkpoint {saved.folder} is being written behind training", ranks=[0])
            return True
        logger.info("saved checkpoint %s", saved.folder)
        if saved.removed:
            logger.info("removed older checkpoints: %s", ", ".join(saved.removed))
        for problem in saved.problems:
            logger.warning("an older checkpoint could not be removed: %s", problem)
        return True

    def wait_for_checkpoint(self) -> None:
        """Waits until a checkpoint that is being written behind training is complete; raises what went wrong with it,
        on all ranks. Every rank calls it."""
        done = self._native.finish_save()
        if done is not None:
            log_dist(done, ranks=[0])

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
        trust_client_state: bool = False,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Continues from `load_dir/tag`, or from the latest checkpoint, ours or the original's. Every rank calls it.

        Returns the checkpoint's folder and the client state; (None, None) and a warning where there is no checkpoint
        and no tag was asked for. Without a tag it is the one that `latest` names; where that one is missing or damaged,
        the newest complete one, with a warning. A tag that is missing or damaged is an error. Code in a checkpoint is
        executed only with `trust_client_state=True`, which a client state of classes of one's own needs.

        custom_load_fn  called as `custom_load_fn(src=state_dict, dst=module)` on every rank instead of loading the
                        weights; `src` is the whole state dict. Masters and optimizer state come from the checkpoint by
                        name; where the function made other weights, the masters follow these.
        """
        frozen = on_host(self._frozen())
        loaded = _native.open_checkpoint(
            self._native,
            load_dir=os.fspath(load_dir),
            tag=None if tag is None else str(tag),
            universal=self._config.load_universal_checkpoint,
        )
        if loaded is None:
            if self.global_rank == 0:
                logger.warning(
                    "there is no checkpoint in %s: training goes on from where it is; pass a tag to make that an error",
                    load_dir,
                )
            return None, None
        chosen = self._native.chosen()
        if chosen is not None and self.global_rank == 0:
            why, unexpected = chosen
            told = f"going on from checkpoint {loaded.folder}: {why}"
            if unexpected:
                logger.warning(told)
            else:
                print(told, flush=True)
        python_state, client_state = self._unpack_states(loaded, trust_client_state)
        _native.load_checkpoint(
            self._native,
            loaded,
            weights=custom_load_fn is None,
            module_only=load_module_only,
            optimizer_states=load_optimizer_states,
            strict=load_module_strict,
            param_groups=self._group_options(),
            frozen=frozen,
        )
        client = self._client()
        if custom_load_fn is None:
            for name, tensor in self._frozen().items():
                if tensor.device.type != "cpu":
                    tensor.copy_(frozen[name])
            self._weights_changed()
            self._load_buffers(loaded, load_module_strict)
            if client is not None:
                client.refresh_masters()
        self.loaded_checkpoint_dp_world_size = loaded.world_size
        if not load_module_only:
            self._load_python_state(loaded, python_state, load_optimizer_states, load_lr_scheduler_states)
        if custom_load_fn is not None:
            self._load_by_function(loaded, custom_load_fn)
            if client is not None:
                client.refresh_masters()
        return os.fspath(loaded.folder), client_state

    def save_16bit_model(
        self,
        save_dir: str | os.PathLike[str],
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Writes the weights as the model computes with them, without optimizer state: as safetensors where the name ends
        in `.safetensors`, else as torch.save does. True if there is a file.

        Rank 0 writes. Every rank calls it where weights have to be gathered: at stage 3 without shared memory, unit by
        unit, and only if `stage3_gather_16bit_weights_on_model_save` allows it; False otherwise.
        """
        if not self._may_gather("save_16bit_model"):
            return False
        first = self.global_rank == 0
        problem: Exception | None = None
        if first or self._gather_hooks is not None:
            without = set(self._trained.frozen) if exclude_frozen_parameters else set()
            try:
                save_weights(self.module, os.fspath(save_dir), save_filename, without, first)
            except (OSError, ValueError) as error:
                problem = error
        if self._gather_hooks is not None:
            told = self._group.all_gather_bytes("save_16bit_model", str(problem or "").encode())[0]
            if told and problem is None:
                raise _native.CheckpointError(f"rank 0: {told.decode()}")
        if problem is not None:
            raise problem
        return True

    save_fp16_model = save_16bit_model

    def _consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any] | None:
        """The module's state dict on rank 0, None elsewhere and where the config does not allow to gather it. Every rank
        calls it where weights are gathered."""
        if not self._may_gather("a whole state dict"):
            return None
        first = self.global_rank == 0
        if self._gather_hooks is not None:
            state = whole_state_dict(self.module, keep=first)
        else:
            state = self.module.state_dict() if first else {}
        if not first:
            return None
        frozen = self._trained.frozen if exclude_frozen_parameters else {}
        return {name: value for name, value in state.items() if name not in frozen}

    _zero3_consolidated_16bit_state_dict = _consolidated_16bit_state_dict

    def _may_gather(self, what: str) -> bool:
        """Whether whole weights can be had: always where ranks share them."""
        allowed = self._gather_hooks is None or self._config.zero_config.gather_16bit_weights_on_model_save
        if not allowed:
            warning_once(
                f"{what} needs weights that are sharded over the ranks, and nothing was gathered: set "
                '"stage3_gather_16bit_weights_on_model_save": true under zero_optimization, or export a checkpoint with '
                "`deepspeed checkpoint export`"
            )
        return allowed

    def _unpack_states(self, loaded: LoadedCheckpoint, trust: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """What Python and the client saved on this rank. What cannot be unpacked on one rank is an error on all."""
        states: list[dict[str, Any]] = []
        mine: Exception | None = None
        for what in ("python", "client_state"):
            try:
                trusted = loaded.trusted_file() if trust and what == "client_state" else None
                if trusted is not None:
                    states.append(_execute(*trusted))
                else:
                    states.append(_unpack(loaded.blob(what), what, loaded.folder, trust))
            except (ValueError, _native.CheckpointError) as error:
                mine = mine or error
        problems = self._group.all_gather_bytes("client state of the checkpoint", str(mine or "").encode())
        for rank, theirs in enumerate(problems):
            if theirs:
                raise ValueError(f"rank {rank}: {theirs.decode()}") from mine
        return states[0], states[1]

    # -- what is saved ---------------------------------------------------------------------------------------------

    def _frozen(self) -> dict[str, torch.Tensor]:
        """Those that the engine does not shard itself."""
        sharded = {name for name, _ in self._frozen_shards}
        return {name: p.data for name, p in self._trained.frozen.items() if name not in sharded}

    def _saved_buffers(self) -> dict[str, torch.Tensor]:
        saved = self.module.state_dict(keep_vars=True)
        return {name: b.cpu().contiguous() for name, b in self.module.named_buffers() if name in saved}

    def _load_by_function(self, loaded: LoadedCheckpoint, function: Callable[..., Any]) -> None:
        state = {name: _buffer(loaded, name, shape, dtype) for name, shape, dtype in loaded.buffers()}
        for name, shape, dtype in loaded.weights():
            state[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            loaded.read(name, "weight", 0, state[name])
        state.update({other: state[name] for other, name in loaded.tied() if name in state})
        with self._writing_weights():
            function(src=state, dst=self.module)
        if self._gather_hooks is None:
            self._native.reload_masters(range(len(self._trained.tensors)))

    def _tied_names(self) -> list[tuple[str, str]]:
        """(other name, name) of parameters and saved buffers that the module has under several names."""
        parameters = self.module.named_parameters(remove_duplicate=False)
        saved = self.module.state_dict(keep_vars=True)
        buffers = [it for it in self.module.named_buffers(remove_duplicate=False) if it[0] in saved]
        first: dict[int, str] = {}
        names = [(name, first.setdefault(id(tensor), name)) for name, tensor in [*parameters, *buffers]]
        return [(other, name) for other, name in names if other != name]

    def _load_buffers(self, loaded: LoadedCheckpoint, strict: bool) -> None:
        found = {name: (shape, dtype) for name, shape, dtype in loaded.buffers()}
        for name, buffer in self._saved_buffers().items():
            if name not in found:
                if strict:
                    raise KeyError(
                        f"checkpoint {loaded.folder} has no buffer `{name}`; load_module_strict=False skips it"
                    )
                continue
            shape, dtype = found[name]
            if list(buffer.shape) != shape:
                raise ValueError(
                    f"buffer `{name}` has shape {shape} in checkpoint {loaded.folder} and {list(buffer.shape)} in the model"
                )
            self.module.get_buffer(name).copy_(_buffer(loaded, name, shape, dtype))

    def _state_to_save(self) -> tuple[list[tuple[int, str, int, torch.Tensor]], dict[str, Any]]:
        """Slices of a client optimizer's state, and what Python saves beside the client's own state."""
        state: dict[str, Any] = {"random": _random_states(self.device), "param_groups": self._group_options()}
        if self.lr_scheduler is not None and hasattr(self.lr_scheduler, "state_dict"):
            state["lr_scheduler"] = self.lr_scheduler.state_dict()
        client = self._client()
        if client is None:
            return [], state
        slices, scalars = client.state_to_save()
        kinds = sorted({kind for _, kind, _, _ in slices})
        # A rank knows the scalars of the parameters of which it has a part; whoever loads may have others.
        everybody = self._group.all_gather_bytes("save_checkpoint: client optimizer", _pack([scalars, kinds]))
        state["client_scalars"] = scalars = {}
        known: set[str] = set()
        for theirs in everybody:
            more, kinds = torch.load(io.BytesIO(theirs), weights_only=False)
            scalars.update(more)
            known.update(kinds)
        state["client_kinds"] = sorted(known)
        return slices, state

    def _client(self) -> ClientOptimizer | None:
        return getattr(self.optimizer, "client", None)

    def _load_python_state(
        self, loaded: LoadedCheckpoint, state: dict[str, Any], optimizer: bool, scheduler: bool
    ) -> None:
        if optimizer and self.basic_optimizer is not None:
            client = self._client()
            if "withheld" in state:
                raise ValueError(f"checkpoint {loaded.folder}: {state['withheld']}")
            if client is not None and "client_kinds" in state:
                client.load_state(loaded, state["client_scalars"], state["client_kinds"])
            self._load_groups(loaded, state["param_groups"], foreign="random" not in state)
        if scheduler and self.lr_scheduler is not None and "lr_scheduler" in state:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if "random" in state:  # the original saves none
            _set_random_states(state["random"], self.device)

    def _load_groups(self, loaded: LoadedCheckpoint, saved: list[dict[str, Any]], foreign: bool) -> None:
        groups = self.basic_optimizer.param_groups
        if foreign and not saved:
            return  # elastic checkpoints of the original have none
        if len(saved) != len(groups):
            raise ValueError(
                f"the optimizer has {len(groups)} parameter groups and checkpoint {loaded.folder} has {len(saved)}; "
                "load_optimizer_states=False loads the weights alone"
            )
        for group, options in zip(groups, saved, strict=True):
            # Another optimizer's options mean nothing to this one.
            group.update({key: value for key, value in options.items() if not foreign or key in group})

    if TYPE_CHECKING:  # the engine's, which this is mixed into

        @property
        def global_steps(self) -> int: ...

        def _group_options(self) -> list[dict[str, Any]]: ...

        def _weights_changed(self) -> None: ...

        def _writing_weights(self) -> AbstractContextManager[None]: ...


@atexit.register
def _wait_for_saves() -> None:
    """A program that ends while a checkpoint is being written waits for it, and fails if it fails."""
    failed = _native.wait_for_saves()
    for folder, problem in failed:
        logger.error("checkpoint %s was not completed: %s", folder, problem)
    if failed:
        # An exit handler cannot change the exit code in another way.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _random_states(device: torch.device) -> dict[str, Any]:
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, position, has_gauss, gauss = numpy.random.get_state()
        states["numpy"] = (kind, torch.from_numpy(keys.astype("int64")), position, has_gauss, gauss)
    return states


def _set_random_states(states: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    if device.type != "cpu" and "device" in states:
        torch.get_device_module(device).set_rng_state(states["device"], device)
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in states:
        kind, keys, position, has_gauss, gauss = states["numpy"]
        numpy.random.set_state((kind, keys.numpy().astype("uint32"), position, has_gauss, gauss))


def _buffer(loaded: LoadedCheckpoint, name: str, shape: list[int], dtype: str) -> torch.Tensor:
    data = bytearray(loaded.buffer(name))
    return (
        torch.frombuffer(data, dtype=getattr(torch, dtype)).view(shape)
        if data
        else torch.empty(shape, dtype=getattr(torch, dtype))
    )


def _execute(path: Any, keys: list[str]) -> dict[str, Any]:
    """The client's entries of a torch file, by executing what is in it."""
    try:
        values = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be rebuilt: {type(error).__name__}: {error}") from error
    return {key: values[key] for key in keys}


def _pack(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data: bytes | None, what: str, folder: Any, trust: bool) -> dict[str, Any]:
    if data is None:
        return {}
    try:
        return torch.load(io.BytesIO(data), weights_only=not trust)
    except Exception as error:
        if trust:
            raise ValueError(
                f"the {what} of checkpoint {folder} cannot be rebuilt: {type(error).__name__}: {error}"
            ) from error
        refused = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"the {what} of checkpoint {folder} holds objects ({refused[1] if refused else type(error).__name__}) that "
            "only their own code can rebuild, and code from a checkpoint is not executed unless you say so: call "
            "load_checkpoint(..., trust_client_state=True) if you trust whoever wrote it, or "
            "torch.serialization.add_safe_globals([...]) first"
        ) from error
