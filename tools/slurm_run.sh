#!/usr/bin/env bash
# What slurm_train.sh and slurm_test.sh have in common:
#     tools/slurm_run.sh PARTITION JOB_NAME SCRIPT [arguments of SCRIPT]
# starts GPUS processes of a Python script as one step of Slurm's. Environment:
#   GPUS            processes in all (8), one a GPU; over several nodes if need be
#   GPUS_PER_NODE   GPUs and processes a node (8, or GPUS where that is less);
#                   0: train on CPUs
#   TASKS_PER_NODE  processes a node, where it is not GPUS_PER_NODE
#   CPUS_PER_TASK   CPUs a process (5)
#   SRUN_ARGS       more options of srun
#   PY_ARGS         more options of SCRIPT, besides those given
#   MASTER_PORT, MASTER_ADDR  where the processes meet, if not where they agree to
if [ $# -lt 3 ]; then
    echo "usage: $0 PARTITION JOB_NAME SCRIPT [arguments]" >&2
    exit 2
fi
GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-$((GPUS < 8 ? GPUS : 8))}
TASKS_PER_NODE=${TASKS_PER_NODE:-$GPUS_PER_NODE}
LAYOUT=(--ntasks="$GPUS" --cpus-per-task="${CPUS_PER_TASK:-5}")
if [ "$GPUS_PER_NODE" -gt 0 ]; then
    LAYOUT+=(--gres="gpu:$GPUS_PER_NODE")
fi
if [ "$TASKS_PER_NODE" -gt 0 ]; then
    LAYOUT+=(--ntasks-per-node="$TASKS_PER_NODE")
fi
# SRUN_ARGS and PY_ARGS hold several words each.
# shellcheck disable=SC2086
exec srun -p "$1" \
    --job-name="$2" \
    "${LAYOUT[@]}" \
    --kill-on-bad-exit=1 \
    $SRUN_ARGS \
    python -u "$3" "${@:4}" --launcher slurm $PY_ARGS
