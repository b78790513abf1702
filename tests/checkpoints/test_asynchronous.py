"""Saves behind training, through the engine's public face."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import toys  # puts the toy models on the path of the ranks

from harness import run_calls, run_command, run_ranks
from toy import build, config, digest, micro_step, run, start

BEHIND = {"async": True}


def behind_and_still(folder: str, stage: int, precision: str) -> dict[str, Any]:
    """The same run twice, saved both ways; then both checkpoints loaded."""
    out: dict[str, Any] = {}
    for name, block in (("still", {}), ("behind", BEHIND)):
        engine = start(config(stage, precision, checkpoint=block))
        run(engine, 3)
        engine.save_checkpoint(folder, name, client_state={"note": name})
        out[f"through {name}"] = run(engine, 3, first=3)
        engine.wait_for_checkpoint()
        engine.destroy()
    for name in ("still", "behind"):
        engine = start(config(stage, precision), build(seed=3))
        _, state = engine.load_checkpoint(folder, name)
        assert state == {"note": name}
        out[f"resumed {name}"] = run(engine, 3, first=3)
        engine.destroy()
    return out


def test_what_is_saved_is_the_state_at_the_call(tmp_path: Path) -> None:
    cases = {tmp_path / str(stage): (stage, "fp32" if stage == 0 else "bf16") for stage in range(4)}
    calls = {folder: (behind_and_still, str(folder), *case) for folder, case in cases.items()}
    for folder, called in run_calls(2, calls).items():
        for found in called.check():
            first = found["through still"]
            assert all(other == first for other in found.values()), folder
        for name in toys.listed(folder / "still"):
            if name.startswith(("weights", "optimizer")):
                assert (folder / "still" / name).read_bytes() == (folder / "behind" / name).read_bytes(), name
        assert toys.listed(folder) == ["behind", "latest", "still"]


def in_a_row(folder: str) -> list[str]:
    """A save waits for the one before it, and steps notice the end by themselves."""
    engine = start(config(2, checkpoint={**BEHIND, "keep_last": 2}))
    for index in range(5):
        micro_step(engine, index)
        engine.save_checkpoint(folder)
    return toys.listed(folder)


def test_one_at_a_time_and_the_last_few_are_kept(tmp_path: Path) -> None:
    for files in run_ranks(in_a_row, 2, str(tmp_path)):
        # The fifth is under way when its call returns.
        assert "global_step4" in files and "global_step1" not in files
    # The harness ends its ranks without their exit handlers: the fifth may be there or not.
    assert (tmp_path / "latest").read_text() in ("global_step4", "global_step5")


def failing(folder: str, how: str, rank: int) -> tuple[str, str, list[str]]:
    """A save whose files cannot be written on one rank; where the error comes up, and that training goes on."""
    import resource

    engine = start(config(1, "bf16", checkpoint=BEHIND))
    micro_step(engine, 0)
    engine.save_checkpoint(folder, "good")
    engine.wait_for_checkpoint()
    if engine.global_rank == rank:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    engine.save_checkpoint(folder, "bad")
    said = ""
    try:
        if how == "step":
            for index in range(1, 2000):
                micro_step(engine, index)
        elif how == "wait":
            engine.wait_for_checkpoint()
        elif how == "save":
            engine.save_checkpoint(folder, "next")
        elif how == "load":
            engine.load_checkpoint(folder)
        elif how == "destroy":
            engine.destroy()
    except OSError as error:
        said = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if how == "destroy":
        return said, "", []
    run(engine, 2)
    engine.save_checkpoint(folder, "after")
    engine.wait_for_checkpoint()
    return said, digest(engine.module), toys.listed(folder)


def test_an_error_is_raised_on_all_ranks_by_the_next_call(tmp_path: Path) -> None:
    cases = [("step", 1), ("wait", 0), ("save", 2), ("load", 1), ("destroy", 0), ("destroy", 1)]
    calls = {case: (failing, str(tmp_path / f"{case[0]} {case[1]}"), *case) for case in cases}
    for (how, rank), called in run_calls(3, calls).items():
        for number, (said, _, files) in enumerate(called.check()):
            assert said.startswith("CheckpointError: "), (how, number, said)
            if how != "destroy" or number in (rank, 0):
                assert f"rank {rank}: cannot" in said and "File too large" in said, (how, number, said)
            if how != "destroy":
                assert files == ["after", "good", "latest"], how
        manifest = tmp_path / f"{how} {rank}" / "good" / "manifest.json"
        assert json.loads(manifest.read_text())["world"] == 3


# Forked once everything is imported, each program runs to the end of the script and so leaves as any interpreter does.
PROGRAM = """
import json, os, sys
sys.path[:0] = {paths!r}
import deepspeed, torch._dynamo
from toy import config, micro_step, start
how, ended = None, {{}}
for name in sys.argv[2:]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        how = name
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        os.close(writer)
        break
    os.close(writer)
    with open(reader) as output:
        said = output.read()
    ended[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said
if how is None:
    print(json.dumps(ended))
    sys.exit()
folder = f"{{sys.argv[1]}}/{{how}}"
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
engine = start(config(1, checkpoint={{"async": True}}))
micro_step(engine, 0)
if how == "fail":
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
engine.save_checkpoint(folder, "last")
if how == "raise":
    raise ValueError("of the program's own")
if how == "forget":
    del engine
print("the program is over", flush=True)
"""


def test_a_program_that_ends_waits_for_its_checkpoint(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(paths=[path for path in sys.path if path]))
    codes = {"forget": 0, "raise": 1, "fail": 1}
    done = run_command([sys.executable, script, tmp_path, *codes], deadline=300).check()
    for how, (code, said) in json.loads(done.stdout.splitlines()[-1]).items():
        assert code == codes[how], said
        assert (tmp_path / how / "last" / "manifest.json").exists() == (how != "fail"), said
        assert ("was not completed" in said and "File too large" in said) == (how == "fail"), said
        assert ("the program is over" in said) == (how != "raise"), said
        assert not [name for name in os.listdir(tmp_path / how) if name.startswith(".")]
