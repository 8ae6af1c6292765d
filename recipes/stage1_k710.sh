#!/usr/bin/env bash
# Stage-1 pre-training on Kinetics-710, every hyper-parameter in stage1_k710.py beside this file.
#
#   DATA=train.csv OUT=runs/k710 [MODEL=b16|l16] [NGPU=8] [NNODES=4 NODE_RANK=i MASTER_ADDR=host] \
#       bash recipes/stage1_k710.sh [--section.key value ...]
#
# DATA is an official list (path,label) or a manifest written by `python -m umt_fast scan`. Processes, nodes and Slurm: see
# launch.sh. Run it again to continue from the newest checkpoint in OUT.
set -euo pipefail
: "${DATA:?set DATA to a list of videos (path,label per line) or to a manifest}"
: "${OUT:?set OUT to the folder for checkpoints and metrics}"
source "$(dirname "$0")/launch.sh"
source "$ROOT/recipes/environment.sh"
launch train "$ROOT/recipes/stage1_k710.py:${MODEL:-b16}" --data.train "$DATA" --run.out "$OUT" "$@"
