"""`deepspeed.utils`: the logger, log_dist, groups; clone_tensors_for_torch_save."""

from __future__ import annotations

import io
import logging
from collections import OrderedDict

import pytest
import torch

from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.utils import groups, log_dist, logger
from deepspeed.utils import logging as ds_logging
from harness import run_ranks


def test_the_logger_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(logger, logging.Logger)
    assert logger.name == "DeepSpeed"
    assert logger.getEffectiveLevel() == logging.WARNING
    logger.info("quiet")
    logger.warning("loud")
    written = capsys.readouterr().out
    assert "quiet" not in written
    assert "[WARNING] [deepspeed] loud" in written
    ds_logging.warning_once("only once")
    ds_logging.warning_once("only once")
    assert capsys.readouterr().out.count("only once") == 1


def test_levels_by_name() -> None:
    other = logging.getLogger("test-levels")
    ds_logging.set_log_level_from_string("error", other)
    assert other.level == logging.ERROR
    with pytest.raises(ValueError, match="unknown log level 'loud'"):
        ds_logging.set_log_level_from_string("loud")
    assert ds_logging.should_log_le("warning")
    assert not ds_logging.should_log_le("info")


def logged() -> tuple[str, list[int]]:
    import deepspeed

    deepspeed.init_distributed(verbose=False)
    out = io.StringIO()
    logger.handlers = [logging.StreamHandler(out)]
    log_dist("first", ranks=[0], level=logging.WARNING)
    log_dist("all", level=logging.WARNING)
    deepspeed.comm.barrier()
    return out.getvalue(), [
        groups._get_data_parallel_world_size(),
        groups._get_data_parallel_rank(),
        groups._get_model_parallel_world_size(),
        groups._get_sequence_parallel_world_size(),
        groups._get_broadcast_src_rank(),
    ]


def test_log_dist_and_groups_on_two_ranks() -> None:
    assert run_ranks(logged, 2) == [
        ("[Rank 0] first\n[Rank 0] all\n", [2, 0, 1, 1, 0]),
        ("[Rank 1] all\n", [2, 1, 1, 1, 0]),
    ]


def test_clones_own_just_their_elements() -> None:
    flat = torch.arange(1000.0)
    state = OrderedDict(a=flat[:2], b=[flat[2:4], "text"], c=(flat[4:6], None))
    copy = clone_tensors_for_torch_save(state)
    assert isinstance(copy, OrderedDict)
    assert copy["a"].untyped_storage().nbytes() == 8
    assert torch.equal(copy["b"][0], flat[2:4])
    assert copy["c"][1] is None
    copy["a"].zero_()
    assert flat[1] == 1
