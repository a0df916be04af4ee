"""Statistics of pair files: identical, echoed and negated answers, and the length of answers."""

import re
from statistics import mean

from grath.common.files import read_json, sha256
from grath.common.layout import combined_path, record_path
from grath.common.record import NUMBER, read_record
from grath.pairs.files import read_pairs
from grath.pairs.truth import format_signal, truth_signal

NEGATION = re.compile(r"\b(no|not|never|nothing|none|nobody|cannot|\w+n't)\b", re.IGNORECASE)
MEASURED = {"distance": NUMBER, "probe": NUMBER, "pairs_sha256?": str}
# The keys of `pair_stats`, as columns of a comparison of runs.
OF_OWN_PAIRS = ("asked", "parsed", "identical", "echoed")
COLUMNS = (*OF_OWN_PAIRS, "signal", "distance", "probe", "negated", "words")


def count_identical(rows):
    """Count the pairs whose two answers are the same."""
    return sum(row["correct"] == row["incorrect"] for row in rows)


def negated(answers):
    """Return the share of answers (list of str, not empty) that contain a negation."""
    return sum(bool(NEGATION.search(answer.replace("\u2019", "'"))) for answer in answers) / len(answers)


def pair_stats(path, questions=()):
    """Read what is known about the pairs that an iteration's model wrote: dict with the keys `COLUMNS` and "truth".

    Of the file itself and its record: the numbers of questions "asked", of pairs "parsed", with "identical" answers,
    and with a correct answer that only repeats the question ("echoed"). Of the pairs that DPO trains on (combined, with
    different answers): "truth" (what `truth_signal` returned for `questions`), and, as strings, the "signal" with its
    interval, the shares of correct and incorrect answers that are "negated", and their mean number of "words". Of
    `grath.distance`: "distance" and "probe". What is not known is None.
    """
    record, rows, combined = read_record(record_path(path)) or {}, read_pairs(path), combined_path(path)
    trained_on = combined if combined.is_file() else path
    different = [row for row in read_pairs(trained_on) if row["correct"] != row["incorrect"]]
    sides = [[row[side] for row in different] for side in ("correct", "incorrect")]
    truth = truth_signal(different, questions)
    distance = trained_on.with_suffix(".distance.json")
    measured = read_json(distance, "record of grath.distance", MEASURED) if distance.is_file() else {}
    if "pairs_sha256" in measured and measured["pairs_sha256"] != sha256(trained_on):  # of other pairs
        measured = {}
    return {
        "asked": record.get("counts", {}).get("asked"),
        "parsed": len(rows),
        "identical": count_identical(rows),
        "echoed": sum(_echoes(row["question"], row["correct"]) for row in rows),
        "truth": truth,
        "signal": format_signal(truth),
        "distance": measured.get("distance"),
        "probe": measured.get("probe"),
        "negated": " / ".join(f"{negated(side):.3f}" for side in sides) if different else None,
        "words": " / ".join(f"{mean(len(answer.split()) for answer in side):.1f}" for side in sides)
        if different
        else None,
    }


def _echoes(question, answer):
    question, answer = (re.sub(r"[^\w ]", "", text.lower()).strip() for text in (question, answer))
    return answer in question or question in answer
