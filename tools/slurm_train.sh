#!/usr/bin/env bash
# usage: tools/slurm_train.sh PARTITION JOB_NAME CONFIG [WORK_DIR] [options]
# Environment: GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5), SRUN_ARGS,
# PY_ARGS (options of train.py, besides those given), MASTER_PORT for jobs
# that share a machine. GPUS_PER_NODE=0 TASKS_PER_NODE=... runs on CPUs.
if [ $# -lt 3 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG [WORK_DIR] [options]" >&2
    exit 2
fi
PARTITION=$1 JOB_NAME=$2 CONFIG=$3
shift 3
WORK_DIR=()
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
    WORK_DIR=(--work-dir "$1")
    shift
fi
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
GRES=()
if [ "$GPUS_PER_NODE" -gt 0 ]; then
    GRES=(--gres="gpu:$GPUS_PER_NODE")
fi
# SRUN_ARGS and PY_ARGS hold several words each.
# shellcheck disable=SC2086
srun -p "$PARTITION" \
    --job-name="$JOB_NAME" \
    "${GRES[@]}" \
    --ntasks="${GPUS:-8}" \
    --ntasks-per-node="${TASKS_PER_NODE:-$GPUS_PER_NODE}" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    $SRUN_ARGS \
    python -u "$(dirname "$0")/train.py" "$CONFIG" --launcher slurm \
    "${WORK_DIR[@]}" $PY_ARGS "$@"
