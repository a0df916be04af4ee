#!/usr/bin/env bash
# GRATH's loop. In every round the model writes pairs, from the second round on its correct answers are spliced onto the
# first round's incorrect ones, DPO trains the next model, and the next model is scored.
#
#   MODEL_NAME_OR_PATH=MODEL NUM_QUERY=1119 ./run_grath.sh        (the presets run_*.sh set all this)
#   DRY_RUN=1 ./run_llama2.sh                                     prints the commands and runs none
#
# Every setting is an environment variable; what is set wins over the preset. Needs the packages of requirements.txt.
# A stage whose output is there is not run again, so the same command goes on where it stopped.
set -euo pipefail

HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
if [[ -z ${VIRTUAL_ENV:-} && -x $HERE/.venv/bin/python ]]; then PATH=$HERE/.venv/bin:$PATH; fi
export PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}"

fail() {
    echo "run_grath.sh: error: $1" >&2
    exit "${2:-2}"
}

# The model and the run
MODEL_NAME_OR_PATH="${MODEL_NAME_OR_PATH:?set it to a hub name or a model folder, or start one of the presets run_*.sh}"
MODEL_TYPE="${MODEL_TYPE:-auto}"
RUN_NAME="${RUN_NAME:-grath}"
RUNS_DIR="${RUNS_DIR:-runs}"
SEED="${SEED:-0}"
ROUNDS="${ROUNDS:-2}"           # paper: 2 rolling, 10 fixed
REFERENCE="${REFERENCE:-rolling}"
NUM_PROCESSES="${NUM_PROCESSES:-1}"
DRY_RUN="${DRY_RUN:-0}"
# Pairs
NUM_QUERY="${NUM_QUERY:?set it to the number of questions to ask, 1119 for all of ARC-Challenge}"
DATA_PATH="${DATA_PATH:-}"      # a local file in the schema of ARC, instead of DATA_NAME
DATA_NAME="${DATA_NAME:-allenai/ai2_arc}"
SUBDATA_NAME="${SUBDATA_NAME:-ARC-Challenge}"
SPLIT="${SPLIT:-train}"
USE_FS="${USE_FS:-1}"           # paper: with demonstrations
USE_GT="${USE_GT:-0}"           # paper: without ground truth
DEMOS="${DEMOS:-truthfulqa}"
MAX_NEW_TOKENS="${MAX_NEW_TOKENS:-100}"
PAIRS_BATCH_SIZE="${PAIRS_BATCH_SIZE:-32}"
PAIRS_PRECISION="${PAIRS_PRECISION:-auto}"
# DPO: the values of the paper's code
MAX_STEPS="${MAX_STEPS:-1000}"
WARMUP_STEPS="${WARMUP_STEPS:-100}"
LEARNING_RATE="${LEARNING_RATE:-5e-4}"
BETA="${BETA:-0.1}"
DPO_BATCH_SIZE="${DPO_BATCH_SIZE:-4}"
GRADIENT_ACCUMULATION_STEPS="${GRADIENT_ACCUMULATION_STEPS:-}" # as many as make 16 pairs a step
MAX_LENGTH="${MAX_LENGTH:-1024}"
SAVE_STEPS="${SAVE_STEPS:-100}"
DPO_PRECISION="${DPO_PRECISION:-auto}"
# Scores; TASKS= scores nothing
TASKS="${TASKS-arc_challenge hellaswag mmlu truthfulqa_mc1 truthfulqa_mc2}"
EVAL_BATCH_SIZE="${EVAL_BATCH_SIZE:-16}"
EVAL_PRECISION="${EVAL_PRECISION:-auto}"
LIMIT="${LIMIT:-}"

