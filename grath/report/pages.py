"""The report of a run, and the comparison of several."""

import json

from grath.common.errors import UserError
from grath.common.files import atomic_write_text, read_json_lines
from grath.common.layout import PAIR_STATS, REPORT, SAMPLES
from grath.evaluation.results import read_scores, tasks_of
from grath.pairs.stats import COLUMNS, OF_OWN_PAIRS
from grath.report.plots import plot_comparison, plot_iterations
from grath.report.runs import is_run, model_label, read_run
from grath.report.tables import best_iteration, github_table, negation_section, score_footer, score_tables

# The paper's main results: the scores of the base and of the last iteration, or the gain where it gives only that.
PAPER = {
    "llama-2-7b-chat": "MC1 30.23 -> 54.71, MC2 45.32 -> 69.10, ARC +5.03, HellaSwag +1.13, MMLU -1.26",
    "zephyr-7b": "MC1 42.23 -> 53.86, MC2 57.83 -> 66.73",
}
# What a report shows of DPO's settings; their record has all.
DPO_SETTINGS = (
    "dataset_name", "reference", "model_type", "max_steps", "warmup_steps", "learning_rate", "beta", "max_length",
    "lora_r", "lora_alpha", "optim", "precision", "pairs in a step",
)  # fmt: skip
TITLES = {
    "dpo": "iteration {0}: DPO trains M_{0}",
    "scores": "scores of M_{0}",
    "pairs": "iteration {1}: M_{0} writes pairs",
}


def model_scores(folder):
    """Return the table of the scores in a folder of result files, for the terminal.

    Raises:
        UserError: the folder contains no scores.
    """
    scores = read_scores(folder)
    if not scores:
        raise UserError(f"{folder} contains neither a run nor results of lm-evaluation-harness")
    rows = [(folder.name, scores)]
    return f"{score_tables(rows, [{}])[1]}\n{score_footer(rows)}"


def write_report(run, note=""):
    """Write report.md, pairs.json and the plots of iterations into a run's folder; return the text for the terminal.

    Args:
        run: what `read_run` returned.
        note: a sentence below the scores.
    """
    folder, models = run["folder"], run["models"]
    rows = [(_name(number), model["scores"]) for number, model in models.items()]
    bases = [rows[0][1]] * len(rows) if len(rows) > 1 else [{}]
    page, terminal = score_tables(rows, bases)
    sentences = [score_footer(rows), note, *best_iteration(rows)]
    base = str(models[0]["name"] or "not known yet")
    pairs = {number: model["pairs"] for number, model in models.items() if model["pairs"]}
    atomic_write_text(folder / PAIR_STATS, json.dumps(pairs, indent=2) + "\n")
    files = [REPORT, PAIR_STATS]
    parts = [f"# {folder.resolve().name}", f"Base model: {base}", page, *sentences, *negation_section(rows, bases)]
    if tasks_of(rows):
        plots = ["iterations.png", "iterations.svg"]
        plot_iterations(rows, *(folder / plot for plot in plots))
        parts.append("![scores by iteration](iterations.png)")
        files += plots
    parts += [f"The paper reports for this base: {PAPER[name]}." for name in PAPER if name in base.lower()]
    parts += ["## Pairs and training", _iterations_table(models)]
    records = [(number, stage, record) for number in models for stage, record in models[number]["records"].items()]
    parts += [f"- M_{number}: {text}" for number, _, record in records for text in record.get("warnings", [])]
    if records:
        stages = [
            [TITLES[stage].format(number, number + 1), round(record["seconds"]), record["starts"]]
            for number, stage, record in records
        ]
        parts += ["## Stages", github_table(["stage", "seconds, all starts", "starts"], stages)]
    parts += _samples(models)
    settings = [item for item in run["settings"].items() if _is_shown(item[0])]
    if settings:
        parts += ["## Settings", github_table(["setting", "value"], settings, numbers=False)]
    parts.append(_made_with([record for *_, record in records]))
    atomic_write_text(folder / REPORT, "\n\n".join(part for part in parts if part) + "\n")
    return "\n".join([terminal, *filter(None, sentences), f"Wrote {', '.join(files)} in {folder}"])


def _name(number):
    return f"M_{number}" + (" (base)" if number == 0 else "")


def _is_shown(setting):
    stage, _, name = setting.partition(" ")
    return stage != "dpo" or name in DPO_SETTINGS


