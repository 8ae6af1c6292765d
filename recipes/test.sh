#!/usr/bin/env bash
# The tests: `bash recipes/test.sh [pytest arguments]`. With a GPU the kernel tests run natively, without one interpreted.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
cd "$ROOT"
exec "$PYTHON" -m pytest -q "$@"
