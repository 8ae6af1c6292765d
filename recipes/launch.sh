# Sourced by the recipes before environment.sh, so that what is missing is said before an environment is made.
# `launch ARGUMENTS` runs `python -m umt_fast ARGUMENTS`, one process per GPU. `require_page NAME` looks for a recipe page.
#
#   NGPU=8 NNODES=4 NODE_RANK=i MASTER_ADDR=host
#
# Under Slurm (`srun --ntasks-per-node=1 bash recipes/...`, or the same inside sbatch) the number of nodes, this node's rank
# and the first node's name come from Slurm. Without a GPU it runs on the CPU.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
NNODES=${NNODES:-${SLURM_NNODES:-1}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
if [ -z "${MASTER_ADDR:-}" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi
[ "$NNODES" -eq 1 ] ||
    : "${MASTER_ADDR:?with NNODES > 1 set MASTER_ADDR to the name of the first node (Slurm sets it by itself)}"

require_page() {
    [ -f "$ROOT/recipes/$1.py" ] && return
    echo "$0: no recipe page $1.py beside it; there are $(cd "$ROOT/recipes" && ls ./*.py | sed 's,^\./,,; s,\.py$,,' | xargs)" >&2
    exit 2
}

launch() {
    if [ -z "${NGPU:-}" ]; then
        NGPU=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)
        [ "$NGPU" -gt 0 ] || NGPU=1
    fi
    if [ "$NNODES" -eq 1 ] && [ "$NGPU" -eq 1 ]; then
        exec "$PYTHON" -m umt_fast "$@"
    elif [ "$NNODES" -eq 1 ]; then
        exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NGPU" -m umt_fast "$@"
    fi
    exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$NGPU" \
        --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" -m umt_fast "$@"
}
