#!/usr/bin/env bash
# Pretraining on a Cloud TPU VM or a whole pod slice: the same commands on every host of the TPU.
#
#     TPU=my-tpu ZONE=us-central2-b launch/tpu_vm/train.sh install
#     TPU=my-tpu ZONE=us-central2-b launch/tpu_vm/train.sh train --gin_file=gin/runs/quickstart.gin --run_dir=gs://mine/first
#     TPU=my-tpu ZONE=us-central2-b launch/tpu_vm/train.sh log | stop
set -euo pipefail
: "${TPU:?name of the TPU}" "${ZONE:?its zone}"
PROJECT_DIR=${PROJECT_DIR:-$(cd "$(dirname "$0")/../.." && pwd)}

on_every_host() {
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="${WORKER:-all}" --command="$1"
}

action=${1:?install, train, log or stop}; shift
case $action in
    install) # copies the working tree as git knows it, and installs it with the TPU runtime
        archive=$(mktemp --suffix=.tar.gz)
        git -C "$PROJECT_DIR" archive --format=tar.gz -o "$archive" HEAD
        gcloud compute tpus tpu-vm scp "$archive" "$TPU:mlm.tar.gz" --zone="$ZONE" --worker=all
        rm "$archive"
        on_every_host 'mkdir -p mlm && tar -xzf mlm.tar.gz -C mlm && cd mlm &&
            python3 -m venv .venv && .venv/bin/pip install -q -U pip && .venv/bin/pip install -q -e . "jax[tpu]"'
        ;;
    train)
        on_every_host "cd mlm && (setsid nohup .venv/bin/mlm train $(printf '%q ' "$@") >train.log 2>&1 </dev/null &
            echo \$! >train.pid)"
        ;;
    log) WORKER=0 on_every_host 'tail -n 50 -f mlm/train.log' ;;
    stop) on_every_host 'kill -TERM "$(cat mlm/train.pid)"' ;; # saves a checkpoint and ends
    *) sed -n '4,6p' "$0" | cut -c3- >&2; exit 2 ;;
esac
