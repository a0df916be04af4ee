"""Scores of the same questions: restrict them, pool runs, and the paired difference between two models."""

from grath.common.bootstrap import bootstrap_means, interval
from grath.evaluation.results import QUESTIONS


def values(score):
    """Return the scores of single questions: float array in percent, NaN where a question is left out."""
    import numpy

    return 100 * numpy.array(score[QUESTIONS]["scores"], dtype=float)


def restrict(score, kept):
    """Return an entry of `read_scores` for some of its questions; None if none of them is kept.

    Args:
        kept: for each question, whether it is kept.
    """
    import numpy

    of_questions = numpy.where(kept, values(score), numpy.nan)
    found = of_questions[~numpy.isnan(of_questions)]
    if not len(found):
        return None
    stderr = float(found.std(ddof=1)) / len(found) ** 0.5 if len(found) > 1 else None
    questions = {**score[QUESTIONS], "scores": (of_questions / 100).tolist()}
    return {**score, "score": float(found.mean()), "stderr": stderr, QUESTIONS: questions}


def pool(runs):
    """Average the scores of runs, question by question: a question that one run leaves out counts in the others.

    Args:
        runs: list of dicts as from `read_scores`.

    Returns:
        dict like one of them, with the tasks of all, and no standard errors if there is more than one run. A task that
        some lack is averaged over the others, and "runs" says how many these are.
    """
    import numpy

    if len(runs) == 1:
        return runs[0]
    pooled = {}
    for task in dict.fromkeys(task for scores in runs for task in scores):
        found = [scores[task] for scores in runs if task in scores]
        pooled[task] = {
            **found[0],
            "score": sum(score["score"] for score in found) / len(found),
            "stderr": None,
            QUESTIONS: None,
        }
        if len({(score[QUESTIONS] or {}).get("sha256") for score in found}) == 1 and found[0][QUESTIONS]:
            rows = numpy.array([values(score) for score in found])
            counts = (~numpy.isnan(rows)).sum(0)
            means = numpy.where(counts, numpy.nansum(rows, axis=0) / numpy.maximum(counts, 1), numpy.nan)
            pooled[task][QUESTIONS] = {**found[0][QUESTIONS], "scores": (means / 100).tolist()}
            pooled[task]["score"] = float(numpy.nanmean(means))
        if len(found) < len(runs):
            pooled[task]["runs"] = f"{len(found)} of {len(runs)} runs"
    return pooled


def paired_difference(base, score):
    """Compare two models on the questions that both have.

    Args:
        base, score: entries of `read_scores`.

    Returns:
        tuple of three floats, in points: the mean difference from the base, and its 95 % bootstrap interval over
        questions. None if scores of single questions are missing, or the questions are not the same.
    """
    import numpy

    if not (base[QUESTIONS] and score[QUESTIONS]) or base[QUESTIONS]["sha256"] != score[QUESTIONS]["sha256"]:
        return None
    differences = values(score) - values(base)
    differences = differences[~numpy.isnan(differences)]
    if not len(differences):
        return None
    return float(differences.mean()), *interval(bootstrap_means(differences[:, None]))
