#!/usr/bin/env bash
# usage: tools/dist_test.sh CONFIG CHECKPOINT NUM_PROCESSES [options of test.py]
# On several machines: NNODES=2 NODE_RANK=0 MASTER_ADDR=first-host PORT=29500
if [ $# -lt 3 ]; then
    echo "usage: $0 CONFIG CHECKPOINT NUM_PROCESSES [options of test.py]" >&2
    exit 2
fi
torchrun \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$3" \
    "$(dirname "$0")/test.py" "$1" "$2" --launcher pytorch "${@:4}"
