#!/usr/bin/env bash
# Stage-2 pre-training on the 25M corpus: WebVid-10M, CC3M, COCO, Visual Genome, SBU and CC12M.
#
#   WEBVID10M=webvid.json=/data/webvid CC3M=cc3m.json=/data/cc3m COCO=.. VG=.. SBU=.. CC12M=.. \
#       INIT=stage1.pth OUT=runs/stage2_25m [MODEL=b16|l16] bash recipes/stage2_25m.sh [--section.key value ...]
#
# Each corpus is LIST or LIST=FOLDER: a caption list (.json or SQLite) and the folder its names are relative to; or tar files,
# as 'cc12m/{00000..01242}.tar'. INIT holds stage-1 weights. Hyper-parameters and the paper's figures: stage2.py beside this
# file. Processes and nodes: launch.sh.
set -euo pipefail
: "${WEBVID10M:?set WEBVID10M to its caption list, or LIST=FOLDER}"
: "${CC3M:?set CC3M to its caption list, or LIST=FOLDER}"
: "${COCO:?set COCO to its caption list, or LIST=FOLDER}"
: "${VG:?set VG to its caption list, or LIST=FOLDER}"
: "${SBU:?set SBU to its caption list, or LIST=FOLDER}"
: "${CC12M:?set CC12M to its caption list, or LIST=FOLDER}"
: "${INIT:?set INIT to stage-1 weights}"
: "${OUT:?set OUT to the folder for checkpoints and metrics}"
source "$(dirname "$0")/launch.sh"
source "$ROOT/recipes/environment.sh"
launch train "$ROOT/recipes/stage2.py:${MODEL:-b16}" --videos "$WEBVID10M" --images "$CC3M" "$COCO" "$VG" "$SBU" "$CC12M" \
    --init "$INIT" --run.out "$OUT" "$@"
