#!/usr/bin/env bash
# Everything only a GPU can show, most valuable first, within ten minutes: bash benchmarks/gpu.sh [--pack]
#
# benchmarks/gpu.py says what it measures, what it writes, and which variables steer it (OUT, UMT_DEADLINE, UMT_SIZES, ...).
# It needs torch, triton, transformers, numpy, pillow, safetensors and pytest. PYTHON or UMT_PYTHON chooses the interpreter
# (else .venv's, where the recipes made one). Call it again on the same OUT to go on where it was cut.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
default=python3
[[ -x .venv/bin/python ]] && default=.venv/bin/python
PYTHON=${PYTHON:-${UMT_PYTHON:-$default}}
if ! "$PYTHON" -c 'import sys, importlib.util as u; sys.exit(any(u.find_spec(n) is None for n in ("torch", "triton")))'; then
    echo "benchmarks/gpu.sh: $PYTHON has no torch or no triton; set PYTHON to an interpreter that has" >&2
    exit 2
fi
exec "$PYTHON" -m benchmarks.gpu "$@"
