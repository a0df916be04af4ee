#!/usr/bin/env bash
# Stage 4 of GRATH: Open LLM Leaderboard scores through lm-evaluation-harness.
#
#   ./evaluation.sh MODEL_OR_ADAPTER [OUTPUT_DIR]   score a hub name, a model folder or a LoRA adapter's folder
#   ./evaluation.sh                                 score the newest run's rounds that have no scores yet; what is not
#                                                   set is then as in that run: PRECISION, LIMIT, BACKEND, CHAT_TEMPLATE
#
# Environment:
#   TASKS          tasks, separated by blanks    (arc_challenge hellaswag mmlu truthfulqa_mc1 truthfulqa_mc2)
#   BATCH_SIZE     requests at once              (16, as in the paper's commands)
#   PRECISION      auto, fp32, fp16 or bf16      (auto: fp16 on a CUDA GPU, fp32 on a CPU)
#   LIMIT          questions a task              (all)
#   BACKEND        hf-shared: every context is computed once; hf: the harness's own way   (hf-shared)
#   CHAT_TEMPLATE  1: ask inside the chat tags, which the leaderboard does not           (0)
#   DATASETS_ROOT  a folder that ./prefetch.sh has filled: nothing is asked of the hub    (none)
#   NUM_PROCESSES  processes, one a GPU          (1)
#   RUNS_DIR       where runs are                (runs)
#   DRY_RUN        1: look at the model, print the commands and run none
set -euo pipefail

HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
if [[ -z ${VIRTUAL_ENV:-} && -x $HERE/.venv/bin/python ]]; then PATH=$HERE/.venv/bin:$PATH; fi
export PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}"
export LMEVAL_LOG_LEVEL="${LMEVAL_LOG_LEVEL:-WARNING}"

given=" ${PRECISION+PRECISION} ${LIMIT+LIMIT} ${BACKEND+BACKEND} ${CHAT_TEMPLATE+CHAT_TEMPLATE} "
TASKS="${TASKS-arc_challenge hellaswag mmlu truthfulqa_mc1 truthfulqa_mc2}"
BATCH_SIZE="${BATCH_SIZE:-16}"
PRECISION="${PRECISION:-auto}"
RUNS_DIR="${RUNS_DIR:-runs}"
LIMIT="${LIMIT:-}"
BACKEND="${BACKEND:-hf-shared}"
CHAT_TEMPLATE="${CHAT_TEMPLATE:-0}"
NUM_PROCESSES="${NUM_PROCESSES:-1}"
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

