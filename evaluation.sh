#!/usr/bin/env bash
# Stage 4 of GRATH: Open LLM Leaderboard scores with lm-evaluation-harness.
#
#   ./evaluation.sh MODEL_OR_ADAPTER [OUTPUT_DIR]   score a hub name, a model folder or a LoRA adapter folder
#   ./evaluation.sh                                 score what the newest run has not scored yet, with its settings
#
# Settings (docs/configuration.md has all of them):
#   TASKS           tasks, separated by spaces   (arc_challenge hellaswag mmlu truthfulqa_mc1 truthfulqa_mc2)
#   EVAL_PRECISION  auto, fp32, fp16, bf16, int8, nf4, fp4       (auto: fp16 on a GPU, fp32 on a CPU)
#   EVAL_BATCH_SIZE contexts at once, at most    (as many as make a batch of tokens)
#   LIMIT           questions of each task       (all)
#   BACKEND         hf-shared: every context is computed once; hf: the harness's own model class;  (hf-shared)
#                   server: SERVER_URL=http://host:8000, and the default if that is set
#   CHAT_TEMPLATE   1: apply the chat template, which the leaderboard does not                     (0)
#   SAMPLES         1: also write the model's own answers to five questions to samples.jsonl       (1)
#   NUM_PROCESSES   processes, one for each GPU  (1)
#   DATASETS_ROOT   a folder that ./prefetch.sh has filled; the hub is not used                    (none)
#   DRY_RUN         1: check the model, print the command and score nothing
set -euo pipefail

HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd -P)
if [[ -z ${VIRTUAL_ENV:-} && -x $HERE/.venv/bin/python ]]; then PATH=$HERE/.venv/bin:$PATH; fi

export PYTHONSAFEPATH=1 # the installed project, not what is in the caller's folder

error() {
    echo "evaluation.sh: error: $*" >&2
    exit 2
}

arguments=()
option() { # NAME FLAG: pass a setting that is not empty
    if [[ -n ${!1:-} ]]; then arguments+=("$2" "${!1}"); fi
}
switch() { # NAME FLAG DEFAULT: pass a flag where the setting is 1
    local value=${!1:-$3}
    [[ $value == [01] ]] || error "$1 must be 0 or 1, not '$value'"
    if [[ $value == 1 ]]; then arguments+=("$2"); fi
}
set_arguments() {
    local tasks servers
    if [[ -v TASKS ]]; then
        read -ra tasks <<<"${TASKS//$'\n'/ }"
        ((${#tasks[@]})) || error "TASKS names no task"
        arguments+=(--tasks "${tasks[@]}")
    fi
    SERVER_URL=${SERVER_URL:-}
    read -ra servers <<<"${SERVER_URL//$'\n'/ }"
    if ((${#servers[@]})) && [[ ${BACKEND:-server} == server ]]; then arguments+=(--server_url "${servers[@]}"); fi
    option EVAL_PRECISION --precision
    option EVAL_BATCH_SIZE --batch_size
    option LIMIT --limit
    option BACKEND --backend
    option MODEL_TYPE --model_type
    option SERVER_TIMEOUT --server_timeout
    switch CHAT_TEMPLATE --chat_template 0
    switch SAMPLES --samples 1
    [[ ${DRY_RUN:-0} == [01] ]] || error "DRY_RUN must be 0 or 1, not '$DRY_RUN'"
}

evaluate() { # ARGUMENT...: score a model
    local command=(python -m grath.evaluation "$@" "${arguments[@]}") processes=${NUM_PROCESSES:-1} threads
    if [[ -n ${SERVER_URL:-} && ${BACKEND:-server} == server ]]; then processes=1; fi
    [[ $processes =~ ^[1-9][0-9]*$ ]] || error "NUM_PROCESSES must be a whole number of at least 1, not '$processes'"
    # One process refuses bad input before several are launched.
    if ((processes > 1)) || [[ ${DRY_RUN:-0} == 1 ]]; then "${command[@]}" --dry_run; fi
    if ((processes > 1)); then
        threads=$(($(nproc) / processes)) # nproc reads OMP_NUM_THREADS
        command=(
            accelerate launch --quiet --config_file "$HERE/accelerate_configs/data_parallel.yaml"
            --num_processes "$processes" --num_cpu_threads_per_process "$((threads > 0 ? threads : 1))" "${command[@]:1}"
        )
    fi
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        printf '%q ' "${command[@]}" && echo
    else
        "${command[@]}"
    fi
}

if (($#)); then
    set_arguments
    [[ -n $1 ]] || error "the model's name is empty; usage: ./evaluation.sh MODEL_OR_ADAPTER [OUTPUT_DIR]"
    output=${2:-scores/$(basename -- "$1")}
    [[ $output != scores/. && $output != scores/.. ]] || error "name the folder of the scores: ./evaluation.sh $1 OUTPUT_DIR"
    evaluate "$1" "$output" "${@:3}"
    exit
fi
run=$(python -m grath.run unscored)
eval "$run" # RUN, MODELS, RESULTS, and the settings of the run that are not set here
set_arguments
echo "newest run: $RUN, ${#MODELS[@]} model(s)"
if [[ ${DRY_RUN:-0} == 0 ]]; then
    # shellcheck source=grath/run/lock.sh
    source "$HERE/grath/run/lock.sh"
    lock "$RUN"
fi
for i in "${!MODELS[@]}"; do evaluate "${MODELS[i]}" "${RESULTS[i]}"; done
if [[ ${DRY_RUN:-0} == 0 ]]; then python -m grath.report "$RUN"; fi
