#!/usr/bin/env bash
# The GRATH loop. In every iteration the model writes pairs, DPO trains the next model on them, and the next model is
# scored. From the second iteration on, the new correct answers are combined with the first iteration's incorrect ones.
#
#   MODEL_NAME_OR_PATH=MODEL NUM_QUERY=1119 ./run_grath.sh     the presets run_*.sh set these and more
#   DRY_RUN=1 ./run_llama2.sh                                  print the commands and run none
#   CHECK=1 ./run_llama2.sh                                    check the machine in seconds and print the plan
#   FRESH=1 ./run_llama2.sh                                    move an old run of that name aside and start again
#
# Every setting is an environment variable: see docs/configuration.md. What you set wins over the preset.
# After an interruption, run the same command again: a stage is skipped if the run's manifest.json shows that its outputs
# were made from these settings and inputs and are unchanged. SIGHUP, SIGINT, SIGTERM and SIGUSR1 end every process of
# the stage, with status 128 + signal; in a Slurm job, SIGUSR1 also requeues the job.
set -euo pipefail

HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
if [[ -z ${VIRTUAL_ENV:-} && -x $HERE/.venv/bin/python ]]; then PATH=$HERE/.venv/bin:$PATH; fi
python -c "import sys; from grath.common.paths import PROJECT; sys.exit(str(PROJECT) != sys.argv[1])" "$HERE" 2>/dev/null ||
    { echo "run_grath.sh: error: run \`pip install -e . -c constraints.txt\` in $HERE first" >&2; exit 2; }

# This script runs below a process that locks the run's folder and ends all stages on a signal.
if [[ ${GRATH_LOOP:-} != "$PPID" ]]; then GRATH_LOOP="" exec python -m grath.pipeline loop "$HERE/run_grath.sh"; fi
trap : HUP INT TERM USR1 # a signal to all processes ends the stage, which records it, and then this script
settings=$(python -m grath.pipeline settings)
eval "$settings" # every setting, RUN (the run's folder), SUFFIX (of its files) and THREADS
# shellcheck disable=SC2153 # TASKS comes from the line above
read -ra tasks <<<"$TASKS"

launch=(accelerate launch --quiet --num_processes "$NUM_PROCESSES" --num_cpu_threads_per_process "$THREADS" --config_file)
config=$HERE/accelerate_configs/one_gpu.yaml ask=(python)
if ((NUM_PROCESSES > 1)); then
    config=$HERE/accelerate_configs/data_parallel.yaml
    ask=("${launch[@]}" "$config")
fi
launch+=("${ACCELERATE_CONFIG:-$config}")
questions=(--data_name "$DATA_NAME" --subdata_name "$SUBDATA_NAME" --split "$SPLIT")
if [[ -n $DATA_PATH ]]; then questions=(--data_path "$DATA_PATH"); fi
pairs_args=(
    "${questions[@]}" --num_query "$NUM_QUERY" --demos "$DEMOS" --model_type "$MODEL_TYPE" --seed "$SEED"
    --max_new_tokens "$MAX_NEW_TOKENS"
)
if [[ -n $SERVER_URL ]]; then
    ask=(python)
    read -ra servers <<<"$SERVER_URL"
    pairs_args+=(--engine server --server_url "${servers[@]}" --server_timeout "$SERVER_TIMEOUT")
else
    pairs_args+=(${PAIRS_BATCH_SIZE:+--batch_size "$PAIRS_BATCH_SIZE"} --precision "$PAIRS_PRECISION")
fi
if [[ $USE_FS == 1 ]]; then pairs_args+=(--useFS); fi
if [[ $USE_GT == 1 ]]; then pairs_args+=(--useGT); fi
dpo_args=(
    --reference "$REFERENCE" --max_steps "$MAX_STEPS" --warmup_steps "$WARMUP_STEPS" --learning_rate "$LEARNING_RATE"
    --beta "$BETA" --max_length "$MAX_LENGTH" --seed "$SEED"
    --save_steps "$SAVE_STEPS" --precision "$DPO_PRECISION" --model_type "$MODEL_TYPE" --report_to "$REPORT_TO"
)
if [[ -n $DPO_BATCH_SIZE ]]; then dpo_args+=(--per_device_train_batch_size "$DPO_BATCH_SIZE"); fi
if [[ -n $GRADIENT_ACCUMULATION_STEPS ]]; then dpo_args+=(--gradient_accumulation_steps "$GRADIENT_ACCUMULATION_STEPS"); fi

