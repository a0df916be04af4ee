#!/usr/bin/env bash
# A control of the study: score a model, train it on gold answers or on a pair file, score it again, and report.
#
#   results/control.sh models/smollm2 'truthful_qa[:200]' runs/control_seed_0
#   results/control.sh models/smollm2 runs/pairs.json runs/form_seed_0
#
# MAX_STEPS, WARMUP_STEPS, LEARNING_RATE, SEED, MODEL_TYPE and the settings of evaluation.sh are as in the loop. After an
# interruption, run the same command again. DRY_RUN=1 prints the commands.
set -euo pipefail
HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd -P)
if [[ -z ${VIRTUAL_ENV:-} && -x $HERE/.venv/bin/python ]]; then PATH=$HERE/.venv/bin:$PATH; fi
model=${1:?the model} pairs=${2:?the gold answers, or a pair file} run=${3:?the folder of the run}
source=--dataset_name
if [[ $pairs == *.json ]]; then source=--dataset_path; fi

step() {
    if [[ ${DRY_RUN:-0} == 1 ]]; then printf '%q ' "$@" && echo; else "$@"; fi
}

step "$HERE/evaluation.sh" "$model" "$run/results/iter_0"
step accelerate launch --quiet --config_file "$HERE/accelerate_configs/one_gpu.yaml" \
    --num_cpu_threads_per_process "$(nproc)" "$HERE/dpo.py" "$source" "$pairs" --model_name_or_path "$model" \
    --output_dir "$run/models/iter_1_gold" --max_steps "${MAX_STEPS:-40}" --warmup_steps "${WARMUP_STEPS:-4}" \
    --learning_rate "${LEARNING_RATE:-5e-4}" --seed "${SEED:-0}" --save_steps 20 --model_type "${MODEL_TYPE:-auto}" \
    --report_to none
step "$HERE/evaluation.sh" "$run/models/iter_1_gold" "$run/results/iter_1"
step python "$HERE/results/study.py" "$run"