for name in ROUNDS NUM_QUERY MAX_STEPS NUM_PROCESSES; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name must be a whole number of at least 1, not '${!name}'"
done
[[ $SEED =~ ^[0-9]+$ ]] || fail "SEED must be a whole number, not '$SEED'"
[[ $REFERENCE == rolling || $REFERENCE == fixed ]] || fail "REFERENCE must be rolling or fixed, not '$REFERENCE'"
[[ $RUN_NAME != */* ]] || fail "RUN_NAME must be a plain name, not '$RUN_NAME': use RUNS_DIR for the folder"
for name in USE_FS USE_GT DRY_RUN; do
    [[ ${!name} == [01] ]] || fail "$name must be 0 or 1, not '${!name}'"
done
flag() { if [[ $1 == 1 ]]; then echo True; else echo False; fi; }

RUN="$RUNS_DIR/${RUN_NAME}_seed_$SEED"
TAIL="arcc_num_${NUM_QUERY}_useGT_$(flag "$USE_GT")_useFS_$(flag "$USE_FS")"
settings=$(
    for name in MODEL_NAME_OR_PATH MODEL_TYPE SEED REFERENCE NUM_QUERY DATA_PATH DATA_NAME SUBDATA_NAME SPLIT USE_FS \
        USE_GT DEMOS MAX_NEW_TOKENS PAIRS_PRECISION MAX_STEPS WARMUP_STEPS LEARNING_RATE BETA DPO_BATCH_SIZE \
        GRADIENT_ACCUMULATION_STEPS MAX_LENGTH DPO_PRECISION NUM_PROCESSES; do
        printf '%s=%s\n' "$name" "${!name}"
    done
)
echo "GRATH: $ROUNDS round(s) in $RUN, reference $REFERENCE, tasks: ${TASKS:-none}"
echo "  ${settings//$'\n'/$'\n  '}"

status_file=$(mktemp)
trap 'rm -f -- "$status_file"' EXIT
export GRATH_STATUS_FILE="$status_file"
if [[ $DRY_RUN != 1 ]]; then
    mkdir -p -- "$RUN" || fail "cannot make $RUN: set RUNS_DIR to a folder that can be written"
    if [[ -f $RUN/settings.txt && $(<"$RUN/settings.txt") != "$settings" ]]; then
        fail "$RUN holds a run with other settings ($(diff <(echo "$settings") "$RUN/settings.txt" | sed -n 's/^> //p' |
            head -n 1)): set another RUN_NAME"
    fi
fi

# stage TITLE OUTPUT COMMAND...: run the command unless its output is there; an empty OUTPUT never is.
stage() {
    local title=$1 output=$2 status=0
    shift 2
    if [[ $DRY_RUN == 1 ]]; then
        printf '%q ' "$@" && echo
        return
    fi
    if [[ -n $output && -e $output ]]; then
        echo "== $title: $output is there"
        return
    fi
    echo "== $title"
    : >"$status_file"
    local start=$SECONDS
    "$@" || status=$?
    if ((status)); then
        # accelerate turns every status into 1; the stage has left its own.
        if [[ -s $status_file ]]; then status=$(<"$status_file"); fi
        fail "$title failed; start the same command again to go on from here" "$status"
    fi
    printf '%s\n' "$settings" >"$RUN/settings.txt"
    printf '%s\t%s\n' "$title" "$((SECONDS - start))" >>"$RUN/stages.tsv"
}

evaluate() { # ROUND MODEL
    local output="$RUN/results/iter_$1"
    if [[ -z $TASKS ]]; then return; fi
    # evaluation.sh itself runs only what has no result yet.
    stage "scores of M_$1" "" env NUM_PROCESSES="$NUM_PROCESSES" TASKS="$TASKS" BATCH_SIZE="$EVAL_BATCH_SIZE" PRECISION="$EVAL_PRECISION" \
        LIMIT="$LIMIT" "$HERE/evaluation.sh" "$2" "$output"
    stage "answers of M_$1 to five questions" "$output/samples.jsonl" \
        python -m grath.samples --model_type "$MODEL_TYPE" --precision "$PAIRS_PRECISION" -- "$2" "$output/samples.jsonl"
}

pairs_args=(
    --model_type "$MODEL_TYPE" --num_query "$NUM_QUERY" --seed "$SEED" --demos "$DEMOS" --save_dir "$RUN/data"
    --max_new_tokens "$MAX_NEW_TOKENS" --batch_size "$PAIRS_BATCH_SIZE" --precision "$PAIRS_PRECISION"
)
if [[ -n $DATA_PATH ]]; then
    pairs_args+=(--data_path "$DATA_PATH")
else
    pairs_args+=(--data_name "$DATA_NAME" --subdata_name "$SUBDATA_NAME" --split "$SPLIT")
fi
if [[ $USE_FS == 1 ]]; then pairs_args+=(--useFS); fi
if [[ $USE_GT == 1 ]]; then pairs_args+=(--useGT); fi

threads=$(($(getconf _NPROCESSORS_ONLN) / NUM_PROCESSES))
several=() ask=(python)
if ((NUM_PROCESSES > 1)); then several=(--multi_gpu); fi
launch=(
    accelerate launch --quiet ${several[@]+"${several[@]}"} --num_processes "$NUM_PROCESSES" --num_machines 1 --mixed_precision no
    --dynamo_backend no --num_cpu_threads_per_process "$((threads > 0 ? threads : 1))"
)
if ((NUM_PROCESSES > 1)); then ask=("${launch[@]}"); fi
dpo_args=(
    --model_type "$MODEL_TYPE" --reference "$REFERENCE" --seed "$SEED" --max_steps "$MAX_STEPS"
    --warmup_steps "$WARMUP_STEPS" --learning_rate "$LEARNING_RATE" --beta "$BETA"
    --per_device_train_batch_size "$DPO_BATCH_SIZE"
    --max_length "$MAX_LENGTH" --save_steps "$SAVE_STEPS" --precision "$DPO_PRECISION"
)
if [[ -n $GRADIENT_ACCUMULATION_STEPS ]]; then dpo_args+=(--gradient_accumulation_steps "$GRADIENT_ACCUMULATION_STEPS"); fi

model=$MODEL_NAME_OR_PATH
evaluate 0 "$model"
for ((i = 0; i < ROUNDS; i++)); do
    pairs="$RUN/data/iter${i}_$TAIL.json"
    stage "round $((i + 1)): M_$i writes pairs" "$pairs" \
        "${ask[@]}" "$HERE/create_pair_responses.py" --model_name_or_path "$model" --save_prefix "iter${i}_arcc" "${pairs_args[@]}"
    if ((i > 0)); then
        stage "round $((i + 1)): splice onto the incorrect answers of round 1" "${pairs%.json}_combined.json" \
            python "$HERE/combine_new_correct_ori_wrong.py" --new_data_path "$pairs" --ori_data_path "$RUN/data/iter0_$TAIL.json"
        pairs="${pairs%.json}_combined.json"
    fi
    next="$RUN/models/iter_$((i + 1))_$TAIL"
    stage "round $((i + 1)): DPO gives M_$((i + 1))" "$next/adapter_model.safetensors" \
        "${launch[@]}" "$HERE/dpo.py" --dataset_path "$pairs" --model_name_or_path "$model" --output_dir "$next" "${dpo_args[@]}"
    model=$next
    evaluate "$((i + 1))" "$model"
    if [[ $DRY_RUN != 1 ]]; then python -m grath.report -- "$RUN"; fi
done