eval_settings=(
    TASKS="$TASKS" EVAL_PRECISION="$EVAL_PRECISION" EVAL_BATCH_SIZE="$EVAL_BATCH_SIZE" LIMIT="$LIMIT" BACKEND="$BACKEND"
    CHAT_TEMPLATE="$CHAT_TEMPLATE" SAMPLES="$SAMPLES" MODEL_TYPE="$MODEL_TYPE" NUM_PROCESSES="$NUM_PROCESSES"
    SERVER_URL="$SERVER_URL" SERVER_TIMEOUT="$SERVER_TIMEOUT"
)

# stage NAME ITERATION TITLE --input FILE... --output FILE... -- COMMAND...
plan=()
stage() {
    local name=$1 iteration=$2 title=$3
    shift 3
    if [[ $DRY_RUN == 1 ]]; then
        while [[ $1 != -- ]]; do shift; done
        printf '%q ' "${@:2}" && echo
    elif [[ $CHECK == 1 ]]; then
        plan+=("$name=$title")
    else
        python -m grath.pipeline stage "$RUN" --stage "$name" --iteration "$iteration" --title "$title" "$@"
    fi
}

score() { # ITERATION MODEL
    local folder="$RUN/results/iter_$1" task outputs=()
    if ((${#tasks[@]} == 0)); then return; fi
    for task in "${tasks[@]}"; do outputs+=("$folder/$task.json"); done
    if [[ $SAMPLES == 1 ]]; then outputs+=("$folder/samples.jsonl"); fi
    stage scores "$1" "scores of M_$1" --input "$2" --output "${outputs[@]}" -- \
        env -u PRECISION -u BATCH_SIZE "${eval_settings[@]}" bash "$HERE/evaluation.sh" "$2" "$folder"
}

if [[ $DRY_RUN == 0 ]]; then python -m grath.pipeline start; fi
model=$MODEL_NAME_OR_PATH
score 0 "$model"
for ((i = 0; i < ITERATIONS; i++)); do
    next=$((i + 1))
    pairs="$RUN/data/iter${i}_$SUFFIX.json" first="$RUN/data/iter0_$SUFFIX.json" new_model="$RUN/models/iter_${next}_$SUFFIX"
    if [[ -n $GOLD_PAIRS ]]; then
        train_on=(--dataset_name "$GOLD_PAIRS") train_input=(--questions)
    else
        stage pairs "$next" "iteration $next: M_$i writes pairs" --questions --input "$model" --output "$pairs" -- \
            "${ask[@]}" "$HERE/create_pair_responses.py" --model_name_or_path "$model" --save_prefix "iter${i}_arcc" \
            --save_dir "$RUN/data" "${pairs_args[@]}"
        if ((i > 0)); then
            combined="${pairs%.json}_combined.json"
            stage combine "$next" "iteration $next: combine with the incorrect answers of iteration 1" \
                --input "$pairs" "$first" --output "$combined" -- \
                python "$HERE/combine_new_correct_ori_wrong.py" --new_data_path "$pairs" --ori_data_path "$first"
            pairs=$combined
        fi
        train_on=(--dataset_path "$pairs") train_input=("$pairs")
    fi

    stage dpo "$next" "iteration $next: DPO trains M_$next" --input "$model" "${train_input[@]}" \
        --output "$new_model"/{adapter_model.safetensors,adapter_config.json,grath.json,training_log.jsonl,training.png} -- \
        "${launch[@]}" "$HERE/dpo.py" "${train_on[@]}" --model_name_or_path "$model" --output_dir "$new_model" "${dpo_args[@]}"

    model=$new_model
    score "$next" "$model"
    if [[ $DRY_RUN$CHECK == 00 && ! $RUN/report.md -nt $RUN/manifest.json ]]; then python -m grath.report "$RUN"; fi
done
if [[ $CHECK == 1 && $DRY_RUN == 0 ]]; then python -m grath.pipeline check -- "${plan[@]}"; fi
if [[ $DRY_RUN$CHECK == 00 ]]; then echo "Done: see $RUN/report.md; M_$ITERATIONS is the LoRA adapter in $model"; fi
