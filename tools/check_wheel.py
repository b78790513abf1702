"""Fails unless a wheel is one for every CPython from 3.10 on, under 15 MB, and needs torch and nothing else.

python tools/check_wheel.py dist/deepspeed-*.whl
"""

import re
import sys
import zipfile
from pathlib import Path

LIMIT_MB = 15


def problems(path: Path) -> list[str]:
    """What is wrong with this wheel."""
    found = []
    if not re.fullmatch(r"deepspeed-[\d.]+-cp310-abi3-(many)?linux\w*\.whl", path.name):
        found.append("its name is not that of a cp310-abi3 wheel for Linux")
    size = path.stat().st_size / 1e6
    if size >= LIMIT_MB:
        found.append(f"it has {size:.1f} MB, and {LIMIT_MB} are too many")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        needs = re.findall(r"^Requires-Dist: (.*)$", wheel.read(metadata).decode(), re.MULTILINE)
    if needs != ["torch"]:
        found.append(f"it needs {', '.join(needs) or 'nothing'}, not torch alone")
    extensions = [name for name in names if name.endswith(".so")]
    if extensions != ["deepspeed/_native.abi3.so"]:
        found.append(f"its extension modules are {', '.join(extensions) or 'none'}")
    found += [
        f"{name} is missing" for name in ("deepspeed/py.typed", "deepspeed/_native/__init__.pyi") if name not in names
    ]
    if not any(re.search(r"\.data/scripts/deepspeed$", name) for name in names):
        found.append("the deepspeed command is missing")
    return found


wheels = [Path(argument) for argument in sys.argv[1:]]
if len(wheels) != 1:
    sys.exit(__doc__)
wrong = problems(wheels[0])
print(f"{wheels[0]}: {wheels[0].stat().st_size / 1e6:.1f} MB")
sys.exit("\n".join(wrong))
