#!/usr/bin/env bash
# What dist_train.sh and dist_test.sh have in common:
#     tools/dist_run.sh NUM_PROCESSES SCRIPT [arguments of SCRIPT]
# starts so many processes of a Python script on this machine. Environment:
#   PORT         where the processes meet (on one machine: one that is free; on
#                several: 29500)
#   NNODES       machines, if there are several (1); each runs the same command
#   NODE_RANK    which of them this one is (0)
#   MASTER_ADDR  the address of machine 0
#   PYTHON       the interpreter (python)
fail() {
    echo "error: $1" >&2
    exit 2
}
if [ $# -lt 2 ]; then
    echo "usage: $0 NUM_PROCESSES SCRIPT [arguments]" >&2
    exit 2
fi
if ! [[ $1 =~ ^([1-9][0-9]*|auto|cpu|gpu)$ ]]; then
    fail "the number of processes is '$1': give a whole number, such as 8."
fi
PYTHON=${PYTHON:-python}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
if [ "$NNODES" = 1 ]; then
    ADVICE='leave PORT out, and a free one is taken'
else
    PORT=${PORT:-29500}
    ADVICE='set PORT to another one, the same on all machines'
    if [ "$NODE_RANK" != 0 ] && [ -z "$MASTER_ADDR" ]; then
        fail "NNODES=$NNODES without MASTER_ADDR: set it to the address of machine 0."
    fi
fi
if [ -z "$PORT" ]; then
    WHERE=(--standalone --local_addr=127.0.0.1)
else
    WHERE=(
        --nnodes="$NNODES"
        --node_rank="$NODE_RANK"
        --master_addr="${MASTER_ADDR:-127.0.0.1}"
        --master_port="$PORT"
    )
    # The processes would end in a traceback each.
    if [ "$NODE_RANK" = 0 ] && ! "$PYTHON" -c '
import socket, sys
try:
    socket.create_server(("", int(sys.argv[1]))).close()
except (OSError, OverflowError, ValueError):
    sys.exit(1)
' "$PORT"; then
        fail "port $PORT cannot be opened on this machine, perhaps because another job has it: $ADVICE."
    fi
fi
exec "$PYTHON" "$(dirname "$0")/torchrun.py" \
    "${WHERE[@]}" \
    --nproc_per_node="$1" \
    "${@:2}"
