#!/usr/bin/env bash
# GRATH's loop. In every round the model writes pairs, from the second round on its correct answers are spliced onto the
# first round's incorrect ones, DPO trains the next model, and the next model is scored.
#
#   MODEL_NAME_OR_PATH=MODEL NUM_QUERY=1119 ./run_grath.sh        (the presets run_*.sh set all this)
#   DRY_RUN=1 ./run_llama2.sh                                     prints the commands and runs none
#   CHECK=1 ./run_llama2.sh                                       checks the machine for it in seconds and prints the plan
#   FRESH=1 ./run_llama2.sh                                       moves an old run of that name aside and starts again
#
# Every setting is an environment variable; what is set wins over the preset. Needs the packages of requirements.txt.
# After a stop, a kill or a damage the same command goes on: by the run's manifest.json a stage is skipped if its outputs
# were made from these settings and inputs and are as they were. SIGHUP, SIGINT, SIGTERM and SIGUSR1 end all processes
# of the stage, with status 128 + signal; in a Slurm job SIGUSR1 puts the job into the queue again.
set -euo pipefail

HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
if [[ -z ${VIRTUAL_ENV:-} && -x $HERE/.venv/bin/python ]]; then PATH=$HERE/.venv/bin:$PATH; fi
export PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}"

fail() {
    echo "run_grath.sh: error: $1" >&2
    exit 2
}

# An option's value may not look like an option.
no_option() { if [[ $1 == -* ]]; then printf './%s.' "$1"; else printf '%s.' "$1"; fi; }

# The model and the run
[[ -n ${MODEL_NAME_OR_PATH:-} ]] ||
    fail "MODEL_NAME_OR_PATH: set it to a hub name or a model folder, or start one of the presets run_*.sh"
MODEL_TYPE="${MODEL_TYPE:-auto}"
RUN_NAME="${RUN_NAME:-grath}"
RUNS_DIR="${RUNS_DIR:-runs}"
SEED="${SEED:-0}"
ROUNDS="${ROUNDS:-2}"           # paper: 2 rolling, 10 fixed
REFERENCE="${REFERENCE:-rolling}"
NUM_PROCESSES="${NUM_PROCESSES:-1}"
DRY_RUN="${DRY_RUN:-0}"
CHECK="${CHECK:-0}"
FRESH="${FRESH:-0}"
# Pairs
[[ -n ${NUM_QUERY:-} ]] || fail "NUM_QUERY: set it to the number of questions to ask, 1119 for all of ARC-Challenge"
DATA_PATH="${DATA_PATH:-}"      # a local file in the schema of ARC, instead of DATA_NAME
DATA_NAME="${DATA_NAME:-allenai/ai2_arc}"
SUBDATA_NAME="${SUBDATA_NAME:-ARC-Challenge}"
SPLIT="${SPLIT:-train}"
USE_FS="${USE_FS:-1}"           # paper: with demonstrations
USE_GT="${USE_GT:-0}"           # paper: without ground truth
DEMOS="${DEMOS:-truthfulqa}"
MAX_NEW_TOKENS="${MAX_NEW_TOKENS:-100}"
PAIRS_BATCH_SIZE="${PAIRS_BATCH_SIZE:-64}"
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
REPORT_TO="${REPORT_TO:-none}"  # wandb, tensorboard, trackio, ...: its package and its login are yours
# Scores; TASKS= scores nothing
TASKS="${TASKS-arc_challenge hellaswag mmlu truthfulqa_mc1 truthfulqa_mc2}"
EVAL_BATCH_SIZE="${EVAL_BATCH_SIZE:-16}"
EVAL_PRECISION="${EVAL_PRECISION:-auto}"
LIMIT="${LIMIT:-}"
BACKEND="${BACKEND:-hf-shared}"
CHAT_TEMPLATE="${CHAT_TEMPLATE:-0}"

