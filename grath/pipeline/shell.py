"""The settings as `export` lines, which `run_grath.sh` evaluates."""

import os
import re
from shlex import quote

from grath.pipeline.settings import run_folder


def shell_lines(values):
    """Return `export` lines, quoted for a shell, with all settings, the run's folder, its files' suffix and threads."""
    flags = {name: bool(int(values[name])) for name in ("USE_GT", "USE_FS")}
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = re.match(r"\d+", os.environ.get("OMP_NUM_THREADS", ""))  # OpenMP also accepts a list
    processors = int(threads[0]) if threads else allowed
    asked = f"arcc_num_{values['NUM_QUERY']}_useGT_{flags['USE_GT']}_useFS_{flags['USE_FS']}"
    derived = {
        "RUN": str(run_folder(values)),
        "SUFFIX": "gold" if values["GOLD_PAIRS"] else asked,
        "THREADS": str(max(1, processors // int(values["NUM_PROCESSES"]))),
    }
    return "".join(f"export {name}={quote(value)}\n" for name, value in (values | derived).items())
