#!/usr/bin/env bash
# usage: tools/slurm_test.sh PARTITION JOB_NAME CONFIG [CHECKPOINT] [options]
# Without CHECKPOINT what was published for the config is tested. The options are
# those of test.py; the environment: see slurm_run.sh.
if [ $# -lt 3 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG [CHECKPOINT] [options]" >&2
    exit 2
fi
TOOLS=$(dirname "$0")
exec "$TOOLS/slurm_run.sh" "$1" "$2" "$TOOLS/test.py" "${@:3}"
