#!/usr/bin/env bash
# Action detection on AVA 2.2, fine-tuned from a classifier.
#
#   DATA=ava_train_v2.2.csv MOVIES=movies INIT=b16_ptk710_ftk710_f8_res224.pth OUT=runs/ava \
#       [MODEL=b16|l16|b16_k400|l16_k400] bash recipes/ava.sh [--section.key value ...]
#
# DATA is AVA's ground truth or an annotation file (.json), MOVIES the folder of the movies, INIT the weights to start from.
# Hyper-parameters, layouts of MOVIES and published figures: ava.py beside this file. Processes and nodes: launch.sh.
set -euo pipefail
: "${DATA:?set DATA to the ground truth}"
: "${MOVIES:?set MOVIES to the folder of the movies}"
: "${INIT:?set INIT to the weights to start from}"
: "${OUT:?set OUT to the folder for checkpoints and metrics}"
source "$(dirname "$0")/launch.sh"
source "$ROOT/recipes/environment.sh"
launch train "$ROOT/recipes/ava.py:${MODEL:-b16}" --data.train "$DATA" --data.root "$MOVIES" \
    --init "$INIT" --run.out "$OUT" "$@"
