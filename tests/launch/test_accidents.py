"""What can befall a job here and on two hosts, by every runner: it is over within ten seconds, says what was the matter, and leaves nothing behind.

| what | which process |
|---|---|
| rank, agent | they themselves, by SIGKILL |
| front | the process in front of the agent, which pdsh, mpirun and srun know |
| daemon | its parent on the host: sshd's session, orted, hydra_pmi_proxy, slurmstepd |
| ssh client | that of the second host, the launcher's own or pdsh's; the daemons of MPI have connections of their own, Slurm needs no ssh |
| runner | pdsh, mpirun, srun |
| fails | a rank exits with 7 |
| stopped rank, silent agent | they get SIGSTOP, and nothing else is heard of them |
| refused memory | a rank asks for more than `ulimit -v` |
| out of memory | the kernel kills a rank whose control group is full |
| ctrl-c | SIGINT to the launcher's process group; twice, where the ranks are deaf to it |
| launcher | it gets SIGKILL |
"""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from launched_job import MEMBER, SCRIPTS, Job, Way, assert_gone, limit, parent_of
from memory_group import memory_group
from servers import children, command_of, kill

HERE = ("rank", "fails", "stopped rank", "refused memory", "out of memory", "ctrl-c", "ctrl-c twice", "launcher")
ON_HOSTS = (*HERE, "agent", "daemon", "silent agent")
ACCIDENTS = {
    "here": HERE,
    "ssh": (*ON_HOSTS, "ssh client"),
    "pdsh": (*ON_HOSTS, "front", "ssh client", "runner"),
    "openmpi": (*ON_HOSTS, "front", "runner"),
    "mpich": (*ON_HOSTS, "front", "runner"),
    "slurm": (*ON_HOSTS, "front", "runner"),
}
# A host whose agent is gone has its guard to see to what is left, or none of ours: sshd, say, has died with the agent.
AFTERWARDS = ("agent", "front", "daemon", "ssh client", "runner", "silent agent", "launcher")


@dataclass
class Seen:
    """What an accident has led to."""

    code: int
    text: str
    report: str
    victim: int


def descendants(parent: int) -> list[int]:
    return [pid for child in children(parent) for pid in (child, *descendants(child))]


def victim_of(job: Job, what: str) -> int:
    members = job.members()
    agent = members[3][1]
    above = parent_of(agent)
    if what == "runner":
        (found,) = (pid for pid in children(job.process.pid) if command_of(pid).startswith(job.way.program))
    elif what == "ssh client":
        second = job.way.hosts[1]
        clients = [(pid, command_of(pid).split()) for pid in descendants(job.process.pid)]
        (found,) = (pid for pid, words in clients if words and words[0].endswith("ssh") and second in words)
    elif what == "daemon":
        found = above if job.way.name == "ssh" else parent_of(above)
        assert job.way.daemon in command_of(found)
    else:
        found = {
            "rank": members[3][0], "agent": agent, "front": above, "stopped rank": members[1][0],
            "silent agent": agent, "launcher": job.process.pid,
        }[what]  # fmt: skip
    return found


def let_happen(way: Way, what: str, folder: Path) -> Seen:
    """Runs a job, lets it happen, and sees to it that the job is over in time and nothing is left of it."""
    if what == "refused memory":
        with Job(way, folder, SCRIPTS / "greedy.py") as job:
            return Seen(job.wait(), job.text, job.err.read_text(), 0)
    if what == "out of memory":
        with memory_group() as group:
            if group is None:
                pytest.skip("no control group with a memory limit can be made here")
            with Job(way, folder, "--no_python", "--no_local_rank", SCRIPTS / "hog.sh", group) as job:
                return Seen(job.wait(), job.text, job.err.read_text(), 0)
    mode = "fail" if what == "fails" else "wait" if what in ("stopped rank", "ctrl-c") else "deaf"
    with Job(way, folder, *MEMBER, mode) as job:
        if what == "fails":
            # Whether its last words are there before it is over is a matter of chance.
            code = job.wait()
            assert_gone([pid for pids in job.members().values() for pid in pids])
            return Seen(code, job.text, job.err.read_text(), 0)
        job.await_members()
        everyone, victim = job.processes(), 0
        if what.startswith("ctrl-c"):
            # As the terminal does it.
            os.killpg(job.process.pid, signal.SIGINT)
            if what == "ctrl-c twice":
                time.sleep(0.5)
                os.killpg(job.process.pid, signal.SIGINT)
        else:
            victim = victim_of(job, what)
            if what == "runner":
                everyone.append(victim)
            kill(victim, signal.SIGSTOP if what in ("stopped rank", "silent agent") else signal.SIGKILL)
        code = job.wait(limit())
        assert_gone(everyone, within=limit() if what in AFTERWARDS else 0.0)
        return Seen(code, job.text, job.err.read_text(), victim)


