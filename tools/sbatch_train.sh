#!/usr/bin/env bash
# A training that goes on by itself after preemption, requeue and time limit:
#     sbatch [options of sbatch] tools/sbatch_train.sh CONFIG [options of train.py]
# Options given to sbatch override those below. For CPUs: --gres=none.
# Run it from the repository: Slurm copies this script elsewhere.
#SBATCH --job-name=mmvssm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=5
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# To the tasks, 300 seconds before the time is up. An iteration and a save must fit.
#SBATCH --signal=USR1@300
if [ $# -lt 1 ]; then
    echo "usage: sbatch [options] $0 CONFIG [options of train.py]" >&2
    exit 2
fi
# One port a job, so that two can share a node.
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 40000))}
srun --kill-on-bad-exit=0 \
    python -u tools/train.py "$1" --launcher slurm --resume auto "${@:2}"
code=$?
# What PreemptionHook exits with once it has saved.
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
