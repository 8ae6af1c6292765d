#!/usr/bin/env bash
# Everything only a GPU can show, in parts of under ten minutes each:
#
#   bash benchmarks/gpu.sh [tests|kernels|step|all]     OUT=folder for the figures (default benchmarks/results/new)
#
#   tests     the kernel tests, native: values and gradients against float64, compile, sampling statistics
#   kernels   bench_kernels.py at B/16 and L/16: GB/s, share of the copy rate, against plain, compiled and textbook roads
#   step      bench_stage1.py, B/16 and L/16, fast and plain road, several batch sizes; a profile of the B/16 step
#
# Needs torch, triton, pytest and pytest-benchmark alone; flash-attn and xformers are timed where they are installed.
# PYTHON chooses the interpreter. UMT_SIZES="tiny" tries the script on any machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
part=${1:-all}
case $part in tests | kernels | step | all) ;; *)
    echo "benchmarks/gpu.sh: unknown part '$part'; choose tests, kernels, step or all" >&2
    exit 2
    ;;
esac
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results/new}
SIZES=${UMT_SIZES:-b16 l16}
mkdir -p "$OUT"
run() { "$PYTHON" -m pytest -q -p no:cacheprovider "$@"; }

"$PYTHON" - >"$OUT/machine.json" <<'PY'
import json, platform, torch, triton
gpu = torch.cuda.is_available()
print(json.dumps({
    "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
    "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
}))
PY

if [[ $part == tests || $part == all ]]; then
    run tests/kernels
fi
if [[ $part == kernels || $part == all ]]; then
    for size in $SIZES; do
        UMT_BENCH=$size run benchmarks/bench_kernels.py --benchmark-json="$OUT/kernels_$size.json" --benchmark-columns=median
    done
fi
if [[ $part == step || $part == all ]]; then
    for size in $SIZES; do
        for batch in ${UMT_BATCHES:-16 64}; do
            UMT_BENCH=$size UMT_BENCH_BATCH=$batch run benchmarks/bench_stage1.py \
                --benchmark-json="$OUT/step_${size}_$batch.json" --benchmark-columns=median
        done
    done
    "$PYTHON" -m benchmarks.profile_step "${SIZES%% *}" >"$OUT/profile.txt"
fi
"$PYTHON" -m benchmarks.report "$OUT" | tee "$OUT/table.md"
