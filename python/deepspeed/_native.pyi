"""The native half of the `deepspeed` package (crates/python): everything that computes, communicates or is written.

Tensors are dense, contiguous CPU tensors unless said otherwise, and nobody else touches them during a call. Calls that
may wait release the GIL.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, final

import torch

from deepspeed.runtime.torch_transport import StoreBoard, TorchTransport

SCHEDULES: list[str]
"""The names that `scheduler.type` may have, torch's own aside."""

class DeepSpeedError(RuntimeError):
    """What the engine raises, unless a more precise class below fits."""

class CommError(DeepSpeedError):
    """A collective failed: a peer is gone, disagrees, or did not arrive."""

class CheckpointError(OSError):
    """A checkpoint could not be written or read. What was there before is untouched."""

class NonFiniteGradientError(ArithmeticError):
    """A gradient is NaN or infinite where none may be (fp32). No weight has been changed."""

class DeepSpeedConfigError(ValueError):
    """A config that cannot be used: every problem in it, each with its place and what to do."""

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

@final
class Rendezvous:
    """One process's place: its rank of how many, its number on its host, and where rank 0 listens."""

    @staticmethod
    def alone() -> Rendezvous:
        """A world of one, met by nobody."""

    @staticmethod
    def from_hosts(rank: int, hosts: Sequence[str], master_addr: str, master_port: int) -> Rendezvous:
        """From the host name of every rank, as MPI gives them, and an address of rank 0's host for the others."""

    @property
    def rank(self) -> int:
        """0 to `world_size - 1`."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""

    @property
    def local_rank(self) -> int | None:
        """Number on this host; None where the environment does not say."""

    @property
    def local_size(self) -> int | None:
        """Ranks on this host, where known."""

    @property
    def master_addr(self) -> str | None:
        """Host name or address of rank 0; None for a world of one that needs none, and where it is unknown."""

    @property
    def master_port(self) -> int:
        """Port on which rank 0 listens."""

    @property
    def source(self) -> str:
        """Who said so, in words."""

    @property
    def needs_master(self) -> bool:
        """Whether several ranks must meet at an address that the environment does not give."""

    def require_master(self) -> None:
        """Raises RuntimeError, with what to do, where `needs_master`."""

    def environment(self) -> dict[str, str]:
        """The variables by which every library finds its place: RANK, WORLD_SIZE and what else is known."""

def discover_rendezvous(environment: dict[str, str], port: int, all_sources: bool) -> Rendezvous | None:
    """This process's place, or None where no launcher left a trace. `port` is used where nothing names one.

    With `all_sources` false only RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are looked at.
    """

def estimate_zero2(
    params: int, ranks_per_host: int, hosts: int, factor: float, offload_optimizer: bool
) -> tuple[int, int]:
    """(bytes of host memory per host, bytes of memory per accelerator) of a run at stage 2."""

def zero2_table(params: int, ranks_per_host: int, hosts: int, factor: float) -> str:
    """All cases of stage 2, for people to read."""

def estimate_zero3(
    params: int,
    largest_layer: int,
    ranks_per_host: int,
    hosts: int,
    factor: float,
    offload_optimizer: bool,
    offload_param: bool,
    zero_init: bool,
) -> tuple[int, int, int]:
    """(bytes of host memory per host, bytes of memory per accelerator, bytes of the largest layer) of a run at stage 3."""

def zero3_table(params: int, largest_layer: int, ranks_per_host: int, hosts: int, factor: float) -> str:
    """All cases of stage 3, for people to read."""

def memory_in_use() -> dict[str, int]:
    """The proportional set size of this process, bytes: total, anonymous, file, shared."""

def optimizer_defaults(kind: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """All hyperparameters of an optimizer, the given ones checked and the others at their defaults."""

def optimizer_state_names(kind: str, group: Mapping[str, Any]) -> list[str]:
    """The names of the fp32 state tensors that a group with these hyperparameters has beside `step`."""

def optimizer_step(
    kind: str,
    group: Mapping[str, Any],
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    states: Sequence[Sequence[torch.Tensor]],
    steps: Sequence[int],
    threads: int,
) -> None:
    """One update of every parameter of a group, in place.

    group   the `param_groups` element; keys that are no hyperparameters are left alone.
    params, grads, states   one entry per parameter, of one length; states fp32.
    steps   per parameter, how many updates it has had, this one included.
    threads at most this many work at it.
    """

@final
class Schedule:
    """A learning-rate schedule with its settings: a pure function of the iteration."""

    def __new__(cls, name: str, params: Mapping[str, Any]) -> Schedule:
        """`scheduler.type` and `scheduler.params` of a config."""

    @property
    def start(self) -> int:
        """The iteration before the first: -1 unless the settings give another."""

    def at(self, iteration: int, base_lrs: Sequence[float]) -> tuple[list[float], list[tuple[float, float]] | None]:
        """Learning rate of each parameter group at `iteration`, and its betas where the schedule cycles momentum;
        `base_lrs` are the rates that the groups came with."""

@final
class Group:
    """A process group of the engine's."""

    @staticmethod
    def alone() -> Group:
        """The world of one."""

    @staticmethod
    def create_shared(world: int, deadline_seconds: float) -> Group:
        """Makes the shared memory of `world` ranks of this host and joins it as rank 0. The others get `handle()`."""

    @staticmethod
    def join_shared(handle: str, rank: int, deadline_seconds: float) -> Group:
        """Joins the shared memory behind `handle` as `rank`."""

    @staticmethod
    def over_torch(
        transport: TorchTransport,
        board: StoreBoard,
        rank: int,
        identities: list[tuple[str, tuple[int, int]]],
        name: str,
        deadline_seconds: float,
    ) -> Group:
        """The engine's collectives over torch.distributed; `name` is how errors call it. `identities` has each rank's
        `host_identity()` and `process_identity()`."""

    @property
    def transport(self) -> str:
        """What carries the bytes."""

    @property
    def rank(self) -> int:
        """This process's rank."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""

    def recorded(self, log: CommsLog) -> Group:
        """The same group, whose collectives are counted in `log`."""

    def handle(self) -> str | None:
        """What the other ranks need to join, where this rank made the shared memory."""

    def shares_memory(self) -> bool:
        """Whether all ranks can map the same memory."""

    def set_activity(self, activity: str) -> None:
        """Says what the program is doing, for the report of a rank that waits for it."""

    def barrier(self, what: str) -> None:
        """Waits until every rank has called."""

    def all_gather_bytes(self, what: str, mine: bytes) -> list[bytes]:
        """Every rank's bytes, in rank order."""

    def broadcast(self, tensors: dict[str, torch.Tensor], root: int) -> None:
        """Rank `root`'s values in every rank's tensors (by name, of any dtype)."""

