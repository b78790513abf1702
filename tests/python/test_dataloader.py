"""The data loader of `initialize(training_data=...)`, and RepeatingLoader."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import IterableDataset, TensorDataset

from deepspeed.runtime.dataloader import DeepSpeedDataLoader
from deepspeed.utils import RepeatingLoader

DATA = TensorDataset(torch.arange(10))


def batches(rank: int, **options: object) -> list[list[int]]:
    settings: dict[str, object] = {
        "batch_size": 2,
        "num_local_io_workers": 0,
        "data_parallel_world_size": 2,
        "data_parallel_rank": rank,
        **options,
    }
    return [batch[0].tolist() for batch in DeepSpeedDataLoader(DATA, **settings)]


def test_ranks_share_one_permutation() -> None:
    zero, one = batches(0), batches(1)
    assert [len(batch) for batch in zero] == [2, 2, 1]
    assert sorted(sum(zero + one, [])) == list(range(10))
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(10, generator=generator).tolist()
    assert sum(zero, []) == order[0::2], "torch's DistributedSampler with seed 0"
    assert batches(0) == zero, "the same for every epoch"


def test_length_drop_last_and_epochs() -> None:
    options: dict[str, object] = {"num_local_io_workers": 0, "data_parallel_world_size": 2, "data_parallel_rank": 0}
    assert len(DeepSpeedDataLoader(DATA, 2, **options)) == 3
    assert len(DeepSpeedDataLoader(DATA, 2, dataloader_drop_last=True, **options)) == 2
    loader = DeepSpeedDataLoader(DATA, 5, **options)
    first = next(loader)[0].tolist()
    loader.set_epoch(1)
    assert next(iter(loader))[0].tolist() != first


def test_workers_collation_sampler_and_post_processing() -> None:
    seen = []
    loader = DeepSpeedDataLoader(
        DATA,
        5,
        collate_fn=lambda samples: sum(int(sample[0]) for sample in samples),
        data_sampler=torch.utils.data.SequentialSampler(DATA),
    )
    loader.post_process_func = lambda batch, sampler: seen.append(sampler) or batch + 1
    assert list(loader) == [11, 36]
    assert seen == [loader.data_sampler] * 2


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def test_an_iterable_dataset_shards_itself() -> None:
    loader = DeepSpeedDataLoader(Stream(), 2, num_local_io_workers=0)
    assert [batch.tolist() for batch in loader] == [[0, 1], [2]]


def test_a_repeating_loader_never_ends() -> None:
    loader = RepeatingLoader([1, 2])
    assert [next(loader) for _ in range(5)] == [1, 2, 1, 2, 1]
    assert iter(loader) is loader
