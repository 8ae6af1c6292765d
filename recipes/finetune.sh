#!/usr/bin/env bash
# Fine-tuning of a classifier as published; every hyper-parameter in the page beside this file.
#
#   RECIPE=k710|k400|k600|k700|mit|ssv2 DATA=train.csv INIT=weights OUT=runs/x [VAL=val.csv] [MODEL=b16|l16|...] \
#       [LABEL_MAP=label_mixto600.json] [NGPU=8] [NNODES=4 NODE_RANK=i MASTER_ADDR=host] \
#       bash recipes/finetune.sh [--section.key value ...]
#
# MODEL is a variant of the page. INIT is stage-1 weights for k710 and ssv2, a classifier's for the others: a checkpoint of a
# run, a converted or an official file, or a deepspeed checkpoint folder. k600 and k700 need LABEL_MAP. Processes, nodes and
# Slurm: see launch.sh. Run it again to continue from the newest checkpoint in OUT.
set -euo pipefail
: "${RECIPE:?set RECIPE to k710, k400, k600, k700, mit or ssv2}"
: "${DATA:?set DATA to a list of videos (path and label per line) or to a manifest}"
: "${INIT:?set INIT to the weights to start from}"
: "${OUT:?set OUT to the folder for checkpoints and metrics}"
source "$(dirname "$0")/launch.sh"
require_page "$RECIPE"
if [ "$RECIPE" = k600 ] || [ "$RECIPE" = k700 ]; then
    : "${LABEL_MAP:?set LABEL_MAP to the official list of the head rows that $RECIPE keeps (label_mixto${RECIPE#k}.json)}"
fi
source "$ROOT/recipes/environment.sh"
options=(--data.train "$DATA" --init "$INIT" --run.out "$OUT")
[ -z "${VAL:-}" ] || options+=(--data.validation "$VAL")
[ -z "${LABEL_MAP:-}" ] || options+=(--label_map "$LABEL_MAP")
launch train "$ROOT/recipes/$RECIPE.py:${MODEL:-b16}" "${options[@]}" "$@"
