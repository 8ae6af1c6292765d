#!/usr/bin/env bash
# Retrieval and multiple choice in the sample world, after `bash recipes/quickstart.sh --stage2 [--out FOLDER]`: fine-tunes
# the stage-2 model for both, and prints what it finds and chooses among unseen clips, beside stage 2's own weights.
#
#   bash recipes/quickstart_captions.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -d "${1:-runs/quickstart}/stage2" ]; then
    echo "$0: ${1:-runs/quickstart} has no stage 2; run bash recipes/quickstart.sh --stage2 --out ${1:-runs/quickstart} first" >&2
    exit 2
fi
source recipes/environment.sh
exec "$PYTHON" -m umt_fast.sample_world.captions "${1:-runs/quickstart}"
