"""Python imports this file by its name at every start: it sends a signal to the run at the point that FAULT names.

The signal goes to the loop, whose process id is LOOP. SIGKILL goes to the stage's process group too: the machine fails.

FAULT is JSON: "program" (part of the process's command line), "event" (of Python's audit events, raised just before the
thing happens), "path" (regular expression), "count" (which of the matching events; 1), "cut" (a file to cut in half
first, as a kill in the middle of its writing leaves it; "source" is what would be renamed), "signal" (SIGKILL), or
"limit" (bytes that a file of this process may have from here on, for a full disk).
"""

import json
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path

FAULT = json.loads(os.environ.get("FAULT", "null"))
WRITES = os.O_WRONLY | os.O_RDWR
seen = 0
hit = False


def path_of(event, args):
    if event == "open":
        return str(args[0]) if args[2] & WRITES else ""
    return str(args[1] if event == "os.rename" else args[0])


def hook(event, args):
    global seen, hit
    if hit or event != FAULT["event"] or not re.search(FAULT["path"], path_of(event, args)):
        return
    seen += 1
    if seen < FAULT.get("count", 1):
        return
    hit = True
    if cut := FAULT.get("cut"):
        here = Path(path_of(event, args)).parent
        file = Path(args[0]) if cut == "source" else next(here.glob(cut))
        os.truncate(file, file.stat().st_size // 2)
    if (limit := FAULT.get("limit")) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return
    number = signal.Signals[FAULT.get("signal", "SIGKILL")]
    os.kill(int(os.environ["LOOP"]), number)
    if number == signal.SIGKILL:
        os.killpg(0, number)
    time.sleep(7200)  # until this process is ended too


if FAULT and FAULT["program"] in " ".join(sys.orig_argv):
    sys.addaudithook(hook)
