#!/usr/bin/env bash
# A training that goes on by itself after preemption, requeue and time limit:
#     sbatch [options of sbatch] tools/sbatch_train.sh CONFIG [options of train.py]
# Options given to sbatch override those below: --nodes=4 for several nodes,
# --gres=none --ntasks-per-node=2 for CPUs. Submit it from the repository: Slurm
# copies this script elsewhere, and paths are relative to where you are.
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
# Preempted tasks end one after the other, each with its exit code: none may be
# killed because another was first. Where one crashed the others get 60 seconds.
# srun does not take the CPUs over from the job by itself, from Slurm 22.05 on.
srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    python -u tools/train.py "$1" --launcher slurm --resume auto "${@:2}"
code=$?
# What train.py exits with when it was told to stop: PreemptionHook has saved.
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
