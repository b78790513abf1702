"""The data loader that `deepspeed.initialize(training_data=...)` returns, and a loader that never ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torch.utils.data.distributed import DistributedSampler

_T = TypeVar("_T")

# Worker processes per rank when the caller names no number.
DEFAULT_WORKERS = 2


class DeepSpeedDataLoader:
    """Batches of this rank's share of `dataset`.

    Each data-parallel rank sees its own part of one permutation (seed 0, the same for every epoch unless
    `set_epoch` is called). `len()` is the number of micro-batches per rank, the last one possibly smaller.

    dataset                    map-style, or iterable (then it must shard itself, and nothing is shuffled).
    batch_size                 samples per micro-batch per rank.
    collate_fn                 as of torch's DataLoader.
    num_local_io_workers       worker processes per rank, 2 when None; 0 loads in this process.
    data_sampler               replaces the distributed sampler.
    data_parallel_world_size,
    data_parallel_rank         default to those of the process group.
    """

    def __init__(
        self,
        dataset: Dataset[_T],
        batch_size: int,
        pin_memory: bool = False,
        local_rank: int = 0,
        tput_timer: Any = None,
        collate_fn: Callable[[list[_T]], Any] | None = None,
        num_local_io_workers: int | None = None,
        data_sampler: Sampler[int] | None = None,
        data_parallel_world_size: int | None = None,
        data_parallel_rank: int | None = None,
        dataloader_drop_last: bool = False,
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.tput_timer = tput_timer
        self.local_rank = local_rank
        self.post_process_func: Callable[[Any, Any], Any] | None = None
        self.data_sampler = data_sampler
        if data_sampler is None and not isinstance(dataset, IterableDataset):
            self.data_sampler = DistributedSampler(
                dataset,
                num_replicas=data_parallel_world_size,
                rank=data_parallel_rank,
                shuffle=True,
                seed=0,
                drop_last=dataloader_drop_last,
            )
        self.dataloader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=self.data_sampler,
            num_workers=DEFAULT_WORKERS if num_local_io_workers is None else num_local_io_workers,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            drop_last=dataloader_drop_last,
        )
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> DeepSpeedDataLoader:
        self._iterator = iter(self.dataloader)
        return self

    def __len__(self) -> int:
        return len(self.dataloader)

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self.dataloader)
        if self.tput_timer is not None:
            self.tput_timer.start()
        batch = next(self._iterator)
        if self.post_process_func is not None:
            batch = self.post_process_func(batch, self.data_sampler)
        return batch

    def set_epoch(self, epoch: int) -> None:
        """Chooses the permutation of the next iteration, where the sampler has one per epoch."""
        set_epoch = getattr(self.data_sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


class RepeatingLoader(Generic[_T]):
    """Iterates over `loader` for ever, starting it again each time it ends."""

    def __init__(self, loader: Iterable[_T]):
        self.loader = loader
        self.data_iter: Iterator[_T] = iter(loader)

    def __iter__(self) -> RepeatingLoader[_T]:
        return self

    def __next__(self) -> _T:
        try:
            return next(self.data_iter)
        except StopIteration:
            self.data_iter = iter(self.loader)
            return next(self.data_iter)
