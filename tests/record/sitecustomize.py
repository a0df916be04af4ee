"""Python imports this file by its name at every start: it notes the command line in the file RECORD_COMMANDS."""

import json
import os
import sys

if os.environ.get("RECORD_COMMANDS"):
    with open(os.environ["RECORD_COMMANDS"], "a", encoding="utf-8") as file:  # noqa: PTH123 (before `site` is whole)
        file.write(json.dumps(sys.orig_argv) + "\n")
