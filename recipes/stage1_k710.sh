#!/usr/bin/env bash
# Stage-1 pre-training on Kinetics-710, every hyper-parameter in stage1_k710.py beside this file.
#
#   DATA=train.csv OUT=runs/k710 [MODEL=b16|l16] [NGPU=8] [NNODES=4 NODE_RANK=i MASTER_ADDR=host] \
#       bash recipes/stage1_k710.sh [--section.key value ...]
#
# DATA is an official list (path,label) or a manifest written by `python -m umt_fast scan`.
# One process per GPU through torchrun. Under Slurm (`srun --ntasks-per-node=1 bash recipes/stage1_k710.sh`, or the same
# inside sbatch) the number of nodes, this node's rank and the first node's name come from Slurm. Without a GPU it runs on the CPU.
# Run it again to continue from the newest checkpoint in OUT.
set -euo pipefail
: "${DATA:?set DATA to a list of videos (path,label per line) or to a manifest}"
: "${OUT:?set OUT to the folder for checkpoints and metrics}"
source "$(dirname "$0")/environment.sh"

MODEL=${MODEL:-b16}
if [ -z "${NGPU:-}" ]; then
    NGPU=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)
    [ "$NGPU" -gt 0 ] || NGPU=1
fi
NNODES=${NNODES:-${SLURM_NNODES:-1}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
if [ -z "${MASTER_ADDR:-}" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi

COMMAND=(-m umt_fast train "$ROOT/recipes/stage1_k710.py:$MODEL" --data.train "$DATA" --run.out "$OUT" "$@")
if [ "$NNODES" -eq 1 ] && [ "$NGPU" -eq 1 ]; then
    exec "$PYTHON" "${COMMAND[@]}"
elif [ "$NNODES" -eq 1 ]; then
    exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NGPU" "${COMMAND[@]}"
fi
: "${MASTER_ADDR:?with NNODES > 1 set MASTER_ADDR to the first node's name (Slurm sets it by itself)}"
exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$NGPU" \
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" "${COMMAND[@]}"
