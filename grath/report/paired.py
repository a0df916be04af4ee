"""Scores of the same questions: pool runs, and the paired difference between two models."""

from statistics import mean

import numpy

from grath.common.bootstrap import bootstrap_means, interval
from grath.evaluation.results import QUESTIONS


def values(score):
    """Return the scores of single questions: float array in percent, NaN where a question is left out."""
    return 100 * numpy.array(score[QUESTIONS]["scores"], dtype=float)


def asked(score):
    """Return what tells the questions of two scores apart: their hash (None if it is not known) and their number."""
    questions = score[QUESTIONS] or {"sha256": None, "scores": ()}
    return questions["sha256"], len(questions["scores"])


def pool(runs):
    """Average the scores of runs, question by question: a question that one run leaves out counts in the others.

    Args:
        runs: list of dicts as from `read_scores`.

    Returns:
        dict like one of them, with the tasks of all, and no standard errors if there is more than one run. A task that
        some lack is averaged over the others, and "runs" says how many these are, or that their questions differ.
    """
    if len(runs) == 1:
        return runs[0]
    pooled = {}
    for task in dict.fromkeys(task for scores in runs for task in scores):
        found = [scores[task] for scores in runs if task in scores]
        of_task = {**found[0], "score": mean(score["score"] for score in found), "stderr": None, QUESTIONS: None}
        notes = []
        if len({asked(score) for score in found}) > 1:
            notes = ["runs with different questions"]
        elif found[0][QUESTIONS]:
            means = numpy.ma.masked_invalid([values(score) for score in found]).mean(axis=0)
            of_questions = (means / 100).filled(numpy.nan).tolist()
            of_task |= {"score": float(means.mean()), QUESTIONS: {**found[0][QUESTIONS], "scores": of_questions}}
        if len(found) < len(runs):
            notes.append(f"{len(found)} of {len(runs)} runs")
        of_task |= {"runs": "; ".join(notes)} if notes else {}
        pooled[task] = of_task
    return pooled


def paired_difference(base, score):
    """Compare two models on the questions that both have.

    Args:
        base, score: entries of `read_scores`.

    Returns:
        tuple of three floats, in points: the mean difference from the base, and its 95 % bootstrap interval over
        questions. None if scores of single questions are missing, or the questions are not the same.
    """
    if not (base[QUESTIONS] and score[QUESTIONS]) or asked(base) != asked(score):
        return None
    differences = values(score) - values(base)
    differences = differences[~numpy.isnan(differences)]
    if not len(differences):
        return None
    return float(differences.mean()), *interval(bootstrap_means(differences[:, None]))
