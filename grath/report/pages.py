"""The report of a run, and the comparison of several."""

import json

from grath.common.files import atomic_write_text, read_json_lines
from grath.common.layout import PAIR_STATS, REPORT, SAMPLES, results_path
from grath.evaluation.results import tasks_of
from grath.pairs.stats import COLUMNS, OF_OWN_PAIRS
from grath.report.plots import plot_scores
from grath.report.runs import model_label, model_name
from grath.report.tables import best_iteration, inert, plain, score_footer, score_tables, table

SAMPLE = {"question": str, "answer": str}
COMPARISON = "comparison.md"
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


def write_report(run, note=""):
    """Write report.md, pairs.json and the plots of iterations into a run's folder; return the text for the terminal.

    Args:
        run: what `read_run` returned.
        note: a sentence below the scores.
    """
    folder, models = run["folder"], run["models"]
    rows = [(model_name(number), model["scores"]) for number, model in models.items()]
    page, terminal = score_tables(rows, [rows[0][1]] * len(rows) if len(rows) > 1 else [{}])
    sentences = [text for text in (note, *best_iteration(rows)) if text]
    base = run["settings"]["base model"] or "not known yet"
    pairs = {number: model["pairs"] for number, model in models.items() if model["pairs"]}
    atomic_write_text(folder / PAIR_STATS, json.dumps(pairs, indent=2) + "\n")
    files = [REPORT, PAIR_STATS]
    parts = [f"# {inert(folder.resolve().name)}", f"Base model: {inert(base)}", page, score_footer(rows), *sentences]
    if tasks := tasks_of(rows):
        plots = ["iterations.png", "iterations.svg"]
        plot_scores({run["name"]: models}, tasks, *(folder / plot for plot in plots))
        parts.append("![scores by iteration](iterations.png)")
        files += plots
    parts += ["## Pairs and training", _iterations_table(models)]
    records = [(number, stage, record) for number in models for stage, record in models[number]["records"].items()]
    parts += [f"- M_{number}: {plain(text)}" for number, _, record in records for text in record.get("warnings", [])]
    if records:
        stages = [
            [TITLES[stage].format(number, number + 1), round(record["seconds"]), record["starts"]]
            for number, stage, record in records
        ]
        parts += ["## Stages", table(["stage", "seconds, all starts", "starts"], stages)]
    parts += _samples(folder, models)
    if any(run["settings"].values()):
        parts += ["## Settings", settings_table(run["settings"])]
    parts.append(made_with([record for *_, record in records]))
    atomic_write_text(folder / REPORT, "\n\n".join(part for part in parts if part) + "\n")
    return "\n".join([terminal, *sentences, f"Wrote {', '.join(files)} in {folder}"])


def settings_table(settings):
    """Format the settings of a run (dict of str) as a table, without those of DPO that the paper does not name."""
    hidden = {name for name in settings if name.startswith("dpo ")} - {f"dpo {name}" for name in DPO_SETTINGS}
    shown = [[inert(name), inert(value)] for name, value in settings.items() if value and name not in hidden]
    return table(["setting", "value"], shown, numbers=False)


def _iterations_table(models):
    body = []
    for number, model in models.items():
        pairs, trained = model["pairs"] or {}, models.get(number + 1)
        if not pairs and not trained:
            continue
        log, used = (trained["training"], trained["records"]["dpo"]["pairs"]) if trained else ([], {})
        last = next((entry for entry in reversed(log) if "rewards/margins" in entry), {})
        of_training = [last.get(name) for name in ("step", "rewards/margins", "rewards/accuracies")]
        body.append([f"M_{number} -> M_{number + 1}", *map(pairs.get, COLUMNS), used.get("kept"), *of_training])
    of_pairs = ["truth signal [95 %]" if name == "signal" else name for name in COLUMNS]
    header = ["iteration", *of_pairs, "trained on", "steps", "last margin", "accuracy"]
    return table(header, body) if body else "No iteration yet."


def _samples(folder, models):
    answers = {}
    for number in models:
        file = results_path(folder, number) / SAMPLES
        for sample in read_json_lines(file, "sample answers", SAMPLE) if file.is_file() else ():
            answer = plain(sample["answer"]) or "(nothing)"
            answers.setdefault(f"**{plain(sample['question'])}**", []).append(f"- M_{number}: {answer}")
    parts = [part for question, lines in answers.items() for part in (question, "\n".join(lines))]
    return ["## The same questions, iteration by iteration", *parts] if parts else []


def made_with(records):
    """Name the commits and library versions in records."""
    commits = dict.fromkeys(record["commit"] for record in records if record.get("commit"))
    found = {}
    for record in records:
        for package, version in record.get("versions", {}).items():
            found.setdefault(package, {})[version or "none"] = None
    versions = ", ".join(f"{inert(package)} {' and '.join(seen)}" for package, seen in found.items())
    return f"Commit: {', '.join(commits) or 'not known'}" + (f"\nVersions: {versions}" if found else "")


def write_comparison(folder, groups):
    """Write comparison.md and comparison.png into a folder (Path); return the text for the terminal.

    Args:
        groups: what `group_runs` returned.
    """
    rows, bases = score_rows(groups)
    page, terminal = score_tables(rows, bases)
    footer, tasks, files = score_footer(rows), tasks_of(rows), [COMPARISON]
    parts = ["# Runs compared", _differing_settings(groups), page, footer, _pairs_table(groups)]
    if tasks:
        plot_scores({group["name"]: group["models"] for group in groups}, tasks, folder / "comparison.png")
        parts.append("![scores of the runs by iteration](comparison.png)")
        files.append("comparison.png")
    atomic_write_text(folder / COMPARISON, "\n\n".join(part for part in parts if part) + "\n")
    return "\n".join([terminal, footer, f"Wrote {', '.join(files)} in {folder}"])


def score_rows(groups):
    """Return (name, scores) rows of all models, and the base's scores for each; a base is shown once."""
    rows, bases, shown = [], [], []
    for group in groups:
        for number, model in group["models"].items():
            if number == 0:
                scores = {task: round(score["score"], 6) for task, score in model["scores"].items()}
                key = (group["settings"]["base model"], scores)
                if key in shown:
                    continue
                shown.append(key)
            rows.append((model_label(group, number), model["scores"]))
            bases.append(model["base"] if number else model["scores"])
    return rows, bases


def _differing_settings(groups):
    """Format the settings that differ between the groups that have their stage, or between the runs of one."""
    values = {}
    for group in groups:
        for name, value in group["settings"].items():
            values.setdefault(name, set()).add(value)
    differing = [name for name in values if len(values[name]) > 1 or any(", " in value for value in values[name])]
    body = [[inert(group["name"]), *(inert(group["settings"].get(name, "")) for name in differing)] for group in groups]
    return table(["run", *differing], body, numbers=False)


def _pairs_table(groups):
    body = [
        [inert(group["name"]), f"M_{number}", *map(stats.get, COLUMNS)]
        for group in groups
        for number, model in group["models"].items()
        for stats in model["pairs"]
    ]
    note = f"({', '.join(OF_OWN_PAIRS)}: of the pairs that the model wrote; the rest: of those that DPO trains on)"
    return table(["run", "pairs by", *COLUMNS], body) + f"\n\n{note}" if body else ""
