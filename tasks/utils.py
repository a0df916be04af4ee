"""Functions that the task files of the bundled truthfulness set call."""

import json
from pathlib import Path

from datasets import Dataset

from grath.evaluation.tasks import mc2

DATA = Path(__file__).resolve().parent.parent / "data" / "truthfulness_mc.jsonl"


def load(**_):
    """Load the bundled set as the splits that the harness expects."""
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    return {"validation": Dataset.from_list(rows)}


def process_results_mc2(doc, results):
    """Compute MC2 of a question."""
    return {"acc": mc2([log_likelihood for log_likelihood, _ in results], doc["mc2_targets"]["labels"])}