for name in ROUNDS NUM_QUERY MAX_STEPS NUM_PROCESSES PAIRS_BATCH_SIZE DPO_BATCH_SIZE EVAL_BATCH_SIZE MAX_NEW_TOKENS \
    MAX_LENGTH SAVE_STEPS; do
    [[ ${!name} =~ ^[1-9][0-9]{0,8}$ ]] || fail "$name must be a whole number of at least 1, not '${!name}'"
done
for name in SEED WARMUP_STEPS; do
    [[ ${!name} =~ ^[0-9]{1,9}$ ]] || fail "$name must be a whole number, not '${!name}'"
done
[[ $GRADIENT_ACCUMULATION_STEPS =~ ^([1-9][0-9]{0,8})?$ ]] ||
    fail "GRADIENT_ACCUMULATION_STEPS must be a whole number of at least 1 or empty, not '$GRADIENT_ACCUMULATION_STEPS'"
[[ $LIMIT =~ ^([1-9][0-9]{0,8}|0?\.[0-9]+)?$ ]] ||
    fail "LIMIT must be a number of questions or a share below 1, not '$LIMIT'"
[[ $REFERENCE == rolling || $REFERENCE == fixed ]] || fail "REFERENCE must be rolling or fixed, not '$REFERENCE'"
[[ $RUN_NAME != */* ]] || fail "RUN_NAME must be a plain name, not '$RUN_NAME': use RUNS_DIR for the folder"
for name in USE_FS USE_GT DRY_RUN CHECK FRESH CHAT_TEMPLATE; do
    [[ ${!name} == [01] ]] || fail "$name must be 0 or 1, not '${!name}'"
done
flag() { if [[ $1 == 1 ]]; then echo True; else echo False; fi; }

for name in MODEL_NAME_OR_PATH DATA_PATH RUNS_DIR DEMOS; do
    value=$(no_option "${!name}") # with a dot behind it, since $() cuts line ends off
    printf -v "$name" %s "${value%.}"
done

RUN="$RUNS_DIR/${RUN_NAME}_seed_$SEED"
TAIL="arcc_num_${NUM_QUERY}_useGT_$(flag "$USE_GT")_useFS_$(flag "$USE_FS")"
settings=()
for name in MODEL_NAME_OR_PATH MODEL_TYPE SEED REFERENCE NUM_QUERY DATA_PATH DATA_NAME SUBDATA_NAME SPLIT USE_FS USE_GT DEMOS \
    MAX_NEW_TOKENS PAIRS_PRECISION MAX_STEPS WARMUP_STEPS LEARNING_RATE BETA MAX_LENGTH DPO_PRECISION \
    EVAL_PRECISION LIMIT BACKEND CHAT_TEMPLATE DPO_BATCH_SIZE NUM_PROCESSES GRADIENT_ACCUMULATION_STEPS; do
    settings+=("$name=${!name}")
done
echo "GRATH: $ROUNDS round(s) in $RUN, reference $REFERENCE, tasks: ${TASKS:-none}"
printf '  %s\n' "${settings[@]}"

# A job that Slurm starts again goes on with what it has made.
if [[ ${SLURM_RESTART_COUNT:-0} =~ ^[1-9] ]]; then FRESH=0; fi

# Every command runs in the background, so that a signal reaches this shell at once.
export GRATH_LOOP=$$ # every process below ends with this one
child=
run() {
    local status=0
    "$@" &
    child=$!
    wait "$child" || status=$?
    child=
    if ((status)); then exit "$status"; fi
}
interrupted() { # SIGNAL
    trap '' HUP INT TERM USR1
    if [[ -n $child ]]; then
        kill -s TERM "$child" 2>/dev/null || true # a process that is just starting ignores SIGINT
        wait "$child" || true
    fi
    if [[ $1 == USR1 && -n ${SLURM_JOB_ID:-} ]]; then scontrol requeue "$SLURM_JOB_ID" || true; fi
    echo "run_grath.sh: ended by SIG$1; start the same command again (without FRESH=1) to go on from here" >&2
    exit $((128 + $(kill -l "$1")))
}
for name in HUP INT TERM USR1; do
    # shellcheck disable=SC2064 # the name of now
    trap "interrupted $name" "$name"
done

# stage NAME ROUND TITLE --input=FILE... --output=FILE... -- COMMAND...
stage() {
    local name=$1 round=$2 title=$3
    shift 3
    if [[ $DRY_RUN == 1 ]]; then
        while [[ $1 != -- ]]; do shift; done
        printf '%q ' "${@:2}" && echo
    elif [[ $CHECK == 1 ]]; then
        plan+=("$name=$title")
    else
        run python -m grath.supervise stage "$RUN" --stage "$name" --round "$round" --title "$title" "$@"
    fi
}

evaluate() { # ROUND MODEL
    local output="$RUN/results/iter_$1" task outputs=()
    if ((${#tasks[@]} == 0)); then return; fi
    for task in "${tasks[@]}"; do outputs+=("--output=$output/$task.json"); done
    stage scores "$1" "scores of M_$1" "--input=$2" "--tasks=$TASKS" "${outputs[@]}" "--output=$output/settings.txt" -- \
        env NUM_PROCESSES="$NUM_PROCESSES" TASKS="$TASKS" BATCH_SIZE="$EVAL_BATCH_SIZE" PRECISION="$EVAL_PRECISION" \
        LIMIT="$LIMIT" BACKEND="$BACKEND" CHAT_TEMPLATE="$CHAT_TEMPLATE" bash "$HERE/evaluation.sh" "$2" "$output"
    stage samples "$1" "answers of M_$1 to five questions" "--input=$2" "--output=$output/samples.jsonl" -- \
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

threads=$(($(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) / NUM_PROCESSES)) # nproc goes by taskset and OMP_NUM_THREADS
config=one_gpu ask=(python)
if ((NUM_PROCESSES > 1)); then config=data_parallel; fi
# With a file of its own, for accelerate would take what is not said here from the user's own configuration.
launch=(
    accelerate launch --quiet --config_file "$HERE/accelerate_configs/$config.yaml" --num_processes "$NUM_PROCESSES"
    --num_cpu_threads_per_process "$((threads > 0 ? threads : 1))"
)
if ((NUM_PROCESSES > 1)); then ask=("${launch[@]}"); fi
dpo_args=(
    --model_type "$MODEL_TYPE" --reference "$REFERENCE" --seed "$SEED" --max_steps "$MAX_STEPS"
    --warmup_steps "$WARMUP_STEPS" --learning_rate "$LEARNING_RATE" --beta "$BETA"
    --per_device_train_batch_size "$DPO_BATCH_SIZE"
    --max_length "$MAX_LENGTH" --save_steps "$SAVE_STEPS" --precision "$DPO_PRECISION" --report_to "$REPORT_TO"
)
if [[ -n $GRADIENT_ACCUMULATION_STEPS ]]; then dpo_args+=(--gradient_accumulation_steps "$GRADIENT_ACCUMULATION_STEPS"); fi

IFS=$' \t\n' read -r -d '' -a tasks <<<"$TASKS" || true
demos="$HERE/demos/$DEMOS.json"
if [[ ! -f $demos ]]; then demos=$DEMOS; fi
if [[ $DRY_RUN == 0 ]]; then
    [[ $USE_FS == 0 || -f $demos ]] || fail "DEMOS: there is no set or file '$DEMOS'"
    [[ -z $DATA_PATH || -f $DATA_PATH ]] || fail "DATA_PATH: there is no file '$DATA_PATH'"
fi
asked=()
if [[ -n $DATA_PATH ]]; then asked+=("--input=$DATA_PATH"); else asked+=("--data=$DATA_NAME"); fi
if [[ $USE_FS == 1 ]]; then asked+=("--input=$demos"); fi

begin=(python -m grath.supervise begin "$RUN" "--input=$MODEL_NAME_OR_PATH" "${asked[@]}")
if [[ $DRY_RUN == 0 && $CHECK == 0 ]]; then
    mkdir -p -- "$RUNS_DIR" 2>/dev/null || fail "cannot make the folder $RUNS_DIR: set RUNS_DIR to one that can be written"
    { exec 9<>"$RUNS_DIR/.${RUN_NAME}_seed_$SEED.lock"; } 2>/dev/null ||
        fail "cannot write to $RUNS_DIR: set RUNS_DIR to a folder that can be written"
    if [[ $FRESH == 1 ]]; then begin+=(--fresh); fi
    run "${begin[@]}" --lock_fd 9 -- "${settings[@]}"
elif [[ $DRY_RUN == 0 && $FRESH == 0 ]]; then
    run "${begin[@]}" --check -- "${settings[@]}"
fi

plan=()
model=$MODEL_NAME_OR_PATH
evaluate 0 "$model"
for ((i = 0; i < ROUNDS; i++)); do
    pairs="$RUN/data/iter${i}_$TAIL.json"
    stage pairs "$((i + 1))" "round $((i + 1)): M_$i writes pairs" "--input=$model" "${asked[@]}" "--output=$pairs" -- \
        "${ask[@]}" "$HERE/create_pair_responses.py" --model_name_or_path "$model" --save_prefix "iter${i}_arcc" "${pairs_args[@]}"
    if ((i > 0)); then
        first="$RUN/data/iter0_$TAIL.json" combined="${pairs%.json}_combined.json"
        stage splice "$((i + 1))" "round $((i + 1)): splice onto the incorrect answers of round 1" \
            "--input=$pairs" "--input=$first" "--output=$combined" -- \
            python "$HERE/combine_new_correct_ori_wrong.py" --new_data_path "$pairs" --ori_data_path "$first"
        pairs=$combined
    fi
    next="$RUN/models/iter_$((i + 1))_$TAIL"
    outputs=()
    for name in adapter_model.safetensors adapter_config.json grath.json training_log.jsonl training.png; do
        outputs+=("--output=$next/$name")
    done
    stage dpo "$((i + 1))" "round $((i + 1)): DPO gives M_$((i + 1))" "--input=$model" "--input=$pairs" "${outputs[@]}" -- \
        "${launch[@]}" "$HERE/dpo.py" --dataset_path "$pairs" --model_name_or_path "$model" --output_dir "$next" "${dpo_args[@]}"
    model=$next
    evaluate "$((i + 1))" "$model"
    if [[ $DRY_RUN == 0 && $CHECK == 0 && ! $RUN/report.md -nt $RUN/manifest.json ]]; then run python -m grath.report -- "$RUN"; fi
done
if [[ $DRY_RUN == 0 && $CHECK == 0 ]]; then
    echo "Done: look at $RUN/report.md for every round; M_$ROUNDS is the LoRA adapter $model"
fi
if [[ $CHECK == 1 && $DRY_RUN == 0 ]]; then
    checked=(--model "$MODEL_NAME_OR_PATH" --num_query "$NUM_QUERY" --max_steps "$MAX_STEPS" --save_steps "$SAVE_STEPS")
    if [[ -n $DATA_PATH ]]; then
        checked+=("--data_path=$DATA_PATH")
    else
        checked+=("--data_name=$DATA_NAME" "--subdata_name=$SUBDATA_NAME" "--split=$SPLIT")
    fi
    run python -m grath.preflight "$RUN" "${checked[@]}" --num_processes "$NUM_PROCESSES" --tasks="$TASKS" \
        --precisions "$PAIRS_PRECISION" "$DPO_PRECISION" "$EVAL_PRECISION" -- "${plan[@]}"
fi
