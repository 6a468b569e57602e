#!/usr/bin/env bash
# usage: tools/slurm_train.sh PARTITION JOB_NAME CONFIG [WORK_DIR] [options]
# The options are those of train.py; the environment: see slurm_run.sh.
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
TOOLS=$(dirname "$0")
exec "$TOOLS/slurm_run.sh" "$PARTITION" "$JOB_NAME" \
    "$TOOLS/train.py" "$CONFIG" "${WORK_DIR[@]}" "$@"
