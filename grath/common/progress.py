"""Progress bars: one for each long task of ours, and none from the libraries."""

import os
import sys


def hide_library_bars():
    """Hide the bars that libraries show; those of downloads stay. Call it before `tqdm` is imported."""
    os.environ.setdefault("TQDM_DISABLE", "1")


def progress_bar(*args, shown=True, **options):
    """Return a `tqdm` bar. In a log file it is updated every 15 seconds."""
    from tqdm import tqdm

    seconds = 0.1 if sys.stderr.isatty() else 15
    return tqdm(*args, disable=not shown, mininterval=seconds, maxinterval=max(10, seconds), **options)
