#!/usr/bin/env bash
# Installs xformers and flash-attn into the environment of `python` (default: .venv), after torch is there.
#
# Not normal dependencies, because flash-attn's set-up imports torch (so it fails, and the whole install with it,
# where torch is not installed yet), it is built from source for hours where no wheel fits, and xformers 0.0.35
# carries kernels for CUDA 12 only. tinylab runs without both: torch's own attention is the default.
#   MAX_JOBS=4         parallel compilers; each takes several GB of memory
#   PYTHON=...         another environment's Python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$(command -v "$python")" ] || { echo "no Python at $python: run 'make setup' first, or set PYTHON" >&2; exit 2; }

cuda=$("$python" -c 'import torch; print(torch.version.cuda or "")') \
  || { echo "torch must be installed first: run 'make setup'" >&2; exit 2; }
[ -n "$cuda" ] || { echo "torch here is a CPU build: flash-attn and xformers need a CUDA build" >&2; exit 2; }

echo "torch is built for CUDA $cuda"
# --no-deps: xformers must not exchange the pinned torch
"$python" -m pip install -c env/constraints.txt --no-deps xformers
if command -v nvcc >/dev/null; then
  nvcc=$(nvcc --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p')
  [ "$nvcc" = "${cuda%%.*}" ] \
    || { echo "nvcc is of CUDA $nvcc, torch of CUDA $cuda: install the nvcc of torch's CUDA, then repeat" >&2; exit 2; }
else
  echo "no nvcc found: flash-attn can then come from a prebuilt wheel only" >&2
fi
"$python" -m pip install ninja packaging psutil setuptools wheel
MAX_JOBS=${MAX_JOBS:-4} "$python" -m pip install -c env/constraints.txt --no-build-isolation flash-attn
echo "done; 'tinylab doctor' says which attention backends are live now"
