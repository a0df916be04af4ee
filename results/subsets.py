"""Scores of some of the questions: those held out of a training, and those whose gold answer contains a negation."""

from grath.evaluation.results import QUESTIONS, tasks_of
from grath.evaluation.tasks import get_task
from grath.report.paired import values
from grath.report.tables import score_cell, table


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


def negation_section(rows, bases):
    """Format the scores of (name, scores) rows for the questions whose gold answer contains a negation, and the others.

    Args:
        bases: the base's scores for each row.

    Returns:
        list of str, the paragraphs of a page; empty if no task has such questions.
    """
    tasks = [task for task in tasks_of(rows) if any(_has_negated(scores.get(task)) for _, scores in rows)]
    if not tasks:
        return []
    columns = [(task, negated) for task in tasks for negated in (1, 0)]

    def part(scores, task, negated):
        score = scores.get(task)
        if not _has_negated(score):
            return None
        return restrict(score, [value == negated for value in score[QUESTIONS]["negated"]])

    body = []
    for (name, scores), base in zip(rows, bases, strict=True):
        parts = [(part(scores, *column), scores is not base and part(base, *column)) for column in columns]
        body.append([name, *(score_cell(of_model, of_base or of_model) for of_model, of_base in parts)])
    header = ["model", *(f"{get_task(task).title}, {'negated' if negated else 'others'}" for task, negated in columns)]
    return [
        "## Questions whose gold answer contains a negation, and the others",
        table(header, body, numbers=False),
        "A model that takes a negated choice wherever there is one gains in the first group, whatever it knows.",
    ]


def _has_negated(score):
    return bool(score and score[QUESTIONS] and "negated" in score[QUESTIONS])
