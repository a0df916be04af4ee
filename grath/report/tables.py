"""Tables of scores, and the sentences below them."""

from grath.evaluation.results import QUESTIONS, tasks_of
from grath.evaluation.tasks import get_task
from grath.report.paired import paired_difference, restrict


def github_table(header, body, numbers=True):
    """Format a table for a page; a missing value is a dash. Without `numbers`, all cells are text."""
    from tabulate import tabulate

    return tabulate(body, header, "github", missingval="-", floatfmt=".3f", disable_numparse=not numbers)


def score_tables(rows, bases):
    """Format (name, scores) rows as a table with one column per task: one for a page, and one for the terminal.

    A cell shows the score in percent and its difference from the base's, with the interval of `paired_difference`.
    Where there are no scores of single questions, it shows the standard error instead of an interval. It also shows how
    many of the pooled runs have the task, if not all.

    Args:
        bases: the base's scores for each row.

    Returns:
        two str.
    """
    from tabulate import tabulate

    tasks = tasks_of(rows)
    body = [
        [name, *(_cell(scores.get(task), base.get(task)) for task in tasks)]
        for (name, scores), base in zip(rows, bases, strict=True)
    ]
    header = ["model", *(get_task(task).title for task in tasks)]
    return [tabulate(body, header, tablefmt=style, disable_numparse=True) for style in ("github", "simple")]


def _cell(score, base):
    if score is None:
        return "-"
    text, runs = f"{score['score']:.2f}", score.get("runs")
    other = None if base is score else base
    if other and (found := paired_difference(base, score)):
        return f"{text} ({found[0]:+.2f} [{found[1]:+.2f}, {found[2]:+.2f}]{f'; {runs}' if runs else ''})"
    if other and other[QUESTIONS] and score[QUESTIONS]:
        return f"{text} (other questions than the base's{f'; {runs}' if runs else ''})"
    if runs:
        return f"{text} ({runs})"
    if score["stderr"] is not None and (not base or not score[QUESTIONS]):
        text += f" ± {score['stderr']:.2f}"
    return f"{text} ({score['score'] - other['score']:+.2f})" if other else text


def negation_section(rows, bases):
    """Format the scores of (name, scores) rows for the questions whose gold answer contains a negation, and the others.

    Args:
        bases: the base's scores for each row.

    Returns:
        list of str, the paragraphs of a page; empty if no task has such questions.
    """
    from tabulate import tabulate

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
        body.append([name, *(_cell(of_model, of_base or of_model) for of_model, of_base in parts)])
    header = ["model", *(f"{get_task(task).title}, {'negated' if negated else 'others'}" for task, negated in columns)]
    return [
        "## Questions whose gold answer contains a negation, and the others",
        tabulate(body, header, tablefmt="github", disable_numparse=True),
        "A model that takes a negated choice wherever there is one gains in the first group, whatever it knows.",
    ]


def _has_negated(score):
    return bool(score and score[QUESTIONS] and "negated" in score[QUESTIONS])


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
    """List sentences about (name, scores) rows: the best by MC1 + MC2, whether scores fall after it, missing scores."""
    tasks = tasks_of(rows)
    lines = []
    for pair in (("truthfulqa_mc1", "truthfulqa_mc2"), ("grath_mc1", "grath_mc2")):
        sums = {
            name: round(sum(scores[task]["score"] for task in pair), 2)
            for name, scores in rows
            if set(pair) <= set(scores)
        }
        if len(sums) < 2:
            continue
        names = list(sums)
        best = max(sums, key=sums.get)
        later = names[names.index(best) + 1 :]
        lower = later and all(sums[name] < sums[best] for name in later)
        fall = f"; every later iteration is lower (the last: {sums[later[-1]]:.2f})" if lower else ""
        lines.append(f"Best by {' + '.join(get_task(task).title for task in pair)}: {best} ({sums[best]:.2f}){fall}.")
    for name, scores in rows:
        missing = [get_task(task).title for task in tasks if task not in scores]
        if missing or not tasks:
            lines.append(f"No score of {name} yet" + (f": {', '.join(missing)}." if tasks else "."))
    return lines
