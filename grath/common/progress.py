"""Progress bars of our long tasks."""

import sys


def progress_bar(*args, shown=True, **options):
    """Return a `tqdm` bar. In a log file it is updated every 15 seconds."""
    from tqdm import tqdm

    seconds = 0.1 if sys.stderr.isatty() else 15
    return tqdm(*args, disable=not shown, mininterval=seconds, maxinterval=max(10, seconds), **options)