_SEEN: dict[str, dict[str, Future[Seen]]] = {}


@pytest.fixture
def accidents(way: Way, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[Seen]]:
    """All that can befall a job by this runner: once for each runner, and several jobs at a time, as most of their time is waiting."""
    if way.name not in _SEEN:
        folder = tmp_path_factory.mktemp(f"accidents-{way.name}")
        with ThreadPoolExecutor(max_workers=5) as pool:
            # Those that take longest first.
            order = sorted(ACCIDENTS[way.name], key=lambda what: what not in ("stopped rank", "silent agent"))
            _SEEN[way.name] = {
                what: pool.submit(let_happen, way, what, folder / what.replace(" ", "-")) for what in order
            }
    return _SEEN[way.name]


@pytest.mark.parametrize(
    ("way", "what"), [(name, what) for name in ACCIDENTS for what in ACCIDENTS[name]], indirect=["way"]
)
def test_what_befalls_a_job(way: Way, what: str, accidents: dict[str, Future[Seen]]) -> None:
    seen = accidents[what].result()
    first, second = way.hosts
    report = seen.report
    lost = f"host {second} failed: it was lost" in report and "with it:   ranks 2-3" in report
    if what.startswith("ctrl-c"):
        assert seen.code == 128 + signal.SIGINT, seen.text
        assert "no rank is left" in report and " failed: " not in report, report
        return
    if what == "launcher":
        assert seen.code == -signal.SIGKILL
        return
    assert report.count(" failed: ") == 1, report
    if what == "rank":
        assert seen.code == 128 + signal.SIGKILL
        assert "rank 3 failed: killed by signal 9 (SIGKILL)" in report
        assert f"host {second}, process {seen.victim}" in report and "ended:     ranks 0-2, by the launcher" in report
    elif what == "fails":
        assert seen.code == 7 and "rank 2 failed: exited with code 7" in report, report
        assert "  | the reason of rank 2" in report and f"host {second}, " in report, report
    elif what == "stopped rank":
        assert seen.code == 128 + signal.SIGSTOP, seen.text
        assert "rank 1 failed: stopped by signal 19 (SIGSTOP)" in report and f"host {first}, " in report, report
    elif what == "refused memory":
        assert seen.code == 1 and "rank 1 failed: exited with code 1" in report, report
        words = "out of memory: it was refused memory and said `MemoryError`; its limit is 2.0 GiB (ulimit -v)"
        assert f"evidence:  {words}" in report and "ended:     ranks 0, 2-3, by the launcher" in report, report
    elif what == "out of memory":
        assert seen.code == 128 + signal.SIGKILL, seen.text
        assert "rank 1 failed: killed by signal 9 (SIGKILL)" in report and f"host {first}, " in report, report
        # The kernel's log, or where that cannot be read, its counters.
        assert "evidence:  out of memory: " in report or "evidence:  probably out of memory: " in report, report
    elif what == "runner":
        assert seen.code == 255, report
        assert f"{way.program.split('.')[0]} was killed by signal 9" in report and "with it:   ranks 0-3" in report
    else:
        assert seen.code == 255 and lost, report
        if what == "silent agent":
            assert "it has said nothing for 6 s" in report, report
