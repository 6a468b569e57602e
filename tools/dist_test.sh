#!/usr/bin/env bash
# usage: tools/dist_test.sh CONFIG [CHECKPOINT] NUM_PROCESSES [options of test.py]
# Without CHECKPOINT what was published for the config is tested.
# On several machines: NNODES=2 NODE_RANK=0 MASTER_ADDR=first-host PORT=29500, see
# dist_run.sh.
CONFIG=$1
shift
CHECKPOINT=()
if [ $# -gt 0 ] && ! [[ $1 =~ ^([0-9]+|auto|cpu|gpu)$ ]]; then
    CHECKPOINT=("$1")
    shift
fi
if [ $# -lt 1 ]; then
    echo "usage: $0 CONFIG [CHECKPOINT] NUM_PROCESSES [options of test.py]" >&2
    exit 2
fi
TOOLS=$(dirname "$0")
exec "$TOOLS/dist_run.sh" "$1" "$TOOLS/test.py" "$CONFIG" "${CHECKPOINT[@]}" \
    --launcher pytorch "${@:2}"
