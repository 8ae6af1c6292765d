#!/usr/bin/env bash
# Fine-tuning for retrieval or multiple choice: ret_msrvtt, ret_didemo, ret_anet, ret_lsmdc, ret_msvd, ret_ssv2 or mc_msrvtt.
#
#   VIDEOS=train.json=/data/msrvtt INIT=b16_25m.pth OUT=runs/ret_msrvtt [VALIDATION=val.json=/data/msrvtt] \
#       bash recipes/retrieval.sh ret_msrvtt[:VARIANT] [--section.key value ...]
#
# VIDEOS and VALIDATION are LIST or LIST=FOLDER: an official annotation file as it is, and the folder its names are relative
# to. INIT holds stage-2 weights. Variants, hyper-parameters and published figures: the page of that name beside this file.
# Processes and nodes: launch.sh.
set -euo pipefail
if [ $# = 0 ]; then
    echo "recipes/retrieval.sh: name a page, as ret_msrvtt or ret_msrvtt:l16_25m" >&2
    exit 2
fi
page=$1
shift
: "${VIDEOS:?set VIDEOS to the caption list of the training clips, or LIST=FOLDER}"
: "${INIT:?set INIT to stage-2 weights}"
: "${OUT:?set OUT to the folder for checkpoints and metrics}"
source "$(dirname "$0")/launch.sh"
require_page "${page%%:*}"
source "$ROOT/recipes/environment.sh"
variant=${page#*:}
[ "$variant" = "$page" ] && variant="" || variant=":$variant"
launch train "$ROOT/recipes/${page%%:*}.py$variant" --videos "$VIDEOS" --init "$INIT" --run.out "$OUT" \
    ${VALIDATION:+--data.validation "$VALIDATION"} "$@"
