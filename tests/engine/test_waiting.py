"""A rank that waits says for whom, and what that one is doing."""

from __future__ import annotations

import logging
import time

from harness import run_ranks


def _wait_for_a_slow_rank() -> list[str]:
    import deepspeed
    from deepspeed.runtime.process_group import native_group
    from deepspeed.utils import logger

    deepspeed.init_distributed()
    group = native_group()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    if group.rank == 1:
        group.set_activity("a long validation")
        time.sleep(6.5)
    group.barrier("the end of the epoch")
    deepspeed.comm.barrier()
    return lines


def test_the_missing_rank_is_named_while_it_is_waited_for():
    waiting, slow = run_ranks(_wait_for_a_slow_rank, 2, deadline=60)
    assert any("rank 1 has not reached barrier" in line and "a long validation" in line for line in waiting), waiting
    assert slow == []
