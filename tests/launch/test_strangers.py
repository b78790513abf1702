"""The meeting of a job's ranks is for those who know the job's secret: others are refused, and disturb nobody."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

from harness import run_outcomes, run_ranks

OURS, OTHER = "5" * 64, "7" * 64


def _join(rank: int, secret: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "DS_JOB_SECRET": secret}
    import deepspeed

    deepspeed.init_distributed(timeout=timedelta(seconds=30))


def two_ranks_and_a_stranger(folder: str) -> object:
    """Ranks 0 and 1 of a job, and a process that takes itself for rank 1 before the real one comes."""
    import torch
    import torch.distributed as dist

    note = Path(folder) / "refused"
    if os.environ["RANK"] == "2":
        # What a program that knows torch's protocol can do: leave keys where a job without a secret would look for them.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=30), wait_for_workers=False)
        store.set("default_pg/0//cpu//0/0", "nonsense")
        try:
            _join(1, OTHER)
        except RuntimeError as error:
            note.write_text("")
            return str(error)
        return "let in"
    rank = int(os.environ["RANK"])
    while rank == 1 and not note.exists():
        time.sleep(0.02)
    _join(rank, OURS)
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    # Rank 0 listens; by the time that rank 1 looks it may have ended.
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]] if rank == 0 else []
    port = f":{int(os.environ['MASTER_PORT']):04X}"
    return total.item(), [words[1] for words in listening if words[1].endswith(port) and words[3] == "0A"]


def test_a_stranger_is_refused_and_disturbs_nobody(tmp_path: Path) -> None:
    (first, listening), (second, _), stranger = run_ranks(two_ranks_and_a_stranger, 3, str(tmp_path))
    assert first == second == 3.0
    # 0100007F is 127.0.0.1: the port is not open to other machines.
    assert [address.split(":")[0] for address in listening] == ["0100007F"]
    assert stranger.startswith("rank 1 of 2 is refused: what listens at 127.0.0.1:")
    assert OURS not in stranger and OTHER not in stranger


def a_rank_of_an_earlier_attempt() -> None:
    _join(int(os.environ["RANK"]), OURS if os.environ["RANK"] == "0" else OTHER)


def test_a_rank_with_an_old_secret_ends_at_once(tmp_path: Path) -> None:
    _, old = run_outcomes(a_rank_of_an_earlier_attempt, 2, deadline=40, grace=0.1)
    assert not old.ok and "rank 1 of 2 is refused" in old.describe(), old.describe()
