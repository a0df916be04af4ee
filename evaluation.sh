#!/usr/bin/env bash
# Stage 4 of GRATH: Open LLM Leaderboard scores with lm-evaluation-harness.
#
#   ./evaluation.sh MODEL_OR_ADAPTER [OUTPUT_DIR]   score a hub name, a model folder or a LoRA adapter folder
#   ./evaluation.sh                                 score what the newest run has not scored yet, with its settings
#
# Settings (docs/configuration.md has all of them):
#   TASKS           tasks, separated by blanks   (arc_challenge hellaswag mmlu truthfulqa_mc1 truthfulqa_mc2)
#   EVAL_PRECISION  auto, fp32, fp16, bf16; with hf-shared also int8, nf4, fp4    (auto: fp16 on a GPU, fp32 on a CPU);
#                   PRECISION is the same
#   EVAL_BATCH_SIZE contexts at once, at most    (as many as make a batch of tokens); BATCH_SIZE is the same
#   LIMIT           questions of each task       (all)
#   BACKEND         hf-shared: every context is computed once; hf: the harness's own model class;  (hf-shared)
#                   server: SERVER_URL=http://host:8000, and the default if that is set
#   CHAT_TEMPLATE   1: apply the chat template, which the leaderboard does not                     (0)
#   SAMPLES         1: also write the model's own answers to five questions to samples.jsonl       (1)
#   NUM_PROCESSES   processes, one for each GPU  (1)
#   DATASETS_ROOT   a folder that ./prefetch.sh has filled; the hub is not used                    (none)
#   DRY_RUN         1: check the model, print the command and score nothing
set -euo pipefail

HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
if [[ -z ${VIRTUAL_ENV:-} && -x $HERE/.venv/bin/python ]]; then PATH=$HERE/.venv/bin:$PATH; fi
python -c "import sys; from grath.common.paths import PROJECT; sys.exit(str(PROJECT) != sys.argv[1])" "$HERE" 2>/dev/null ||
    { echo "evaluation.sh: error: run \`pip install -e . -c constraints.txt\` in $HERE first" >&2; exit 2; }

for name in PRECISION BATCH_SIZE; do
    full=EVAL_$name
    if [[ -n ${!name:-} && -n ${!full:-} && ${!name} != "${!full}" ]]; then
        echo "evaluation.sh: error: $name is '${!name}' and $full is '${!full}': set one of them" >&2
        exit 2
    fi
    if [[ -n ${!name:-} ]]; then export "$full=${!name}"; fi
done

command=(python -m grath.pipeline evaluate "$@")
if [[ -n ${SERVER_URL:-} && ${BACKEND:-server} == server ]]; then export NUM_PROCESSES=1; fi
if [[ ${NUM_PROCESSES:-1} =~ ^[1-9][0-9]*$ ]] && ((${NUM_PROCESSES:-1} > 1)); then
    threads=$(($(nproc) / NUM_PROCESSES)) # nproc reads OMP_NUM_THREADS
    DRY_RUN=1 "${command[@]}" # refuses bad input in one process, before several are launched
    command=(
        accelerate launch --quiet --config_file "$HERE/accelerate_configs/data_parallel.yaml"
        --num_processes "$NUM_PROCESSES" --num_cpu_threads_per_process "$((threads > 0 ? threads : 1))" "${command[@]:1}"
    )
fi
printf '%q ' "${command[@]}" && echo
if [[ ${DRY_RUN:-0} == 1 && ${command[0]} == accelerate ]]; then exit; fi
exec "${command[@]}"
