#!/usr/bin/env bash
# The tests: `bash recipes/test.sh [pytest arguments]`. With a GPU the kernel tests run natively, without one interpreted.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
cd "$ROOT"
# Small work on several threads waits for the slowest of them, long where the machine is shared.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest -q "$@"
