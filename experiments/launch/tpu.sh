#!/usr/bin/env bash
# Trains on Cloud TPU VMs: on one slice, or on several of one queued resource.
#
#   export NAME=my-run ZONE=us-east5-a                      # SLICES=2 for two; 1 by default
#   export ACCELERATOR=v5p-256 RUNTIME=v2-alpha-tpuv5       # for `create` alone
#   experiments/launch/tpu.sh create --spot                 # further flags are gcloud's
#   experiments/launch/tpu.sh install                       # the last commit, on every worker
#   experiments/launch/tpu.sh run --config=configs/baichuan2_7b.py --workdir=gs://bucket/my-run
#   experiments/launch/tpu.sh stop
#   experiments/launch/tpu.sh delete
#
# `create` waits in Google's queue (`gcloud compute tpus queued-resources list`). One slice that you
# made otherwise works, too. `run` shows the workers' output; if the connection breaks, `stop`, and
# `run` goes on from the last checkpoint.
set -euo pipefail

usage() {
    sed -n '2,/^set -/s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

case ${1:-} in
create | install | run | stop | delete) ;;
*) usage ;;
esac
: "${NAME:?is the name of the TPU: export NAME=...}"
: "${ZONE:?is its zone: export ZONE=...}"
slices=${SLICES:-1}
command=$1
shift

if [ "$slices" = 1 ]; then
    kind=tpu-vm
    workers=(--worker=all)
else
    kind=queued-resources
    workers=(--node=all --worker=all --batch-size=all) # all at once: they wait for each other
fi

everywhere() {
    gcloud compute tpus "$kind" ssh "$NAME" --zone="$ZONE" "${workers[@]}" --command="$1"
}

case $command in
create)
    : "${ACCELERATOR:?is the type of a slice, such as v5p-256 or v6e-256}"
    : "${RUNTIME:?is the version of the VM, such as v2-alpha-tpuv5 or v2-alpha-tpuv6e}"
    if [ "$slices" = 1 ]; then
        nodes=(--node-id="$NAME")
    else
        nodes=(--node-count="$slices" --node-prefix="$NAME")
    fi
    gcloud compute tpus queued-resources create "$NAME" --zone="$ZONE" "${nodes[@]}" \
        --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "$@"
    ;;
install)
    git diff --quiet HEAD || echo "What is not committed is left out." >&2
    archive=$(mktemp)
    trap 'rm -f "$archive"' EXIT
    git archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus "$kind" scp "$archive" "$NAME:baichuan_jax.tar.gz" --zone="$ZONE" \
        "${workers[@]}"
    everywhere "set -e
rm -rf baichuan_jax && mkdir baichuan_jax && tar -xzf baichuan_jax.tar.gz -C baichuan_jax
curl -LsSf https://astral.sh/uv/install.sh | sh
cd baichuan_jax && ~/.local/bin/uv venv --python 3.12 && ~/.local/bin/uv pip install -e '.[tpu]'"
    ;;
run)
    flags=$(printf ' %q' "$@")
    everywhere "cd baichuan_jax && .venv/bin/python -m experiments.pretrain --coordinator=auto$flags"
    ;;
stop)
    everywhere "pkill -f '[e]xperiments.pretrain' || true" # [e]: not this shell itself
    ;;
delete)
    gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force "$@"
    ;;
esac
