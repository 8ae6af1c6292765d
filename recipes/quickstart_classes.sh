#!/usr/bin/env bash
# Classes in the sample world, after `bash recipes/quickstart.sh [--out FOLDER]`: linear, attentive and k-NN probes of the
# pre-trained student, fine-tuning with and without augmentation, by one view and by 4 x 3; prints a table.
#
#   bash recipes/quickstart_classes.sh [--out runs/quickstart]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
cd "$ROOT"
exec "$PYTHON" -m umt_fast.sample_world.classes "$@"
