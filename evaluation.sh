#!/usr/bin/env bash
# Stage 4 of GRATH: Open LLM Leaderboard scores through lm-evaluation-harness.
#
#   ./evaluation.sh MODEL_OR_ADAPTER [OUTPUT_DIR]   score a hub name, a model folder or a LoRA adapter's folder
#   ./evaluation.sh                                 score the newest run's rounds that have no scores yet
#
# Environment:
#   TASKS       tasks, separated by blanks  (arc_challenge hellaswag mmlu truthfulqa_mc1 truthfulqa_mc2)
#   BATCH_SIZE  requests at once            (16, as in the paper's commands)
#   PRECISION   auto, fp32, fp16 or bf16    (auto: fp16 on a CUDA GPU, fp32 on a CPU)
#   LIMIT       questions a task            (all)
#   RUNS_DIR    where runs are              (runs)
#   DRY_RUN     1: print the commands and run none
set -euo pipefail

HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
if [[ -z ${VIRTUAL_ENV:-} && -x $HERE/.venv/bin/python ]]; then PATH=$HERE/.venv/bin:$PATH; fi
export PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}"
export LMEVAL_LOG_LEVEL="${LMEVAL_LOG_LEVEL:-WARNING}"

TASKS="${TASKS-arc_challenge hellaswag mmlu truthfulqa_mc1 truthfulqa_mc2}"
BATCH_SIZE="${BATCH_SIZE:-16}"
PRECISION="${PRECISION:-auto}"
RUNS_DIR="${RUNS_DIR:-runs}"
LIMIT="${LIMIT:-}"
DRY_RUN="${DRY_RUN:-0}"

usage() {
    echo "evaluation.sh: error: $1; usage: ./evaluation.sh MODEL_OR_ADAPTER [OUTPUT_DIR]" >&2
    exit 2
}

# Few-shot examples of the Open LLM Leaderboard; other tasks, the bundled ones included, are asked without.
shots() {
    case $1 in
        arc_challenge) echo 25 ;;
        hellaswag) echo 10 ;;
        mmlu) echo 5 ;;
        *) echo 0 ;;
    esac
}

# score MODEL OUTPUT_DIR: one call of the harness for the tasks of equal shots, one result file a call.
score() {
    local model=$1 output=$2 settings model_args count task file
    model_args=$(python -m grath.harness --precision "$PRECISION" -- "$model")
    settings="$model_args limit=$LIMIT"
    if [[ $DRY_RUN != 1 ]]; then
        if [[ -f $output/settings.txt && $(<"$output/settings.txt") != "$settings" ]]; then
            echo "evaluation.sh: error: $output holds scores of $(<"$output/settings.txt"): choose another folder" >&2
            exit 2
        fi
        mkdir -p -- "$output"
        printf '%s\n' "$settings" >"$output/settings.txt"
    fi
    for count in 25 10 5 0; do
        local group=()
        for task in "${tasks[@]}"; do
            if [[ $(shots "$task") == "$count" ]]; then group+=("$task"); fi
        done
        if ((${#group[@]} == 0)); then continue; fi
        file=$output/$(IFS=+ && echo "${group[*]}").json
        if [[ -f $file ]]; then
            echo "$file is there"
            continue
        fi
        local command=(
            python -m lm_eval run --model hf --model_args "$model_args" --tasks "${group[@]}"
            --num_fewshot "$count" --batch_size "$BATCH_SIZE" --include_path "$HERE/tasks"
            --output_path "$output/.partial/results.json" ${LIMIT:+--limit "$LIMIT"}
        )
        printf '%q ' "${command[@]}" && echo
        if [[ $DRY_RUN == 1 ]]; then continue; fi
        rm -rf -- "$output/.partial"
        "${command[@]}"
        local results=("$output"/.partial/results_*.json)
        if [[ ! -f ${results[0]} ]]; then
            echo "evaluation.sh: error: the harness wrote no results for ${group[*]}" >&2
            exit 1
        fi
        mv -- "${results[0]}" "$file"
        rm -rf -- "$output/.partial"
    done
}

read -r -a tasks <<<"$TASKS"
[[ $DRY_RUN == [01] ]] || usage "DRY_RUN must be 0 or 1, not '$DRY_RUN'"
if ((${#tasks[@]} == 0)); then usage "TASKS names no task"; fi
if (($# > 2)); then usage "too many arguments"; fi
if (($# > 0)); then
    if [[ -z $1 || $1 == -* ]]; then usage "'$1' is no model"; fi
    name=${1%/}
    output=${2:-results/${name##*/}}
    score "$1" "$output"
    if [[ $DRY_RUN != 1 ]]; then
        python -m grath.report -- "$output"
        echo "Wrote the results to $output"
    fi
    exit
fi

list=$(mktemp)
trap 'rm -f -- "$list"' EXIT
python -m grath.report --pending --tasks "${tasks[@]}" -- "$RUNS_DIR" >"$list"
{
    IFS= read -r -d '' run <&3
    while IFS= read -r -d '' model <&3 && IFS= read -r -d '' output <&3; do
        score "$model" "$output"
    done
} 3<"$list"
if [[ $DRY_RUN != 1 ]]; then python -m grath.report -- "$run"; fi