def host_identity() -> str:
    """What tells whether two processes can share memory: the machine's boot, and the namespaces that decide whether one
    can open the other's files under /proc."""

def process_identity() -> tuple[int, int]:
    """Process id of this process, and when it started in clock ticks since boot."""

def shares_memory(identities: Sequence[str], backend: str | None) -> bool:
    """Whether the engine's collectives run over shared memory: every rank on one host, and no other transport asked for
    (`dist_backend` of `init_distributed`)."""

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

def own_range(engine: Engine, index: int) -> tuple[int, int]:
    """First element, and number of elements, of parameter `index` whose state this rank keeps."""

def read_whole_state(
    engine: Engine, index: int, kind: str, param_groups: Sequence[Mapping[str, Any]], output: torch.Tensor
) -> bool:
    """The whole of "fp32", "grad" or an optimizer state of parameter `index` into `output` (fp32). False where there is
    no such state. Collective."""

def read_own_state(
    engine: Engine, index: int, kind: str, param_groups: Sequence[Mapping[str, Any]], output: torch.Tensor
) -> bool:
    """This rank's part, the elements of `own_range`, into `output`."""

def write_own_state(
    engine: Engine, index: int, kind: str, param_groups: Sequence[Mapping[str, Any]], values: torch.Tensor
) -> bool:
    """Sets this rank's part, the elements of `own_range`, to `values` (fp32)."""

