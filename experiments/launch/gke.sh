#!/usr/bin/env bash
# Trains on Google Kubernetes Engine, with JobSet in the cluster, on slices of TPUs or nodes of GPUs:
#
#   export NAME=my-run IMAGE=us-docker.pkg.dev/project/images/baichuan_jax:tpu
#   ACCELERATOR=tpu-v5p-slice TOPOLOGY=4x4x8 SLICES=2 experiments/launch/gke.sh tpu \
#     --config=configs/baichuan2_7b.py --workdir=gs://bucket/my-run
#   ACCELERATOR=nvidia-h200-141gb NODES=16 experiments/launch/gke.sh gpu \
#     --config=configs/baichuan2_13b.py --config.mesh.replica=16 --workdir=gs://bucket/my-run
#
# CHIPS is of a TPU host or GPUs of a node (4, 8), RESTARTS how often a failed run goes on by itself
# from its last checkpoint (10). SHOW=1 prints the manifest instead of applying it.
set -euo pipefail

kind=${1:-}
if [ $# -lt 2 ] || { [ "$kind" != tpu ] && [ "$kind" != gpu ]; }; then
    sed -n '2,/^set -/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
shift
: "${NAME:?is the name of the job: export NAME=...}"
: "${IMAGE:?is the image, built of experiments/launch/Dockerfile}"
: "${ACCELERATOR:?is the label of the node pools, such as tpu-v5p-slice or nvidia-h100-80gb}"
if [ "$kind" = tpu ]; then
    : "${TOPOLOGY:?is that of a slice, such as 4x4x8}"
    export CHIPS=${CHIPS:-4} SLICES=${SLICES:-1}
    HOSTS=$((${TOPOLOGY//x/*} / CHIPS))
    if [ "$HOSTS" = 0 ]; then
        echo "TOPOLOGY=$TOPOLOGY has fewer chips than CHIPS=$CHIPS of a host." >&2
        exit 2
    fi
    export HOSTS
else
    : "${NODES:?is how many nodes there are}"
    export CHIPS=${CHIPS:-8}
fi
export RESTARTS=${RESTARTS:-10}

# The flags become a list in JSON, which is YAML, too.
# shellcheck disable=SC2016  # of Python, not of the shell
manifest=$(python3 -c '
import json, os, re, sys
values = os.environ | {"FLAGS": json.dumps(sys.argv[2:])}
manifest = open(sys.argv[1], encoding="utf-8").read()
print(re.sub(r"\$([A-Z]+)", lambda name: values[name[1]], manifest))
' "$(dirname "$0")/gke_$kind.yaml" "$@")
if [ -n "${SHOW:-}" ]; then
    echo "$manifest"
else
    kubectl apply -f - <<< "$manifest"
fi
