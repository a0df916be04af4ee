# shellcheck shell=bash
# Sourced by run_grath.sh and evaluation.sh. lock RUN: hold the lock of a run's folder until this process and every stage
# that it has started have ended, however they end. Bad input ends the script with status 2.
lock() {
    local file holder status=0
    file=$(dirname -- "$1")/.$(basename -- "$1").lock
    if ! mkdir -p -- "$(dirname -- "$1")" 2>/dev/null || ! { : >>"$file"; } 2>/dev/null; then
        echo "${0##*/}: error: cannot write to $(dirname -- "$1"): set RUNS_DIR to a folder that can be written to" >&2
        exit 2
    fi
    if ! command -v flock >/dev/null; then
        echo "warning: flock is not installed: do not start a run twice" >&2
        return
    fi
    exec {lock_fd}>>"$file"
    flock -w 3 "$lock_fd" || status=$? # the stage of a start that was just killed may still be ending
    if ((status == 1)); then
        holder=$(<"$file")
        echo "${0##*/}: error: $1 is locked by ${holder:-another process}, or by the stage that it started: wait for it," \
            "or set another RUN_NAME" >&2
        exit 2
    elif ((status)); then
        echo "warning: no locks on this file system: do not start a run twice" >&2
    fi
    echo "process $$ on $(hostname) since $(date -u +%FT%TZ)" >"$file"
}