@final
class Gathering:
    """The units of an engine that gathers its weights, and which of them are whole."""

    def __new__(
        cls,
        engine: Engine,
        parameters: Sequence[torch.Tensor],
        modules: Sequence[tuple[str, bool, bool, Sequence[int]]],
        statuses: tuple[Any, Any],
    ) -> Gathering:
        """Releases `parameters`, trained and then frozen, whose weights `engine` has. `modules` are those of the tree, the
        root first: path, whether it can be called, whether it is a leaf, the numbers of its own parameters. `statuses`
        are what `ds_status` says of a whole and of a released parameter."""

    def modules(self) -> list[tuple[int, int, bool]]:
        """The modules to watch: index in the tree, number, whether it gathers units (or only needs them in backward)."""

    def param_units(self) -> list[int | None]:
        """By parameter, its unit; None for one without elements."""

    def own_parts(self) -> list[tuple[int, int]]:
        """By parameter, the address and the number of the elements that this rank keeps."""

    def is_active(self, unit: int) -> bool:
        """Whether a running module uses `unit`."""

    def is_running(self) -> bool:
        """Whether a module is running."""

    def live(self) -> int:
        """Elements that are whole now."""

    def enter(self, number: int, grad: bool, in_backward: bool) -> None:
        """The forward of module `number` begins."""

    def leave(self, number: int, grad: bool, in_backward: bool, hidden: bool) -> None:
        """The forward of module `number` is over; `hidden` says that its backward may not show when it begins."""

    def borrow(self, unit: int, grad: bool, in_backward: bool) -> None:
        """A parameter of `unit` is read by a module that does not gather it."""

    def enter_backward(self, number: int, visible: bool) -> int:
        """The backward of a call of module `number` begins; `visible` says whether `leave_backward` will be called."""

    def leave_backward(self, call: int) -> None:
        """The gradients of everything that went into the call are there."""

    def gradient(self, unit: int) -> None:
        """A gradient of `unit` has come, perhaps the last."""

    def end_pass(self) -> None:
        """The backward pass is over."""

    def updated(self) -> None:
        """The engine's shards have new values."""

    def pin(self, numbers: Sequence[int]) -> None:
        """Makes these parameters whole until `unpin`. Collective."""

    def unpin(self, numbers: Sequence[int]) -> None:
        """Takes `pin` back."""

    def store(self, numbers: Sequence[int], root: int | None) -> None:
        """Takes what rank `root` (with None, every rank) has written to these pinned parameters into shards and masters."""

def load_weight(engine: Engine, number: int, whole: torch.Tensor) -> None:
    """Gives the engine a whole parameter, by number: this rank keeps its part."""

def gather_parts(group: Group, what: str, part: torch.Tensor, whole: torch.Tensor) -> None:
    """Fills `whole` with the equally long parts of all ranks, one after another, as far as it reaches. Collective."""

@final
class SharedWeights:
    """Memory that tensors of all ranks of a host alias; it lives as long as this."""

    def set_writable(self, writable: bool) -> None:
        """Lets the program of this rank write the weights, or no longer. A draft can be written all the time."""

    def publish(self, address: int, bytes: int) -> None:
        """Shows all ranks what this rank has written to a tensor of a draft."""

    def refresh(self, address: int, bytes: int) -> None:
        """Forgets what this rank alone has written to a tensor of a draft."""

def share_draft(
    group: Group, tensors: Sequence[tuple[str, torch.Tensor, torch.dtype]], folder: Path | None = None
) -> tuple[SharedWeights, list[int]]:
    """Moves tensors of a model that is being built, with the dtype to keep them in, into memory that all ranks share,
    with rank 0's values; with a `folder`, into a file there. Returns what keeps the memory alive and each tensor's address."""

@final
class LoadedCheckpoint:
    """A checkpoint of any format, open for reading."""

    @property
    def tag(self) -> str:
        """The tag."""

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""

    @property
    def format(self) -> str:
        """The format in words."""

    @property
    def world_size(self) -> int:
        """Number of ranks that saved it."""

    def face(self) -> str:
        """What Python saved as JSON."""

    def blob(self, name: str) -> bytes | None:
        """This rank's blob, or rank 0's where fewer ranks saved."""

    def trusted_file(self) -> tuple[Path, list[str]] | None:
        """The pickle in which this rank's client state lies among other things, and its keys there; None in a format
        that keeps it apart."""

    def weights(self) -> list[tuple[str, list[int], str]]:
        """Name, shape and torch's dtype of every parameter whose weights are there."""

    def tied(self) -> list[tuple[str, str]]:
        """Other names of parameters: (other name, name)."""

    def read(self, name: str, kind: str, offset: int, tensor: torch.Tensor) -> bool:
        """Reads the elements of a parameter's `kind` from `offset` on into `tensor`, cast to its dtype. False if that
        was not saved."""

    def buffers(self) -> list[tuple[str, list[int], str]]:
        """Name, shape and torch's dtype of every buffer."""

    def buffer(self, name: str) -> bytes:
        """The bytes of a buffer."""

