#!/usr/bin/env bash
# Fine-tuning for question answering: qa_anet, qa_msrvtt or qa_msvd.
#
#   QUESTIONS=train.json=/data/msrvtt INIT=b16_25m.pth OUT=runs/qa_msrvtt [VALIDATION=val.json=/data/msrvtt ANSWERS=list.json] \
#       bash recipes/answering.sh qa_msrvtt[:VARIANT] [--section.key value ...]
#
# QUESTIONS and VALIDATION are LIST or LIST=FOLDER: an official annotation file as it is, and the folder its names are relative
# to. With VALIDATION and ANSWERS, the list to choose from, the best epoch is kept. INIT holds stage-2 weights. Variants,
# hyper-parameters and published figures: the page of that name beside this file. Processes and nodes: launch.sh.
set -euo pipefail
if [ $# = 0 ]; then
    echo "recipes/answering.sh: name a page, as qa_msrvtt or qa_msrvtt:l16_25m" >&2
    exit 2
fi
page=$1
shift
: "${QUESTIONS:?set QUESTIONS to the list of training questions, or LIST=FOLDER}"
: "${INIT:?set INIT to stage-2 weights}"
: "${OUT:?set OUT to the folder for checkpoints and metrics}"
source "$(dirname "$0")/launch.sh"
require_page "${page%%:*}"
source "$ROOT/recipes/environment.sh"
variant=${page#*:}
[ "$variant" = "$page" ] && variant="" || variant=":$variant"
launch train "$ROOT/recipes/${page%%:*}.py$variant" --questions "$QUESTIONS" --init "$INIT" --run.out "$OUT" \
    ${VALIDATION:+--data.validation "$VALIDATION"} ${ANSWERS:+--answers "$ANSWERS"} "$@"
