"""The engine of one rank."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import torch

from deepspeed._native._config import Config
from deepspeed._native._group import Group
from deepspeed._native._shared_weights import SharedWeights

@final
class StepReport:
    """What a call of `step` did."""

    @property
    def boundary(self) -> bool:
        """Whether this micro-batch was the last before an update."""

    @property
    def applied(self) -> bool:
        """Whether the weights were updated."""

    @property
    def skipped(self) -> str | None:
        """Why a boundary made no update; None where it did."""

    @property
    def unused(self) -> list[str]:
        """At the first boundary: parameters that no gradient reached on any rank."""

    @property
    def line(self) -> str | None:
        """The step line, where one is due."""

    @property
    def checkpoint(self) -> str | None:
        """What became of a checkpoint that is being written behind training, when there is news."""

@final
class Engine:
    """The engine of one rank, and the torch parameters it trains.

    `param_groups` are the optimizer's, with or without "params": the hyperparameters of the step.
    """

    def __new__(
        cls,
        *,
        config: Config,
        names: Sequence[str],
        tensors: Sequence[torch.Tensor],
        dtypes: Sequence[torch.dtype],
        groups: Sequence[int],
        frozen: Sequence[tuple[str, torch.Tensor, torch.dtype]],
        optimizer: str | None,
        client: str | None,
        param_groups: Sequence[Mapping[str, Any]],
        group: Group,
        threads: int,
        ranks_per_host: int,
        device: torch.device | None = None,
        direct: bool = False,
    ) -> Engine:
        """An engine for `tensors` (parameters as they are before they are cast to `dtypes`), named `names`, in the
        optimizer's parameter groups `groups`. `optimizer` is the kind of an optimizer of ours, `client` the class of one
        that is not. `frozen` are the parameters that are not trained, with the dtype to keep them in, where the stage
        shards them. With `device` parameters and the engine's memory are there; `direct` says that torch.distributed
        moves its memory itself."""

    def adopt_parameters(self) -> None:
        """On a device, below stage 3: makes the parameters views of the flat weights."""

    def client_tensors(self) -> list[tuple[int, int, int, torch.Tensor, torch.Tensor]] | None:
        """On a device that has the state: for a client's optimizer on shards, per fragment of a parameter, its index,
        first element, number of elements, fp32 gradients and masters. None elsewhere."""

    def offload_states(self, kinds: Sequence[str], pin: bool) -> bool:
        """Moves state of these kinds off the device, to memory that is pinned if `pin`, until `reload_states`. False where there
        is no device."""

    def reload_states(self) -> None:
        """Takes `offload_states` back."""

    def own_tensors(self) -> list[torch.Tensor] | None:
        """On a device, at stage 3: this rank's part of each parameter's weights. None elsewhere."""

    def mark(self, phase: Literal["forward", "backward"] | None) -> None:
        """A phase of the step begins, or ends (None)."""

    def loss_factor(self, average: bool) -> float:
        """The factor for the loss before backward: the loss scale, divided by the accumulation steps if `average`."""

    def wants_loss(self) -> bool:
        """Whether the loss of this micro-batch will be shown."""

    def set_loss(self, loss: float) -> None:
        """The loss to show."""

    def end_backward(self, scaled: bool, averaged: bool) -> None:
        """Takes the gradients off the parameters. `scaled` and `averaged` say whether the loss was multiplied by the
        loss scale and divided by the accumulation steps."""

    def units(self) -> list[list[int]]:
        """By unit, the indices of its parameters."""

    def unit_complete(self, unit: int, scaled: bool, averaged: bool) -> int | None:
        """Called during backward when a gradient of `unit` has appeared: reduces the unit, now or when its turn comes, if
        the gradients that are expected are all there; else the index of a parameter that lacks one."""

    def keeps_weights(self) -> bool:
        """Whether parameters are not this rank's own: stage 3."""

    def masters_in_place(self) -> bool:
        """Whether fp32 parameters are the masters themselves, so that there is nothing else to write."""

    def gathers_weights(self) -> bool:
        """Whether torch's parameters are gathered from shards: stage 3 where ranks share no memory."""

    def shared_weights(self) -> tuple[SharedWeights, list[int | None], list[int | None]] | None:
        """At stage 3 on one host: what keeps the shared weights alive, and the addresses of all parameters, trained and
        frozen, None for those without elements."""

    def units_given_back(self) -> list[tuple[int, int]]:
        """The units of weights in a file that do not stay in memory between uses, each with its last parameter; frozen
        parameters are numbered after the trained ones."""

    def give_back_unit(self, unit: int) -> None:
        """Gives the memory of such a unit back to the system until it is used again."""

    def reload_masters(self, indices: Sequence[int]) -> None:
        """Makes the weights of these parameters, as they are now, the fp32 masters."""

    def collect_leftovers(self) -> None:
        """Takes gradients that no `end_backward` has seen."""

    def step(self, param_groups: Sequence[Mapping[str, Any]]) -> StepReport:
        """One step of an optimizer of ours with the options in `param_groups`."""

    def step_without_optimizer(self) -> StepReport:
        """Ends a micro-batch of an engine without optimizer."""

    def prepare(self) -> bool:
        """The first half of a step of a client's optimizer: true if it is to update."""

    def gather_gradients(self, outputs: Sequence[torch.Tensor]) -> None:
        """The whole averaged gradients, unscaled and clipped, into `outputs` (fp32, one per parameter)."""

    def scale_gradients(self) -> None:
        """Unscales and clips the gradients of this rank's shards where they lie."""

    def publish_client(self) -> None:
        """After the client's optimizer has updated the shards' masters: everybody's weights follow."""

    def finish(self, param_groups: Sequence[Mapping[str, Any]]) -> StepReport:
        """The second half of a step of a client's optimizer."""

    def client_sees_whole(self) -> bool:
        """Whether a client's optimizer works on whole parameters."""

    def client_shards(self) -> list[tuple[int, int, int, int, int | None]]:
        """For a client's optimizer on shards: per fragment of a parameter, (index of the parameter, first element in
        it, number of elements, address of its fp32 gradients, address of its fp32 masters or None where the
        parameter's own memory is the master)."""

    def load_masters(self, masters: Sequence[torch.Tensor] | None = None) -> None:
        """Makes the model's weights, as they are now, the fp32 masters; or `masters`, one tensor per parameter."""

    def discard_gradients(self) -> None:
        """Forgets the gradients of the current accumulation."""

    def is_boundary(self) -> bool:
        """Whether the current micro-batch is the last before an update."""

    def force_boundary(self, boundary: bool | None) -> None:
        """The caller decides about boundaries from here on; None gives that back."""

    def suspend(self, suspended: bool) -> None:
        """Enters or leaves a stretch without communication."""

    def counters(self) -> dict[str, int]:
        """micro_steps, global_steps, global_samples, skipped_steps, optimizer_steps."""

    def norm(self) -> float | None:
        """The last boundary's global gradient norm."""

    def was_applied(self) -> bool:
        """Whether the last boundary updated the weights."""

    def loss_scale(self) -> float:
        """By what the loss is multiplied."""

    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale adapts."""

    def override_loss_scale(self, loss_scale: float) -> None:
        """Fixes the loss scale."""

    def batch(self) -> tuple[int, int, int]:
        """(train_batch_size, micro batch size, accumulation steps)."""

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Changes the samples per update; the accumulation steps follow."""

    def set_micro_batch_size(self, micro_batch_size: int) -> None:
        """Changes the samples per rank and micro-batch; the samples per update follow."""

    def state_json(self) -> str:
        """Counters and loss scale, as JSON."""

    def load_state_json(self, state: str) -> None:
        """Takes back what `state_json` gave."""

    def summary(self) -> str:
        """What the engine is, in one line."""

    def memory_block(self) -> str:
        """What lies where: the memory plan, and the disk if there is state on one."""

    def memory_warning(self) -> str | None:
        """Why the plan should have been refused, where it was not because of DEEPSPEED_MEMORY_CHECK=warn."""

    def memory_line(self) -> str | None:
        """The memory plan beside what this process takes now."""

    @staticmethod
    def give_back_freed() -> None:
        """Gives memory that the first weights took, and nobody holds any more, back to the system."""

    def finish_save(self) -> str | None:
        """Waits for a checkpoint that is being written behind training; what became of it, or None. Collective."""

    def chosen(self) -> tuple[str, bool] | None:
        """Why the checkpoint that was loaded last without a tag was chosen, and whether that is reason for a warning."""

    def finish_save_alone(self) -> None:
        """As `finish_save`, without the other ranks."""

    def stage(self) -> int:
        """The ZeRO stage."""
