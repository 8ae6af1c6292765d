#!/usr/bin/env bash
# Everything only a GPU can show, in parts meant to take under ten minutes each on an H200:
#
#   bash benchmarks/gpu.sh [tests|kernels|attention|step|teacher|profile|all]   OUT=folder (default benchmarks/results/new)
#
#   tests      the kernel tests, native: values and gradients against float64, compile, sampling statistics; then the steps
#              that never make the host wait and recorded steps beside eager ones
#   kernels    every operation at B/16 and L/16: GB/s, share of the copy rate, against plain, compiled and textbook roads
#   attention  every attention road at the token counts of student, teacher and classifier
#   step       whole stage-1 steps: fast, fast compiled and plain road at several batch sizes, with peak memory
#   teacher    the teacher in each of its precisions
#   profile    where a step spends its time
#
# Each writes into OUT beside machine.json (the device, its measured matmul and copy rates) and renews table.md and plot.svg;
# figures of one table come from one process, so their ratios hold. A part can be cut short: lines written so far count.
# A test that fails keeps no other part from running, but shows in the exit status.
#
# kernels and attention need torch, triton and pytest, tests also hypothesis; the other parts run umt_fast's step and need
# numpy and safetensors too. flash-attn and xformers are timed where they are installed. PYTHON or UMT_PYTHON chooses the interpreter
# (else .venv's, where the recipes made one), UMT_BATCHES the batch sizes. UMT_SIZES="tiny" tries the script on any machine, UMT_SIZES="l16" does one size alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
part=${1:-all}
case $part in tests | kernels | attention | step | teacher | profile | all) ;; *)
    echo "benchmarks/gpu.sh: unknown part '$part'; choose tests, kernels, attention, step, teacher, profile or all" >&2
    exit 2
    ;;
esac
default=python3
[[ -x .venv/bin/python ]] && default=.venv/bin/python
PYTHON=${PYTHON:-${UMT_PYTHON:-$default}}
OUT=${OUT:-benchmarks/results/new}
SIZES=${UMT_SIZES:-b16 l16}
read -r -a BATCHES <<<"${UMT_BATCHES:-16 64 128}"
mkdir -p "$OUT"
wanted() { [[ $part == "$1" || $part == all ]]; }

"$PYTHON" -m benchmarks.machine >"$OUT/machine.json.partial"
mv "$OUT/machine.json.partial" "$OUT/machine.json"
failed=0
if wanted tests; then
    # Mostly Triton compiling: pytest-xdist, where it is installed, spreads that over the cores.
    "$PYTHON" -c 'import xdist' 2>/dev/null && spread=(-n 8 --dist worksteal) || spread=()
    "$PYTHON" -m pytest -q -p no:cacheprovider ${spread[@]+"${spread[@]}"} tests/kernels tests/objectives/test_one_graph.py ||
        failed=1
fi
for size in $SIZES; do
    if wanted kernels; then
        UMT_BENCH=$size "$PYTHON" -m benchmarks.bench_kernels "$OUT/kernels_$size.jsonl" \
            patch_gather token_gather gather_norm semantic_mask align_loss quantize_rows dequantize_product quantized_linear
    fi
    if wanted attention; then
        UMT_BENCH=$size "$PYTHON" -m benchmarks.bench_kernels "$OUT/attention_$size.jsonl" attention
    fi
    if wanted step; then
        "$PYTHON" -m benchmarks.steps "$size" "$OUT/steps_$size.jsonl" "${BATCHES[@]}"
    fi
    if wanted teacher; then
        "$PYTHON" -m benchmarks.teacher "$size" "$OUT/teacher_$size.jsonl"
    fi
    if wanted profile; then
        "$PYTHON" -m benchmarks.profile_step "$size" "$OUT/profile_$size.json" >"$OUT/profile_$size.txt"
    fi
done
"$PYTHON" -m benchmarks.report "$OUT"
exit "$failed"
