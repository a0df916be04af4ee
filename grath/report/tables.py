"""Tables of scores, and the sentences below them."""

import html
import re

from tabulate import tabulate

from grath.common.errors import printable
from grath.evaluation.results import QUESTIONS, tasks_of
from grath.evaluation.tasks import get_task
from grath.report.paired import asked, paired_difference


def plain(text, marks=r"\\`*_\[\]|~"):
    """Return a text from outside as one line that Markdown shows as it is: no HTML, link, image or table of its own."""
    line = html.escape(printable(" ".join(text.split())), quote=False)
    line = re.sub(rf"([{marks}])", r"\\\1", line)
    return line.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")


def inert(name):
    """Return a name or a setting as `plain` does, with its brackets, underscores and the like as they are."""
    return plain(name, "`|").replace("](", "]\\(")


def table(header, body, numbers=True, style="github"):
    """Format a table; a missing value is a dash. Without `numbers`, every cell is text, not only the first column."""
    texts = [0] if numbers else True
    return tabulate(body, header, style, missingval="-", floatfmt=".3f", disable_numparse=texts)


def score_tables(rows, bases):
    """Format (name, scores) rows, with the base's scores for each, as two tables: for a page, and for the terminal."""
    tasks = tasks_of(rows)
    body = [
        [inert(name), *(score_cell(scores.get(task), base.get(task)) for task in tasks)]
        for (name, scores), base in zip(rows, bases, strict=True)
    ]
    header = ["model", *(get_task(task).title for task in tasks)]
    return [table(header, body, numbers=False, style=style) for style in ("github", "plain")]


def score_cell(score, base):
    """Show a score in percent and its difference from the base's, with the interval of `paired_difference`.

    Where there are no scores of single questions, it shows the standard error instead of an interval. It also shows how
    many of the pooled runs have the task, if not all, and how many contexts exceeded the model's window.
    """
    if score is None:
        return "-"
    text, runs, change = f"{score['score']:.2f}", score.get("runs"), None
    if score["stderr"] is not None and not (base and score[QUESTIONS]):
        text += f" ± {score['stderr']:.2f}"
    if base and base is not score:
        if base["version"] != score["version"]:
            change = "another task version than the base's"
        elif found := paired_difference(base, score):
            change = f"{found[0]:+.2f} [{found[1]:+.2f}, {found[2]:+.2f}]"
        elif base[QUESTIONS] and score[QUESTIONS]:
            change = "other questions than the base's"
        elif not runs:
            change = f"{score['score'] - base['score']:+.2f}"
    cut = score["truncated"] and f"{score['truncated']} contexts cut"
    notes = "; ".join(filter(None, [change, runs, cut]))
    return f"{text} ({notes})" if notes else text


def score_footer(rows):
    """Say with which versions (name, scores) rows were scored, and what a cell of `score_tables` shows."""
    scores = [(task, score) for _, scores in rows for task, score in scores.items()]
    if not scores:
        return ""
    harness = sorted({f"lm-evaluation-harness {score['harness']}" for _, score in scores if score["harness"]})
    versions = sorted({f"{task} {score['version']}" for task, score in scores})
    chat = "chat template ON" if any(score["chat"] for _, score in scores) else "chat template off"
    cells = "percent ± standard error; in brackets the change from the base, with its interval on the same questions"
    return f"({'; '.join([*harness, *versions, chat, cells])})"


def best_iteration(rows):
    """List sentences about (name, scores) rows: the best by MC1 + MC2, and whether all scores after it are lower."""
    lines = []
    for pair in (("truthfulqa_mc1", "truthfulqa_mc2"), ("grath_mc1", "grath_mc2")):
        sums = {
            name: round(sum(scores[task]["score"] for task in pair), 2)
            for name, scores in rows
            if set(pair) <= set(scores) and all(_comparable(scores[task], rows[0][1].get(task)) for task in pair)
        }
        if len(sums) < 2:
            continue
        best = max(sums, key=sums.get)
        names = [name for name, _ in rows]
        later = [sums.get(name, float("inf")) for name in names[names.index(best) + 1 :]]
        lower = later and max(later) < sums[best]
        fall = f"; every later iteration is lower (the last: {later[-1]:.2f})" if lower else ""
        lines.append(f"Best by {' + '.join(get_task(task).title for task in pair)}: {best} ({sums[best]:.2f}){fall}.")
    return lines


def _comparable(score, base):
    return base is None or (score["version"] == base["version"] and asked(score) == asked(base))
