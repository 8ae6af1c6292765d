#!/usr/bin/env bash
# Everything that is measured on a CPU, in parts; let nothing else run meanwhile:
#
#   bash benchmarks/cpu.sh [step|large|stage2|profile|input|soak|all]   OUT=folder (default benchmarks/results/new)
#
#   step     whole stage-1 steps of B/16 in turn: fast implementation, fast with an int8 teacher, plain implementation, and the official code
#   large    the same of L/16, one step of each
#   stage2   whole stage-2 steps of B/16, both implementations
#   profile  the parts of a fast step of either stage beside their bounds; stage 1 also with the int8 teacher
#   input    the loader with several readers in turn (decord too, where it is installed)
#   soak     the loader's memory over 20,000 clips
#
# Every figure of a step is of a process of its own, since a CPU's peak memory is the process's. Each part writes into OUT
# beside machine.json and renews table.md; OUT is of one commit. UMT_SIZES="tiny" tries the script; UMT_ROUNDS is how often
# the implementations take turns, UMT_LARGE_CLIPS the clips of an L/16 step, UMT_SHARED the folder with videos/ for input and soak.
# Each is measured in every dtype that the CPU multiplies in hardware, or in UMT_DTYPES. UMT_OFFICIAL names a copy of
# github.com/OpenGVLab/unmasked_teacher whose own step is timed too; it needs timm 0.4.12. PYTHON or UMT_PYTHON chooses the
# interpreter; else it is .venv's, where the recipes made one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
part=${1:-all}
case $part in step | large | stage2 | profile | input | soak | all) ;; *)
    echo "benchmarks/cpu.sh: unknown part '$part'; choose step, large, stage2, profile, input, soak or all" >&2
    exit 2
    ;;
esac
default=python3
[[ -x .venv/bin/python ]] && default=.venv/bin/python
PYTHON=${PYTHON:-${UMT_PYTHON:-$default}}
if ! "$PYTHON" -c 'import torch'; then
    echo "benchmarks/cpu.sh: $PYTHON has no torch; set PYTHON, or let 'bash recipes/test.sh --co' make .venv" >&2
    exit 2
fi
OUT=${OUT:-benchmarks/results/new}
SIZES=${UMT_SIZES:-b16 l16}
has_bf16() { "$PYTHON" -c 'import sys; from umt_fast.engine.precision import cpu_has_bf16; sys.exit(not cpu_has_bf16())'; }
DTYPES=${UMT_DTYPES:-fp32$(has_bf16 && echo " bf16" || true)}
if [[ -n ${UMT_OFFICIAL:-} ]]; then
    "$PYTHON" -m benchmarks.official check --folder "$UMT_OFFICIAL" || exit 2
fi
SHARED=${UMT_SHARED:-../shared}
mkdir -p "$OUT"
wanted() { [[ $part == "$1" || $part == all ]]; }
# Lines of a part that runs again take the place of its old ones once all are there.
into() { rm -f "$OUT/$1.partial"; }
keep() { mv "$OUT/$1.partial" "$OUT/$1.jsonl"; }
bench() { # FILE, arguments of `bench`
    local file=$1
    shift
    "$PYTHON" -m umt_fast bench "$@" --device cpu | tee -a "$OUT/$file.partial"
}
has_int8() { "$PYTHON" -c 'import sys, torch; sys.exit(not (torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()))'; }
int8=$(has_int8 && echo int8 || true)

steps() { # FILE, model, clips, timed steps, rounds
    local size=(--model "$2" --batch_size "$3" --steps "$4")
    for dtype in $DTYPES; do
        for _ in $(seq "$5"); do
            for precision in native $int8; do
                bench "$1" stage1 "${size[@]}" --dtype "$dtype" --precision "$precision"
            done
            bench "$1" stage1 "${size[@]}" --dtype "$dtype" --implementation plain
            if [[ -n ${UMT_OFFICIAL:-} ]]; then
                "$PYTHON" -m benchmarks.official stage1 --folder "$UMT_OFFICIAL" "${size[@]}" --dtype "$dtype" --device cpu |
                    tee -a "$OUT/$1.partial"
            fi
        done
    done
}

echo "benchmarks/cpu.sh: measuring the machine" >&2
"$PYTHON" -m benchmarks.machine >"$OUT/machine.json.partial"
commit() { "$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1])).get("commit"))' "$1"; }
if [[ -e $OUT/machine.json && $(commit "$OUT/machine.json") != $(commit "$OUT/machine.json.partial") ]]; then
    echo "benchmarks/cpu.sh: $OUT holds figures of commit $(commit "$OUT/machine.json"); give another OUT" >&2
    exit 2
fi
mv "$OUT/machine.json.partial" "$OUT/machine.json"
for size in $SIZES; do
    if [[ $size == l16 ]]; then
        if wanted large; then
            into cpu_steps_l16
            steps cpu_steps_l16 l16 "${UMT_LARGE_CLIPS:-1}" 1 1
            keep cpu_steps_l16
        fi
        continue
    fi
    if wanted step; then
        into "cpu_steps_$size"
        steps "cpu_steps_$size" "$size" 4 3 "${UMT_ROUNDS:-2}"
        keep "cpu_steps_$size"
    fi
    if wanted stage2; then
        into "cpu_steps_stage2_$size"
        for dtype in $DTYPES; do
            for implementation in fast plain; do
                bench "cpu_steps_stage2_$size" stage2 --model "$size" --batch_size 4 --steps 2 --dtype "$dtype" --implementation $implementation
            done
        done
        keep "cpu_steps_stage2_$size"
    fi
    if wanted profile; then
        into "parts_$size"
        for dtype in $DTYPES; do
            for precision in native $int8; do
                bench "parts_$size" stage1 --model "$size" --steps 3 --dtype "$dtype" --precision "$precision" --profile
            done
            bench "parts_$size" stage2 --model "$size" --steps 3 --dtype "$dtype" --profile
        done
        keep "parts_$size"
    fi
done
if wanted input; then
    OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -p no:cacheprovider benchmarks/bench_input.py \
        --benchmark-json "$OUT/input.partial"
    "$PYTHON" -c 'import json, sys
for case in json.load(open(sys.argv[1]))["benchmarks"]:
    print(json.dumps(case["extra_info"]))' "$OUT/input.partial" >"$OUT/input_lines.partial"
    mv "$OUT/input_lines.partial" "$OUT/input.jsonl"
    rm "$OUT/input.partial"
fi
if wanted soak; then
    into soak
    "$PYTHON" -m benchmarks.soak_input "$SHARED"/videos/{test,demo,part_0}.mp4 | tee -a "$OUT/soak.partial"
    keep soak
fi
"$PYTHON" -m benchmarks.report "$OUT"
