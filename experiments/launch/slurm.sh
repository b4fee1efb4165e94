#!/usr/bin/env bash
#SBATCH --job-name=pretrain
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# Trains on GPUs under Slurm, from the folder of this project, in whose environment you are:
#
#   sbatch --nodes=16 --cpus-per-task=16 experiments/launch/slurm.sh \
#     --config=configs/baichuan2_7b.py --config.mesh.replica=16 --workdir=/shared/my-run
#
# What stands above is the default, and sbatch's own flags go before the script. JAX recommends one
# process for each GPU, with an equal share of the node's CPUs (--cpus-per-task); one process for
# each node is --ntasks-per-node=1. GPUs must stay visible to all tasks of a node: neither
# --gpus-per-task nor --gpu-bind. PYTHON is the interpreter, `python` by default.
set -euo pipefail

if [ $# = 0 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "usage: sbatch [--nodes=N] experiments/launch/slurm.sh --config=... --workdir=..." >&2
    exit 2
fi

# The planner counts on this share of a GPU's memory (baichuan_jax/parallel/chips.py).
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.93}

# srun does not take the CPUs over from sbatch. One lost process stops all; the job run again goes
# on from the last checkpoint.
srun --kill-on-bad-exit=1 --label ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
    "${PYTHON:-python}" -m experiments.pretrain --coordinator=auto "$@"
