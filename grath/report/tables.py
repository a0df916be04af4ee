"""Tables of scores, and the sentences below them."""

from grath.common.errors import UserError
from grath.evaluation.results import read_scores, tasks_of
from grath.evaluation.tasks import get_task


def model_scores(folder):
    """Return the table of the scores in a folder of result files, for the terminal.

    Raises:
        UserError: the folder contains no scores.
    """
    scores = read_scores(folder)
    if not scores:
        raise UserError(f"{folder} contains neither a run nor results of lm-evaluation-harness")
    rows = [(folder.name, scores)]
    return f"{score_table(rows)}\n{score_footer(rows)}"


def score_table(rows, style="simple", differences=True):
    """Format (name, scores) rows as a table with one column per task.

    A cell shows the score in percent, its standard error, and the difference from the first row if `differences`.
    """
    from tabulate import tabulate

    tasks = tasks_of(rows)
    base = rows[0][1] if differences and len(rows) > 1 else {}
    body = [[name, *(_cell(scores.get(task), base.get(task)) for task in tasks)] for name, scores in rows]
    header = ["model", *(get_task(task).title for task in tasks)]
    return tabulate(body, header, tablefmt=style, disable_numparse=True)


def _cell(score, base):
    if score is None:
        return "-"
    text = f"{score['score']:.2f}" + (f" ± {score['stderr']:.2f}" if score["stderr"] is not None else "")
    return text if base is None or base is score else f"{text} ({score['score'] - base['score']:+.2f})"


def score_footer(rows):
    """Name the harness and task versions of (name, scores) rows, and whether the chat template was on."""
    scores = [(task, score) for _, scores in rows for task, score in scores.items()]
    if not scores:
        return ""
    harness = sorted({f"lm-evaluation-harness {score['harness']}" for _, score in scores if score["harness"]})
    versions = sorted({f"{task} {score['version']}" for task, score in scores})
    chat = ["chat template ON" if any(score["chat"] for _, score in scores) else "chat template off"]
    return f"({'; '.join(harness + versions + chat)}; percent ± standard error)"


def best_iteration(rows):
    """List sentences about (name, scores) rows: the best by MC1 + MC2, whether scores fall after it, missing scores."""
    tasks = tasks_of(rows)
    lines = []
    for pair in (("truthfulqa_mc1", "truthfulqa_mc2"), ("grath_mc1", "grath_mc2")):
        sums = {name: sum(scores[task]["score"] for task in pair) for name, scores in rows if set(pair) <= set(scores)}
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
