#!/bin/bash
# Trains on one machine, on all of its GPUs, and goes on from the last checkpoint when it is started again:
#
#     scripts/one_node.sh --config gpt2_124m --parallel.zero 1
#
# One process drives all GPUs: a step is one program on all devices, and Python only starts it. So this needs no
# launcher. PROCESSES=8 starts eight, each with its share of the GPUs, which is how to try on one machine what runs
# on many nodes, and what to do where one process must not reach across sockets.
#
# The status is the first that was not 0, and what it means is in docs/parallel.md and docs/resuming.md.

set -u
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-.venv/bin/python}
processes=${PROCESSES:-1}

if [ "$processes" -eq 1 ]; then
    exec "$python" run.py "$@" --resume auto
fi

# A port that is free now, on which the processes meet.
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') || exit 2

# The GPUs by number: those of CUDA_VISIBLE_DEVICES, or else all that nvidia-smi lists; none on a machine without.
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    IFS=, read -r -a gpus <<<"$CUDA_VISIBLE_DEVICES"
else
    mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null)
fi
if [ $((${#gpus[@]} % processes)) -ne 0 ]; then
    echo "error: PROCESSES=$processes don't divide the ${#gpus[@]} GPUs evenly" >&2
    exit 2
fi
each=$((${#gpus[@]} / processes))

pids=()
for ((process = 0; process < processes; process++)); do
    if [ "$each" -gt 0 ]; then
        own=("${gpus[@]:process * each:each}")
        export CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${own[*]}")
    fi
    "$python" run.py "$@" --resume auto --parallel.coordinator "127.0.0.1:$port" \
        --parallel.processes "$processes" --parallel.process "$process" &
    pids+=($!)
done

# What this script is told is passed on: the processes agree on a step, save and end. (In a terminal Ctrl-C reaches them
# without it.)
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
trap 'kill -INT "${pids[@]}" 2>/dev/null' INT

status=0
for pid in "${pids[@]}"; do
    wait "$pid"
    own=$?
    while kill -0 "$pid" 2>/dev/null; do # a trapped signal has ended the wait, and the process goes on for a step
        wait "$pid"
        own=$?
    done
    if [ "$status" -eq 0 ]; then status=$own; fi
done
exit "$status"