@final
class SavedCheckpoint:
    """What a save did."""

    @property
    def tags_differ(self) -> bool:
        """Whether ranks had different tags."""

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""

    @property
    def behind(self) -> bool:
        """Whether it is written behind training, and not there yet."""

    @property
    def removed(self) -> list[str]:
        """Tags of older checkpoints that were removed, on rank 0."""

    @property
    def problems(self) -> list[str]:
        """Why others could not be."""

def wait_for_saves() -> list[tuple[Path, str]]:
    """Waits for every checkpoint of this process that is still being written. Returns the folders of those that failed
    without anybody having been told, with the reason."""

def save_checkpoint(
    engine: Engine,
    *,
    save_dir: str | PathLike[str],
    tag: str,
    fail_on_different_tags: bool,
    save_latest: bool,
    param_groups: Sequence[Mapping[str, Any]],
    slices: Sequence[tuple[int, str, int, torch.Tensor]],
    frozen: dict[str, torch.Tensor],
    exclude_frozen: bool,
    tied: Sequence[tuple[str, str]],
    buffers: dict[str, torch.Tensor],
    blobs: Sequence[tuple[str, bytes]],
    face: str,
) -> SavedCheckpoint:
    """Saves the engine's state with what Python adds.

    slices   of a client's optimizer: (index of the parameter, kind such as "exp_avg", first element, values).
    frozen   parameters that are not trained, left out with `exclude_frozen`.
    tied     other names of parameters and buffers: (other name, name).
    buffers  tensors of any dtype.
    blobs    bytes, each rank its own.
    face     JSON.
    """

def open_checkpoint(
    engine: Engine, *, load_dir: str | PathLike[str], tag: str | None, universal: bool
) -> LoadedCheckpoint | None:
    """Opens a checkpoint of any format; None if there is no `latest` that names one. Collective."""

def load_checkpoint(
    engine: Engine,
    checkpoint: LoadedCheckpoint,
    *,
    weights: bool,
    module_only: bool,
    optimizer_states: bool,
    strict: bool,
    param_groups: Sequence[Mapping[str, Any]],
    frozen: dict[str, torch.Tensor],
) -> None:
    """Loads a checkpoint into the engine, its parameters (with `weights`) and the `frozen` ones. Collective."""

@final
class SavedModel:
    """A checkpoint of any format, and the model in it: weights from the fp32 masters, in one dtype."""

    @staticmethod
    def open(path: str | PathLike[str], tag: str | None, dtype: str, exclude_frozen: bool) -> SavedModel:
        """Opens the checkpoint `tag` of the folder `path`, the latest, or the one whose own folder `path` is."""

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""

    @property
    def stage(self) -> int:
        """The ZeRO stage of the run that saved it; 0 where that is not known."""

    def client_state(self) -> bytes | None:
        """Rank 0's client state as torch.save wrote it; None where there is none."""

    def tensors(self) -> list[tuple[str, list[int], str]]:
        """Name, shape and dtype, as `float32`, of each tensor."""

    @property
    def tied(self) -> list[tuple[str, str]]:
        """Other names of tensors: (other name, name)."""

    @property
    def absent(self) -> list[str]:
        """Frozen parameters that were left out when the checkpoint was saved."""

    def read(self, name: str, tensor: torch.Tensor) -> None:
        """Reads a tensor into one of its shape and dtype."""

def export_model(
    path: str | PathLike[str],
    tag: str | None,
    out: str | PathLike[str],
    *,
    dtype: str,
    max_shard_size: str | None,
    safetensors: bool,
    exclude_frozen: bool,
    overwrite: bool,
) -> tuple[list[Path], list[str]]:
    """Writes the model of a checkpoint into the folder `out`. Returns the files, and the frozen parameters that are not in
    them because the checkpoint does not have them."""

