"""Words that a shell would take apart reach the ranks byte for byte, here and through ssh, and nothing in them is executed."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

from launched_job import DEEPSPEED, SCRIPTS, run, ssh_way
from servers import Servers

NASTY = [
    "", " ", "a b", "'", '"', "\\", "$HOME", "$(touch pwned)", "`touch pwned`", "; touch pwned", "& touch pwned #", "| touch pwned",
    "> pwned", "*", "?[a-z]", "~", "{a,b}", "!!", "%n %h", "\n", "a\nb", "\t", "-x", "--", "-oProxyCommand=touch pwned",
    "it's \"all\" $(echo $HOME)`id`\\'", "é ☃", "\x01\x7f", "=", "a=b", "'\\''", "$'\\n'", "\r\n", "EOF\nEOF",
]  # fmt: skip


def words(count: int) -> list[str]:
    """Those above, and random mixtures of their letters."""
    dice = random.Random(20)
    letters = sorted(set("".join(NASTY)))
    return NASTY + ["".join(dice.choices(letters, k=dice.randrange(1, 12))) for _ in range(count)]


def prepare(tmp_path: Path) -> tuple[Path, dict[str, str], list[bytes]]:
    """A folder with a bad name, an environment, and what each rank should have been given."""
    folder = tmp_path / 'it\'s "a" $(touch pwned); folder\n&'
    folder.mkdir()
    shutil.copy(SCRIPTS / "words.py", folder)
    handed = {f"NCCL_WORD{index:03}": word for index, word in enumerate(words(40))}
    lines = {f"FILE_WORD{index:03}": word.strip() for index, word in enumerate(words(40)) if word.strip().isprintable()}
    (folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
    variables = [f"{name}={value}".encode() for name, value in sorted({**handed, **lines}.items())]
    return folder, handed, [os.fsencode(folder), *(word.encode() for word in words(40)), *variables]


def check(tmp_path: Path, folder: Path, ranks: int, expected: list[bytes]) -> None:
    for rank in range(ranks):
        assert (folder / f"given.{rank}").read_bytes().split(b"\0") == expected
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()


def test_here(tmp_path: Path) -> None:
    folder, handed, expected = prepare(tmp_path)
    subprocess.run(
        [DEEPSPEED, "--num_gpus", "2", "words.py", *words(40)], cwd=folder, check=True, timeout=60,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "DS_ENV_FILE": ".deepspeed_env", **handed},
    )  # fmt: skip
    check(tmp_path, folder, 2, expected)


def test_on_hosts(servers: Servers, tmp_path: Path) -> None:
    folder, handed, expected = prepare(tmp_path)
    job = run(ssh_way(servers), folder, "words.py", *words(40), env=handed)
    assert job.process.returncode == 0, job.text
    check(tmp_path, folder, 4, expected)


def test_names_of_hosts_that_ssh_or_a_shell_could_misread(servers: Servers, tmp_path: Path) -> None:
    for name in ("-oProxyCommand=touch${IFS}pwned", "$(touch${IFS}pwned)", "a;touch${IFS}pwned", "`id`", "a'b"):
        (tmp_path / "hosts").write_text(f"worker-1 slots=1\n{name} slots=1\n")
        done = subprocess.run(
            [DEEPSPEED, "--hostfile", "hosts", "--launcher_args", f"-F '{servers.config}'", SCRIPTS / "words.py"],
            cwd=tmp_path, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 2 and f"the host '{name}' cannot be reached by ssh" in done.stderr, done.stderr
    assert not list(tmp_path.rglob("pwned"))
