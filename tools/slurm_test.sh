#!/usr/bin/env bash
# usage: tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options]
# Environment: GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5), SRUN_ARGS,
# PY_ARGS (options of test.py, besides those given), MASTER_PORT for jobs
# that share a machine. GPUS_PER_NODE=0 TASKS_PER_NODE=... runs on CPUs.
if [ $# -lt 4 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG CHECKPOINT [options]" >&2
    exit 2
fi
PARTITION=$1 JOB_NAME=$2 CONFIG=$3 CHECKPOINT=$4
shift 4
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
    python -u "$(dirname "$0")/test.py" "$CONFIG" "$CHECKPOINT" --launcher slurm \
    $PY_ARGS "$@"
