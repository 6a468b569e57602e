#!/usr/bin/env bash
# usage: tools/dist_train.sh CONFIG NUM_PROCESSES [options of train.py]
# On several machines: NNODES=2 NODE_RANK=0 MASTER_ADDR=first-host PORT=29500, see
# dist_run.sh.
if [ $# -lt 2 ]; then
    echo "usage: $0 CONFIG NUM_PROCESSES [options of train.py]" >&2
    exit 2
fi
TOOLS=$(dirname "$0")
exec "$TOOLS/dist_run.sh" "$2" "$TOOLS/train.py" "$1" --launcher pytorch "${@:3}"
