#!/usr/bin/env bash
# Stage 1 or 2 as a Slurm job that puts itself back into the queue until it is done.
#
#   DATA=train.csv OUT=runs/k710 sbatch --nodes 4 recipes/slurm.sh stage1_k710 [--section.key value ...]
#   WEBVID2M=.. CC3M=.. INIT=.. OUT=runs/stage2 sbatch recipes/slurm.sh stage2_5m           # likewise stage2_17m, stage2_25m
#
# The first word names a launcher beside this file; its variables come from the environment, which sbatch passes on. One
# launcher runs on each node, with one process per GPU (launch.sh). Options of sbatch on the command line come before those here.
#
# Two minutes before the time limit Slurm sends USR1 to this script, which has SIGTERM sent to the launchers. The trainer saves at
# its next log step and ends, the job goes back into the queue, and the next start continues there. A preempted job gets SIGTERM
# and its place in the queue from Slurm itself. A job that fails, or is canceled, is not queued again. OUT must be on a disk
# that all nodes share.
#SBATCH --job-name=umt_fast
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail
# sbatch runs a copy of this script from its own folder: the repository is where it was submitted, or UMT_ROOT.
ROOT=${UMT_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}
recipe=${1:?name a launcher: stage1_k710, stage2_5m, stage2_17m or stage2_25m}
shift
if [ ! -f "$ROOT/recipes/$recipe.sh" ]; then
    echo "recipes/slurm.sh: no launcher at $ROOT/recipes/$recipe.sh; submit from the repository or set UMT_ROOT" >&2
    exit 2
fi

# torchrun kills workers that have not ended half a minute after SIGTERM; a save may take longer. Releases without this setting
# keep to the half minute.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}

told=0
srun --kill-on-bad-exit=1 bash "$ROOT/recipes/$recipe.sh" "$@" &
step=$!
# Not to srun, which would kill its tasks at once: scancel with a signal reaches the tasks, and not this script.
trap 'told=1; scancel --signal=TERM "$SLURM_JOB_ID" || true' USR1

# A trapped signal ends `wait` early, before anything is saved: wait until srun is gone.
while true; do
    status=0
    wait "$step" || status=$?
    kill -0 "$step" 2>/dev/null || break
done

if [ "$told" -eq 1 ]; then
    echo "recipes/slurm.sh: time is up; job $SLURM_JOB_ID goes back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
