#!/bin/sh
# Installs the peers of the benchmarks and of the golden recordings into a virtual environment of their own:
# the original DeepSpeed, with the same torch as this project's environment.
#
#   benches/peer-venv.sh TARGET_FOLDER
#
# PYTHON chooses the interpreter (default: python3), TORCH_VERSION the torch release (default: that of .venv, where
# there is one), DEEPSPEED_VERSION the release of the original. The original builds its CPU optimizers on first use,
# so a C++ compiler is needed; ninja is installed here.
set -eu

if [ $# -ne 1 ] || [ "$1" = "-h" ] || [ "$1" = "--help" ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 2
fi

target=$1
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
deepspeed_version=${DEEPSPEED_VERSION:-0.19.8}
torch_version=${TORCH_VERSION:-}
if [ -z "$torch_version" ] && [ -x "$root/.venv/bin/python" ]; then
    torch_version=$("$root/.venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch").split("+")[0])')
fi
torch_version=${torch_version:-2.15.0}

if [ ! -x "$target/bin/python" ]; then
    "$python" -m venv "$target"
fi
"$target/bin/python" -m pip install --quiet "torch==$torch_version" numpy ninja setuptools wheel
# The original is a source package whose setup imports torch: build it against the torch just installed.
DS_ACCELERATOR=cpu "$target/bin/python" -m pip install --quiet --no-build-isolation "deepspeed==$deepspeed_version"
DS_ACCELERATOR=cpu "$target/bin/python" -c 'import torch, deepspeed; print("peer ready: deepspeed", deepspeed.__version__, "torch", torch.__version__)'
