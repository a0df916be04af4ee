#!/usr/bin/env bash
# GRATH on Zephyr-7B-beta, against the last round's model (rolling reference).
#
#   ./run_zephyr.sh                 needs a CUDA GPU, the model and the data sets (hub names or local folders)
#   DRY_RUN=1 ./run_zephyr.sh       prints the commands and runs none
#   SEED=1 ROUNDS=1 ./run_zephyr.sh any setting of run_grath.sh can be set; the values below are the paper's
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

export RUN_NAME="${RUN_NAME:-zephyr}"
export MODEL_NAME_OR_PATH="${MODEL_NAME_OR_PATH:-HuggingFaceH4/zephyr-7b-beta}"
export MODEL_TYPE="${MODEL_TYPE:-zephyr}"
export NUM_QUERY="${NUM_QUERY:-1119}" # all of ARC-Challenge's train split
export REFERENCE="${REFERENCE:-rolling}"
export ROUNDS="${ROUNDS:-2}"
export MAX_STEPS="${MAX_STEPS:-500}"
export WARMUP_STEPS="${WARMUP_STEPS:-100}"
export LEARNING_RATE="${LEARNING_RATE:-5e-4}"

exec "$HERE/run_grath.sh"
