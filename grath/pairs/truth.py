"""The truth signal of pairs: how much more often correct answers mean the gold answer than incorrect ones do."""

import re
from collections import Counter

from grath.common.bootstrap import bootstrap_means, interval

STOP_WORDS = frozenset(
    """
    a about above after all also an and any are as at be because been before being below between both but by can
    could did do does during each for from had has have he her here him his how i if in into is it its itself may
    might more most must my of off on once one only or other our out over own she should so some such than that the
    their them then there these they this those through to too under up very was we were what when where which while
    who whom why will with would you your
    """.split()  # noqa: SIM905
)


def content_words(text):
    """Return the words of a text in lower case, without stop words: Counter."""
    return Counter(word for word in re.findall(r"\w+", text.lower()) if word not in STOP_WORDS)


def token_f1(first, second):
    """Return the F1 of two Counters of words: 2 |common| / (|first| + |second|), or 0 if both are empty."""
    return 2 * (first & second).total() / max(1, first.total() + second.total())


def nearest_choice(answer, choices):
    """Return the index of the choice with the highest `token_f1` to an answer; None if it is 0 or two choices tie."""
    words = content_words(answer)
    scores = [token_f1(words, content_words(choice)) for choice in choices]
    best = max(scores)
    return scores.index(best) if best > 0 and scores.count(best) == 1 else None


def truth_signal(rows, questions):
    """Measure the truth signal of pairs with a 95 % bootstrap interval over pairs.

    Args:
        rows: list of pairs. Those with equal answers, which DPO drops, do not count.
        questions: list of dicts as in `grath.pairs.questions`; a pair belongs to the first one with its text.

    Returns:
        dict, or None if one side has no answer that is nearest to one choice: "correct" and "incorrect", the shares of
        such answers whose nearest choice is the gold answer; "decided" and "undecided", the numbers of answers with and
        without one nearest choice (correct, incorrect); "signal", the difference of the shares; "interval" (low, high).
    """
    import numpy

    known = {question["question"]: question for question in reversed(questions)}
    rows = [row for row in rows if row["question"] in known and row["correct"] != row["incorrect"]]

    def is_gold(row, side):
        question = known[row["question"]]
        nearest = nearest_choice(row[side], question["choices"])
        return numpy.nan if nearest is None else float(nearest == question["answer"])

    # (pairs, 2): 1 gold, 0 another choice, nan undecided.
    gold = numpy.array([[is_gold(row, side) for side in ("correct", "incorrect")] for row in rows]).reshape(-1, 2)
    decided = ~numpy.isnan(gold)
    if not decided.any(axis=0).all():
        return None
    means = bootstrap_means(gold)
    correct, incorrect = numpy.nanmean(gold, axis=0).tolist()
    return {
        "correct": correct,
        "incorrect": incorrect,
        "decided": decided.sum(axis=0).tolist(),
        "undecided": (~decided).sum(axis=0).tolist(),
        "signal": correct - incorrect,
        "interval": interval(means[:, 0] - means[:, 1]),
    }


def format_signal(found):
    """Format what `truth_signal` returned as "+0.168 [+0.070, +0.266]"; None stays None."""
    if found is None:
        return None
    low, high = found["interval"]
    return f"{found['signal']:+.3f} [{low:+.3f}, {high:+.3f}]"
