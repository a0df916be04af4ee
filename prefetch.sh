#!/usr/bin/env bash
# Fetch the models and data sets of a pipeline for a machine without the internet.
#
#   ./prefetch.sh DIR [MODEL...]       on a machine with it: the data sets, and the models (both of the paper's)
#   DATASETS_ROOT=DIR ./run_llama2.sh  on the other: every stage uses them and asks nothing of the hub
#   DRY_RUN=1 ./prefetch.sh DIR        prints the commands and runs none
#
# Llama-2 needs access granted on the hub, and `hf auth login`. What is there already is not fetched again.
set -euo pipefail

HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
if [[ -z ${VIRTUAL_ENV:-} && -x $HERE/.venv/bin/python ]]; then PATH=$HERE/.venv/bin:$PATH; fi
DRY_RUN="${DRY_RUN:-0}"
DATASETS=(allenai/ai2_arc truthfulqa/truthful_qa Rowan/hellaswag cais/mmlu)

if (($# == 0)) || [[ -z $1 || $1 == -* ]]; then
    echo "prefetch.sh: error: name a folder; usage: ./prefetch.sh DIR [MODEL...]" >&2
    exit 2
fi
folder=$1
shift
models=("$@")
if ((${#models[@]} == 0)); then models=(meta-llama/Llama-2-7b-chat-hf HuggingFaceH4/zephyr-7b-beta); fi

fetch() { # KIND NAME OPTION...
    local command=(hf download "$2" --repo-type "$1" --local-dir "$folder/$2" "${@:3}")
    printf '%q ' "${command[@]}" && echo
    if [[ $DRY_RUN != 1 ]]; then "${command[@]}"; fi
}

for name in "${DATASETS[@]}"; do fetch dataset "$name"; done
for name in "${models[@]}"; do
    fetch model "$name" --include "*.safetensors" --include "*.json" --include "*.model" --include "*.txt" \
        --include "*.jinja"
done
if [[ $DRY_RUN != 1 ]]; then
    echo "Fetched ${#DATASETS[@]} data sets and ${#models[@]} model(s) to $folder; next: DATASETS_ROOT=$folder ./run_*.sh"
fi
