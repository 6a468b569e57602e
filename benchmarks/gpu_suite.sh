#!/usr/bin/env bash
# Tests and measurements on a GPU: gpu_suite.sh [--wheels DIR] [arguments of gpu_suite.py]
#
# Needs a Python with a CUDA build of torch (PYTHON names another than python3).
# What else mmvssm needs and this Python lacks (mmengine and its needs) is taken
# from the wheels in DIR, without a network and without touching the installation.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

wheels=
arguments=()
while (($#)); do
    case $1 in
        --wheels) wheels=${2:?--wheels needs a folder}; shift 2 ;;
        --wheels=*) wheels=${1#*=}; shift ;;
        *) arguments+=("$1"); shift ;;
    esac
done

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
if [[ -n $wheels ]]; then
    shopt -s nullglob
    found=("$wheels"/*.whl)
    ((${#found[@]})) || { echo "error: no wheels in $wheels" >&2; exit 2; }
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps \
        --no-compile --no-cache-dir --target "$site" "${found[@]}"
    # Behind all else: what is installed is not replaced.
    export PYTHONPATH=$PYTHONPATH:$site
fi
missing=$("$python" -c 'import mmvssm' 2>&1) || {
    echo "error: mmvssm cannot be imported by $python (PYTHON names another); bring" \
         "wheels of what is missing (--wheels DIR): $(tail -n 1 <<<"$missing")" >&2
    exit 2
}
"$python" "$root/benchmarks/gpu_suite.py" ${arguments[@]+"${arguments[@]}"}
