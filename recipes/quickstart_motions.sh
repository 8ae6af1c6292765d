#!/usr/bin/env bash
# The sample world's detectors: which way does the thing in each box move? From pre-training, from scratch, and of single
# pictures, judged by frame mAP. Makes what a quickstart folder lacks of world, teacher and pre-training.
#
#   bash recipes/quickstart_motions.sh [--out runs/quickstart] [--seed 0] [--seeds 3]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
cd "$ROOT"
exec "$PYTHON" -m umt_fast.sample_world.detection "$@"
