#!/usr/bin/env bash
# GRATH on Zephyr-7B-beta, with the last iteration's model as the reference model (rolling).
#
#   ./run_zephyr.sh                 needs a CUDA GPU, the model and the data sets (from the hub or DATASETS_ROOT)
#   DRY_RUN=1 ./run_zephyr.sh       print the commands and run none
#   SEED=1 ITERATIONS=1 ./run_zephyr.sh set anything in docs/configuration.md; the values below are the paper's
#
# With Slurm: sbatch ./run_zephyr.sh
#SBATCH --job-name=grath-zephyr
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --output=zephyr_%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
# Two minutes before its time limit, the job ends its stage and requeues itself; it then resumes where it stopped.
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd -P)
# Slurm runs a copy of this file; the project is the folder in which sbatch was called.
if [[ ! -f $HERE/run_grath.sh ]]; then HERE=${SLURM_SUBMIT_DIR:-$HERE}; fi
if [[ ! -f $HERE/run_grath.sh ]]; then
    echo "run_zephyr.sh: error: call sbatch in the project's folder, not in $HERE" >&2
    exit 2
fi

export RUN_NAME="${RUN_NAME:-zephyr}"
export MODEL_NAME_OR_PATH="${MODEL_NAME_OR_PATH:-HuggingFaceH4/zephyr-7b-beta}"
# Another model has a chat template of its own.
if [[ ${MODEL_NAME_OR_PATH##*/} == zephyr-7b-* ]]; then export MODEL_TYPE="${MODEL_TYPE:-zephyr}"; fi
export NUM_QUERY="${NUM_QUERY:-1119}" # all of ARC-Challenge's train split
export REFERENCE="${REFERENCE:-rolling}"
export ITERATIONS="${ITERATIONS:-2}"
export MAX_STEPS="${MAX_STEPS:-500}"
export WARMUP_STEPS="${WARMUP_STEPS:-100}"
export LEARNING_RATE="${LEARNING_RATE:-5e-4}"

exec "$HERE/run_grath.sh" "$@"
