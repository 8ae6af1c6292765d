#!/usr/bin/env bash
# Retrieval and multiple choice in the sample world, after `bash recipes/quickstart.sh --stage2 [--out FOLDER]`: fine-tunes
# the stage-2 model for both, and prints what it finds and chooses among unseen clips, beside stage 2's own weights.
#
#   bash recipes/quickstart_captions.sh [FOLDER]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
cd "$ROOT"
exec "$PYTHON" -m umt_fast.sample_world.captions "${1:-runs/quickstart}"
