#!/usr/bin/env bash
# Runs one command as N cooperating processes on this machine.
#
#     launch/local/run.sh N [-d DEVICES] [-l DIRECTORY] COMMAND...
#
#   N             processes
#   -d DEVICES    CPU devices that each process pretends to have (without it: the machine's real devices)
#   -l DIRECTORY  where processes 1, 2, … write their output (process 0 writes to this screen); default: a temporary one
#
# Ctrl-C and SIGTERM are passed on to all processes. When one process fails, the others are stopped and the exit code is
# that of the one that failed first.
set -euo pipefail

usage() { sed -n '4,8p' "$0" | cut -c3- >&2; exit 2; }

[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || usage
processes=$1; shift
logs=""
while getopts "d:l:" option; do
    case $option in
        d) export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$OPTARG ;;
        l) logs=$OPTARG ;;
        *) usage ;;
    esac
done
shift $((OPTIND - 1))
[[ $# -gt 0 ]] || usage
logs=${logs:-$(mktemp -d "${TMPDIR:-/tmp}/mlm-local.XXXXXX")}
mkdir -p "$logs"

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export MLM_COORDINATOR=127.0.0.1:$port MLM_PROCESS_COUNT=$processes

children=()
trap 'kill -TERM "${children[@]}" 2>/dev/null || true' INT TERM
for ((index = 0; index < processes; index++)); do
    if ((index == 0)); then
        MLM_PROCESS_ID=$index "$@" &
    else
        MLM_PROCESS_ID=$index "$@" >"$logs/process_$index.log" 2>&1 &
    fi
    children+=($!)
done

code=0
for ((left = processes; left > 0; left--)); do
    status=0
    wait -n || status=$?
    while ((status > 128)) && [[ $(jobs -rp | wc -l) -ge $left ]]; do # a signal interrupted the wait; nobody has ended
        status=0
        wait -n || status=$?
    done
    if ((status != 0 && code == 0)); then
        code=$status
        echo "a process ended with code $code; stopping the others (output: $logs/process_*.log)" >&2
        kill -TERM "${children[@]}" 2>/dev/null || true
    fi
done
exit $code