# score MODEL OUTPUT_DIR: one call of the harness for tasks that ask the same (MC1 and MC2), one result file a task.
score() {
    local model=$1 output=$2 described task key started=" " launch=(python)
    local describe=(
        python -m grath.harness describe --precision "$PRECISION" --num_processes "$NUM_PROCESSES" --backend "$BACKEND"
    )
    if [[ $DRY_RUN != 1 ]]; then
        describe+=("--output=$output" "--tasks=$TASKS" --limit "$LIMIT" --chat_template "$CHAT_TEMPLATE")
    fi
    described=$("${describe[@]}" -- "$model")
    if [[ $DRY_RUN != 1 ]]; then output=$(cd -- "$output" && pwd); fi
    if ((NUM_PROCESSES > 1)); then
        launch=(
            accelerate launch --quiet --config_file "$HERE/accelerate_configs/data_parallel.yaml"
            --num_processes "$NUM_PROCESSES"
        )
    fi
    for task in "${tasks[@]}"; do
        key=${task%_mc[12]}
        if [[ $started == *" $key "* ]]; then continue; fi
        started+="$key "
        local group=() other
        for other in "${tasks[@]}"; do
            if [[ ${other%_mc[12]} != "$key" ]]; then continue; fi
            if [[ -f $output/$other.json ]]; then echo "$output/$other.json is there"; else group+=("$other"); fi
        done
        if ((${#group[@]} == 0)); then continue; fi
        local command=(
            "${launch[@]}" -m grath.harness run --model "$BACKEND" --model_args "$described"
            --tasks "${group[@]}" --num_fewshot "$(shots "$task")" --batch_size "$BATCH_SIZE"
            --include_path "$HERE/tasks" --output_path "$output/.partial/results.json" ${LIMIT:+--limit "$LIMIT"}
        )
        if [[ $CHAT_TEMPLATE == 1 ]]; then command+=(--apply_chat_template --fewshot_as_multiturn true); fi
        printf '%q ' "${command[@]}" && echo
        if [[ $DRY_RUN == 1 ]]; then continue; fi
        rm -rf -- "$output/.partial"
        (cd -- "${DATASETS_ROOT:-.}" && "${command[@]}")
        local results=("$output"/.partial/results_*.json)
        if [[ ! -f ${results[0]} ]]; then
            echo "evaluation.sh: error: the harness wrote no results for ${group[*]}: see above" >&2
            exit 1
        fi
        python -m grath.harness split "${results[0]}" "$output"
        for other in "${group[@]}"; do
            if [[ ! -f $output/$other.json ]]; then
                echo "evaluation.sh: error: $other is no task with a score of its own: name its tasks in TASKS" >&2
                exit 2
            fi
        done
        rm -rf -- "$output/.partial"
    done
}

IFS=$' \t\n' read -r -d '' -a tasks <<<"$TASKS" || true
for name in DRY_RUN CHAT_TEMPLATE; do
    [[ ${!name} == [01] ]] || usage "$name must be 0 or 1, not '${!name}'"
done
[[ $BACKEND == hf || $BACKEND == hf-shared ]] || usage "BACKEND must be hf or hf-shared, not '$BACKEND'"
[[ $NUM_PROCESSES =~ ^[1-9][0-9]{0,8}$ ]] || usage "NUM_PROCESSES must be a whole number of at least 1, not '$NUM_PROCESSES'"
[[ $BATCH_SIZE =~ ^([1-9][0-9]{0,8}|auto(:[1-9][0-9]{0,8})?)$ ]] || usage "BATCH_SIZE must be a whole number or auto, not '$BATCH_SIZE'"
[[ $LIMIT =~ ^([1-9][0-9]{0,8}|0?\.[0-9]+)?$ ]] || usage "LIMIT must be a number of questions or a share below 1, not '$LIMIT'"
if [[ -n ${DATASETS_ROOT:-} ]]; then
    [[ -d $DATASETS_ROOT ]] || usage "DATASETS_ROOT: there is no folder '$DATASETS_ROOT'"
    DATASETS_ROOT=$(cd -- "$DATASETS_ROOT" && pwd)
    export DATASETS_ROOT HF_HUB_OFFLINE=1
fi
if ((${#tasks[@]} == 0)); then usage "TASKS names no task"; fi
if (($# > 2)); then usage "too many arguments"; fi
if (($# > 0)); then
    if [[ -z $1 || $1 == -* ]]; then usage "'$1' is no model"; fi
    name=${1%/}
    output=${2:-scores/${name##*/}}
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
    for name in PRECISION LIMIT BACKEND CHAT_TEMPLATE; do
        IFS= read -r -d '' value <&3
        if [[ $given != *" $name "* && -n $value ]]; then printf -v "$name" %s "$value"; fi
    done
    if [[ $DRY_RUN != 1 ]]; then
        # The loop must not be at work in the same folder.
        exec 9<>"$(dirname -- "$run")/.${run##*/}.lock"
        python -m grath.supervise lock "$run" --lock_fd 9
    fi
    while IFS= read -r -d '' model <&3 && IFS= read -r -d '' output <&3; do
        score "$model" "$output"
    done
} 3<"$list"
if [[ $DRY_RUN != 1 ]]; then python -m grath.report -- "$run"; fi
