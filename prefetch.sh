#!/usr/bin/env bash
# Download the models and data sets of a run for a machine without internet access.
#
#   ./prefetch.sh DIR [MODEL...]       on a machine with access: the data sets, and the models (default: the paper's two)
#   DATASETS_ROOT=DIR ./run_llama2.sh  on the other machine: every stage uses them and runs offline
#   DRY_RUN=1 ./prefetch.sh DIR        print the commands and run none
#
# Llama-2 is gated: request access on the hub, then `hf auth login`. Files that are there already are not downloaded again.
set -euo pipefail

HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd -P)
if [[ -z ${VIRTUAL_ENV:-} && -x $HERE/.venv/bin/python ]]; then PATH=$HERE/.venv/bin:$PATH; fi
DRY_RUN="${DRY_RUN:-0}"
DATASETS=(allenai/ai2_arc truthfulqa/truthful_qa Rowan/hellaswag cais/mmlu)

if [[ $DRY_RUN != [01] ]]; then
    echo "prefetch.sh: error: DRY_RUN must be 0 or 1, not '$DRY_RUN'" >&2
    exit 2
fi
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
