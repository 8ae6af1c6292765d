#!/usr/bin/env bash
# The main job on a fresh machine, no download: renders the sample world, trains a small CLIP teacher on it,
# pre-trains a student (stage 1), compares it with the teacher and with scratch, and writes report.html.
#
#   bash recipes/quickstart.sh [--out runs/quickstart] [--seed 0]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
cd "$ROOT"
exec "$PYTHON" -m umt_fast quickstart "$@"