def write_universal(path: str | PathLike[str], out: str | PathLike[str], *, overwrite: bool) -> None:
    """Writes the checkpoint at `path` (its own folder, or one of checkpoints for the latest) as one of the original's
    universal format into the folder `out`. With `overwrite`, a universal checkpoint that is there is replaced."""

@final
class ModelFile:
    """A file of weights that is written tensor by tensor and appears when it is complete."""

    def __new__(
        cls,
        folder: str | PathLike[str],
        name: str,
        tensors: Sequence[tuple[str, Sequence[int], str]],
        tied: Sequence[tuple[str, str]],
    ) -> ModelFile:
        """Begins `folder/name`: safetensors if the name says so, else a torch file.

        tensors  (name, shape, dtype) in the order in which they will be written.
        tied     other names of some of them: (other name, name).
        """

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes the next tensor."""

    def finish(self) -> None:
        """Gives the file its name."""

@final
class MetricFile:
    """A file, or a folder of files, to which metrics are written."""

    @staticmethod
    def csv(folder: str | PathLike[str]) -> MetricFile:
        """A folder with a CSV file for each metric."""

    @staticmethod
    def tensorboard(folder: str | PathLike[str]) -> MetricFile:
        """A file for TensorBoard in a folder."""

    def write(self, events: Sequence[tuple[str, float, int]]) -> None:
        """Writes metrics: (tag, value, samples of all ranks so far)."""

def step_metrics(engine: Engine, learning_rate: float, loss: float | None = None) -> list[tuple[str, float, int]]:
    """What is known of the engine's last boundary, as metrics: (tag, value, samples of all ranks so far). `loss` is this
    rank's."""

@final
class Timer:
    """A stopwatch that adds up."""

    def __new__(cls) -> Timer:
        """A timer that has not run."""

    def start(self) -> None:
        """Begins an interval; the timer must not be running."""

    def stop(self, record: bool = True) -> None:
        """Ends the interval; `record` says whether it counts for the mean."""

    @property
    def running(self) -> bool:
        """Whether an interval is open."""

    def elapsed(self, reset: bool = True) -> float:
        """Milliseconds so far, an open interval included; with `reset` counting starts again."""

    def mean(self) -> float:
        """Mean of the recorded intervals in milliseconds; 0 before the first."""

    def reset(self) -> None:
        """Forgets everything."""

def samples_per_second(samples: int, milliseconds: float) -> float:
    """Samples per second, from milliseconds; -inf where there is no time."""

@final
class CommsLog:
    """How often each collective ran, on how many bytes, and for how long."""

    def __new__(cls, world: int, only: Sequence[str] | None = None) -> CommsLog:
        """An empty log of a group of `world` ranks, for the operations `only`, or for all."""

    def add(self, operation: str, bytes: int, seconds: float) -> str | None:
        """Adds a call of `operation` that moved `bytes` of one rank in `seconds`; returns a line that says so, or None
        where the operation is not recorded."""

    def summary(self) -> str:
        """The table of all calls."""

    def calls(self) -> list[tuple[str, int, list[float]]]:
        """By operation and bytes of one rank: the seconds of each call."""

    def reset(self) -> None:
        """Forgets all calls."""

@final
class ModuleProfile:
    """Operations, parameters and time of a model, module by module."""

    def __new__(cls, modules: Sequence[tuple[str, str, int]]) -> ModuleProfile:
        """Modules in the order of the tree, the whole model first: path, class, parameters with those inside."""

    def add_operations(self, path: str, operations: int) -> None:
        """Adds floating-point operations of the module at `path`, those inside it included."""

    def add_time(self, number: int, seconds: float) -> None:
        """Adds a call of a module, by its number."""

    def reset(self) -> None:
        """Forgets operations and times."""

    def total(self, what: str, as_text: bool) -> Any:
        """The "flops", "macs", "params" or "seconds" of the whole model; as text with its unit if `as_text`."""

    def report(self, step: int, depth: int, top: int, detailed: bool, recompute: float) -> str:
        """The report: totals, the `top` modules at each depth, and with `detailed` all down to `depth` (-1 is all)."""
