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
# After an interruption, run the same command again: every stage resumes, skips what is finished, and refuses
# settings or files that differ from the record next to its output. SIGHUP, SIGINT, SIGTERM and SIGUSR1 end every process of the
# stage, with status 128 + signal; in a Slurm job, SIGUSR1 also requeues the job.
set -euo pipefail

HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd -P)
if [[ -z ${VIRTUAL_ENV:-} && -x $HERE/.venv/bin/python ]]; then PATH=$HERE/.venv/bin:$PATH; fi
export PYTHONSAFEPATH=1 # the installed project, not what is in the caller's folder
if (($#)); then
    echo "run_grath.sh: error: unknown argument '$1': settings are environment variables (SEED=1 ./run_llama2.sh), see docs/configuration.md" >&2
    exit 2
fi
RUN='' restarted=0
if [[ ${SLURM_RESTART_COUNT:-0} =~ ^[1-9] ]]; then export FRESH=0 && restarted=1; fi # a requeued job resumes

saved() { # what the run has saved: its files, apart from those of every start, and the number of responses; 1 without a run
    if [[ ! -d $RUN ]]; then echo 1 && return; fi
    (cd -- "$RUN" && find . -type f ! -name '.*' ! -name '*.record.json' ! -name grath.json ! -name settings.json \
        ! -name training_log.jsonl ! -path './models/*/runs/*' | sort) # runs/ is TensorBoard's
    find "$RUN/" -name '.*.responses*' -exec cat {} + | wc -l
}
end() { # SIGNAL STATUS: end the stage's process group, requeue on USR1, say how to resume
    trap '' HUP INT TERM USR1
    local tenth group=${!:-} job=${SLURM_JOB_ID:-} how="run the same command again (without FRESH=1) to resume"
    if [[ -n $group ]] && kill -TERM -- "-$group" 2>/dev/null; then
        for ((tenth = 0; tenth < 150; tenth++)); do
            kill -0 -- "-$group" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL -- "-$group" 2>/dev/null || true
    fi
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
    if [[ $1 == USR1 && -n $job ]]; then
        if [[ $(saved) == "${saved_before-$restarted}" ]]; then
            how="this start saved nothing, so the job is not requeued: give it more time, and $how"
        elif scontrol requeue "$job"; then
            how="the job is requeued and resumes"
        fi
    fi
    echo "run_grath.sh: ended by SIG$1; $how" >&2
    exit "$2"
}
trap 'end HUP 129' HUP
trap 'end INT 130' INT
trap 'end TERM 143' TERM
trap 'end USR1 138' USR1

settings=$(python -m grath.run settings "$HERE") || {
    status=$?
    ((status == 2)) || echo "run_grath.sh: error: run \`pip install -e . -c constraints.txt\` in $HERE first" >&2
    exit 2
}
eval "$settings" # all settings, RUN, MACHINE and, by iteration: PREFIXES PAIRS COMBINED MODELS RESULTS
echo "GRATH: $ITERATIONS iteration(s) in $RUN${MACHINE:+, on $MACHINE}"
if [[ $DRY_RUN == 0 && $MODEL_NAME_OR_PATH == "$HERE/models/smollm2" && ! -f $MODEL_NAME_OR_PATH/config.json ]]; then
    python -m grath.modeling.smollm2
fi
fold -s -w 118 <<<"$OTHERS" | sed 's/^/  /'

threads=$(($(nproc) / NUM_PROCESSES)) # nproc reads OMP_NUM_THREADS
launch=(
    accelerate launch --quiet --num_processes "$NUM_PROCESSES"
    --num_cpu_threads_per_process "$((threads > 0 ? threads : 1))" --config_file
)
config=$HERE/accelerate_configs/one_gpu.yaml ask=(python)
if ((NUM_PROCESSES > 1)); then
    config=$HERE/accelerate_configs/data_parallel.yaml
    ask=("${launch[@]}" "$config")
fi
launch+=("${ACCELERATE_CONFIG:-$config}")
questions=(--data_name "$DATA_NAME" --subdata_name "$SUBDATA_NAME" --split "$SPLIT")
if [[ -n $DATA_PATH ]]; then questions=(--data_path "$DATA_PATH"); fi
# shellcheck disable=SC2153 # PAIRS comes from the settings
pairs_args=(
    --save_dir "$(dirname -- "${PAIRS[0]}")" "${questions[@]}" --num_query "$NUM_QUERY" --demos "$DEMOS"
    --model_type "$MODEL_TYPE" --seed "$SEED" --max_new_tokens "$MAX_NEW_TOKENS"
    ${PAIRS_BATCH_SIZE:+--batch_size "$PAIRS_BATCH_SIZE"}
)
if [[ -n $SERVER_URL ]]; then
    ask=(python)
    read -ra servers <<<"${SERVER_URL//$'\n'/ }"
    pairs_args+=(--engine server --server_url "${servers[@]}" --server_timeout "$SERVER_TIMEOUT")
else
    pairs_args+=(--precision "$PAIRS_PRECISION")
fi
if [[ $USE_FS == 1 ]]; then pairs_args+=(--useFS); fi
if [[ $USE_GT == 1 ]]; then pairs_args+=(--useGT); fi
dpo_args=(
    --reference "$REFERENCE" --max_steps "$MAX_STEPS" --warmup_steps "$WARMUP_STEPS" --learning_rate "$LEARNING_RATE"
    --beta "$BETA" --max_length "$MAX_LENGTH" --seed "$SEED"
    --save_steps "$SAVE_STEPS" --precision "$DPO_PRECISION" --model_type "$MODEL_TYPE" --report_to "$REPORT_TO"
    ${DPO_BATCH_SIZE:+--per_device_train_batch_size "$DPO_BATCH_SIZE"}
    ${GRADIENT_ACCUMULATION_STEPS:+--gradient_accumulation_steps "$GRADIENT_ACCUMULATION_STEPS"}
)
eval_settings=(
    TASKS="$TASKS" EVAL_PRECISION="$EVAL_PRECISION" EVAL_BATCH_SIZE="$EVAL_BATCH_SIZE" LIMIT="$LIMIT" BACKEND="$BACKEND"
    CHAT_TEMPLATE="$CHAT_TEMPLATE" SAMPLES="$SAMPLES" MODEL_TYPE="$MODEL_TYPE" NUM_PROCESSES="$NUM_PROCESSES"
    SERVER_URL="$SERVER_URL" SERVER_TIMEOUT="$SERVER_TIMEOUT"
)

plan=()
stage() { # TITLE COMMAND...
    local title=$1 status=0 cause=''
    shift
    if [[ $DRY_RUN == 1 ]]; then
        printf '%q ' "$@" && echo
        return
    elif [[ $CHECK == 1 ]]; then
        plan+=("$title")
        return
    fi
    echo "== $title"
    set -m # the stage gets a process group of its own
    "$@" </dev/null &
    set +m
    wait "$!" || status=$?
    if ((status)); then
        if ((status == 137)); then cause=" (the system has killed it: is the memory full?)"; fi
        echo "run_grath.sh: error: $title failed with status $status$cause; run the same command again (without FRESH=1)" \
            "to resume; for other settings, set another RUN_NAME, or FRESH=1 to move the run aside" >&2
        exit "$status"
    fi
}

score() { # ITERATION
    if [[ -n $TASKS ]]; then
        stage "scores of M_$1" env "${eval_settings[@]}" bash "$HERE/evaluation.sh" "${MODELS[$1]}" "${RESULTS[$1]}"
    fi
}

if [[ $DRY_RUN$CHECK == 00 ]]; then
    # shellcheck source=grath/run/lock.sh
    source "$HERE/grath/run/lock.sh"
    lock "$RUN"
    if [[ $FRESH == 1 && -e $RUN ]]; then
        for ((n = 1; ; n++)); do [[ -e $RUN.old-$n ]] || break; done
        mv -- "$RUN" "$RUN.old-$n"
        echo "FRESH=1: moved the old run in $RUN to $RUN.old-$n"
    fi
    mkdir -p -- "$RUN"
    saved_before=$(saved)
    find "$RUN/" \( -name '.*.tmp' -o -name '.*partial' \) -prune -exec rm -rf {} + # left by a kill
fi
score 0
for ((i = 0; i < ITERATIONS; i++)); do
    next=$((i + 1)) pairs=${PAIRS[i]}
    stage "iteration $next: M_$i writes pairs" "${ask[@]}" "$HERE/create_pair_responses.py" \
        --model_name_or_path "${MODELS[i]}" --save_prefix "${PREFIXES[i]}" "${pairs_args[@]}"
    if ((i > 0)); then
        stage "iteration $next: combine with the incorrect answers of iteration 1" \
            python "$HERE/combine_new_correct_ori_wrong.py" --new_data_path "$pairs" --ori_data_path "${PAIRS[0]}"
        pairs=${COMBINED[i]}
    fi
    stage "iteration $next: DPO trains M_$next" "${launch[@]}" "$HERE/dpo.py" --dataset_path "$pairs" \
        --model_name_or_path "${MODELS[i]}" --output_dir "${MODELS[next]}" "${dpo_args[@]}"
    score "$next"
    if [[ $CHECK == 0 ]]; then stage "report" python -m grath.report "$RUN"; fi
done
if [[ $DRY_RUN$CHECK == 01 ]]; then exec python -m grath.run check "${plan[@]}"; fi
if [[ $DRY_RUN == 0 ]]; then echo "Done: see $RUN/report.md; M_$ITERATIONS is the LoRA adapter in ${MODELS[ITERATIONS]}"; fi
