# shellcheck shell=bash
# bash reads this file at every start of a script (BASH_ENV): it notes the command line in the file RECORD_COMMANDS.
# In one write, because several scripts can start at once.
if [[ -n ${RECORD_COMMANDS:-} && $0 == *.sh ]]; then
    python3 -S -c 'import json, os, sys
names = ("DRY_RUN", "CHECK", "FRESH", "RUN_NAME", "DEMOS", "USE_GT", "TASKS", "BACKEND", "SERVER_URL",
         "GOLD_PAIRS", "ITERATIONS", "MODEL_NAME_OR_PATH")
given = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
os.write(1, (json.dumps([*given, *sys.argv[1:]]) + "\n").encode())' "$0" "$@" >>"$RECORD_COMMANDS"
fi
