#!/usr/bin/env bash
# Questions about the sample world's clips, after `bash recipes/quickstart.sh --stage2 [--out FOLDER]`: fine-tunes the
# stage-2 model on clips and on single frames, and prints what each answers about unseen clips.
#
#   bash recipes/quickstart_questions.sh [FOLDER]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
cd "$ROOT"
exec "$PYTHON" -m umt_fast.sample_world.questions "${1:-runs/quickstart}"