def _iterations_table(models):
    of_pairs = {"truth signal [95 %]" if name == "signal" else name: name for name in COLUMNS}
    body = []
    for number, model in models.items():
        pairs, trained = model["pairs"] or {}, models.get(number + 1)
        if not pairs and not trained:
            continue
        training, record = (trained["training"], trained["records"]["dpo"]) if trained else ([], {})
        last = next((entry for entry in reversed(training) if "loss" in entry), {})
        cells = [pairs.get(name) for name in of_pairs.values()]
        cells += [(record.get("pairs") or {}).get("kept"), last.get("step")]
        cells += [last.get(f"rewards/{name}") for name in ("margins", "accuracies")]
        body.append([f"M_{number} -> M_{number + 1}", *cells])
    header = ["iteration", *of_pairs, "trained on", "steps", "last margin", "accuracy"]
    return github_table(header, body) if body else "No iteration yet."


def _samples(models):
    answers = {}
    for number, model in models.items():
        if (model["results"] / SAMPLES).is_file():
            for sample in read_json_lines(model["results"] / SAMPLES, "sample answers"):
                answer = " ".join(sample["answer"].split()) or "(nothing)"
                answers.setdefault(f"**{sample['question']}**", []).append(f"- M_{number}: {answer}")
    parts = [part for question, lines in answers.items() for part in (question, "\n".join(lines))]
    return ["## The same questions, iteration by iteration", *parts] if parts else []


def _made_with(records):
    """Name the commits and library versions in records."""
    commits = dict.fromkeys(record["commit"] for record in records if record.get("commit"))
    found = {}
    for record in records:
        for package, version in record.get("versions", {}).items():
            found.setdefault(package, {})[version or "none"] = None
    versions = ", ".join(f"{package} {' and '.join(seen)}" for package, seen in found.items())
    return f"Commit: {', '.join(commits) or 'not known'}" + (f"\nVersions: {versions}" if found else "")


def read_runs(folders):
    """Read several runs: list of what `read_run` returns.

    Raises:
        UserError: one of the folders is not that of a run.
    """
    for folder in folders:
        if not is_run(folder):
            raise UserError(f"{folder} is not a run folder: it contains neither models, data nor scores of M_0")
    return [read_run(folder) for folder in folders]


def write_comparison(folder, groups, extra=None):
    """Write comparison.md and comparison.png into a folder; return the text for the terminal.

    Args:
        folder: Path.
        groups: what `group_runs` returned.
        extra: function of the tasks with scores; it writes more plots, and returns their names and more paragraphs.
    """
    rows, bases = _score_rows(groups)
    page, terminal = score_tables(rows, bases)
    footer, tasks, files = score_footer(rows), tasks_of(rows), ["comparison.md"]
    parts = ["# Runs compared", _differing_settings(groups), page, footer, *negation_section(rows, bases)]
    parts.append(_pairs_table(groups))
    if tasks:
        plot_comparison(groups, tasks, folder / "comparison.png")
        parts.append("![scores of the runs by iteration](comparison.png)")
        files.append("comparison.png")
        more_files, more_parts = extra(tasks) if extra else ([], [])
        files, parts = [*files, *more_files], [*parts, *more_parts]
    atomic_write_text(folder / "comparison.md", "\n\n".join(part for part in parts if part) + "\n")
    return "\n".join([terminal, footer, f"Wrote {', '.join(files)} in {folder}"])


def _score_rows(groups):
    """Return (name, scores) rows of all models, and the base's scores for each; a base is shown once."""
    rows, bases, shown = [], [], []
    for group in groups:
        for number, model in group["models"].items():
            if number == 0:
                key = {task: round(score["score"], 6) for task, score in model["scores"].items()}
                if key in shown:
                    continue
                shown.append(key)
            base = model["scores"] if number == 0 else model["base"]
            rows.append((model_label(group, number) + (" (base)" if number == 0 else ""), model["scores"]))
            bases.append(base)
    return rows, bases


def _differing_settings(groups):
    """Format the settings of a stage that differ between the groups that have it, or between the runs of one."""

    def values(name):
        of_stage = [group["settings"] for group in groups if _stages(group["settings"]) >= _stages([name])]
        return {settings.get(name, "") for settings in of_stage}

    names = dict.fromkeys(name for group in groups for name in group["settings"])
    differing = [name for name in names if len(values(name)) > 1 or any(", " in value for value in values(name))]
    body = [[group["name"], *(group["settings"].get(name, "") for name in differing)] for group in groups]
    return github_table(["run", *differing], body, numbers=False)


def _stages(settings):
    return {name.partition(" ")[0] for name in settings}


def _pairs_table(groups):
    body = [
        [group["name"], f"M_{number}", *(stats[name] for name in COLUMNS)]
        for group in groups
        for number, model in group["models"].items()
        for stats in model["pairs"]
    ]
    if not body:
        return ""
    own = ", ".join(OF_OWN_PAIRS)
    note = f"({own}: of the pairs that the model wrote; the rest: of those that DPO trains on)"
    return github_table(["run", "pairs by", *COLUMNS], body) + "\n\n" + note
