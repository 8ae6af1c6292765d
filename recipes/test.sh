#!/usr/bin/env bash
# The tests: `bash recipes/test.sh [--all] [pytest arguments]`. With a GPU the kernel tests run natively, without one interpreted.
#
# Without --all: the everyday tier, all but the tests marked slow. Several processes share the work where pytest-xdist is
# installed; on a GPU, which the tests measure and fill, one does it.
set -euo pipefail
NEEDS="torch open_clip transformers av tyro tensorboard pytest hypothesis"
source "$(dirname "$0")/environment.sh"
cd "$ROOT"
# Small work on several threads waits for the slowest of them, long where the machine is shared.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
options=(-q)
if [ "${1:-}" = --all ]; then
    shift
else
    options+=(-m "not slow")
fi
if "$PYTHON" -c 'import sys, torch, xdist; sys.exit(torch.cuda.is_available())' 2>/dev/null; then
    # Neighbors stay together, so that what a module prepares is prepared once.
    options+=(-n auto --dist worksteal)
fi
exec "$PYTHON" -m pytest "${options[@]}" "$@"
