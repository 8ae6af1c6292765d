#!/usr/bin/env bash
# Questions about the sample world's clips, after `bash recipes/quickstart.sh --stage2 [--out FOLDER]`: fine-tunes the
# stage-2 model on clips and on single frames, and prints what each answers about unseen clips.
#
#   bash recipes/quickstart_questions.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -d "${1:-runs/quickstart}/stage2" ]; then
    echo "$0: ${1:-runs/quickstart} has no stage 2; run bash recipes/quickstart.sh --stage2 --out ${1:-runs/quickstart} first" >&2
    exit 2
fi
source recipes/environment.sh
exec "$PYTHON" -m umt_fast.sample_world.questions "${1:-runs/quickstart}"
