"""The report of one run: scores of every iteration against the base, pairs, training, sample answers, and a plot."""

import json
from pathlib import Path

from grath.common.files import atomic_write_text, read_json_lines
from grath.evaluation.results import tasks_of
from grath.pairs.questions import TRUTHFULQA
from grath.report.paired import values
from grath.report.plots import plot_iterations
from grath.report.runs import PAIRS, asked_questions, iterations, manifest_of, score_rows
from grath.report.tables import bases_of, best_iteration, negation_section, score_footer, score_tables

# The paper's main results: the scores of the base and of the last iteration, or the gain where it gives only that.
PAPER = {
    "llama-2-7b-chat": "MC1 30.23 -> 54.71, MC2 45.32 -> 69.10, ARC +5.03, HellaSwag +1.13, MMLU -1.26",
    "zephyr-7b": "MC1 42.23 -> 53.86, MC2 57.83 -> 66.73",
}


def write_report(run_dir):
    """Write report.md, pairs.json and the plots of iterations into a run folder; return the text for the terminal."""
    run_dir = Path(run_dir)
    found = iterations(run_dir, asked_questions(run_dir))
    rows = score_rows(run_dir, found)
    held_out = held_out_sentence(run_dir, rows)
    bases = bases_of(rows)
    page, terminal = score_tables(rows, bases)
    best = best_iteration(rows) if tasks_of(rows) or not held_out else []
    base = str(found[0]["model"] or "not known yet")
    pairs = {number: row["pairs"] for number, row in found.items() if row["pairs"]}
    atomic_write_text(run_dir / PAIRS, json.dumps(pairs, indent=2) + "\n")
    files = ["report.md", PAIRS]
    parts = [
        f"# {run_dir.resolve().name}",
        f"Base model: {base}",
        page,
        score_footer(rows, bases),
        held_out,
        *best,
        *negation_section(rows, bases),
    ]
    if tasks_of(rows):
        plot_iterations(rows, run_dir / "iterations.png", run_dir / "iterations.svg")
        parts.append("![scores by iteration](iterations.png)")
        files += ["iterations.png", "iterations.svg"]
    for name, figures in PAPER.items():
        if name in base.lower():
            parts.append(f"The paper reports for this base: {figures}.")
    parts += ["## Pairs and training", _iterations_table(found)]
    parts += [
        f"- M_{number}: {warning}"
        for number, row in found.items()
        if row["training"]
        for warning in row["training"]["warnings"]
    ]
    manifest = manifest_of(run_dir)
    parts += _stages(manifest["stages"])
    parts += _samples(found)
    parts.append("## Settings")
    if manifest["settings"]:
        settings = "\n".join(f"{name}={value}" for name, value in manifest["settings"].items())
        parts.append(f"```text\n{settings}\n```")
    score_settings = {
        file.read_text(encoding="utf-8") for row in found.values() for file in row["results"].glob("settings.txt")
    }
    parts += ["```text\n" + text.strip() + "\n```" for text in sorted(score_settings)]
    parts.append(made_with(manifest["stages"]))
    atomic_write_text(run_dir / "report.md", "\n\n".join(part for part in parts if part) + "\n")
    lines = [terminal, score_footer(rows, bases), held_out, *best]
    return "\n".join([*filter(None, lines), f"Wrote {', '.join(files)} in {run_dir}"])


def held_out_sentence(run_dir, rows):
    """Say how many questions of TruthfulQA a run on its gold answers is scored on; empty for any other run."""
    if not manifest_of(run_dir)["settings"].get("GOLD_PAIRS", "").startswith(TRUTHFULQA):
        return ""
    scores = [score for _, scores in rows for task, score in scores.items() if task.startswith("truthfulqa_")]
    if not scores:
        return (
            "TruthfulQA is left out: the run has trained on all of its questions, or they have no scores of their own."
        )
    held_out = int((values(scores[0]) >= 0).sum())
    return f"TruthfulQA: the {held_out} questions that the run has not trained on."


def made_with(stages):
    """Name the commits and library versions that the manifest entries `stages` were made with."""
    commits = dict.fromkeys(entry["commit"] for entry in stages if entry.get("commit"))
    found = {}
    for entry in stages:
        for package, version in entry.get("versions", {}).items():
            found.setdefault(package, {})[version or "none"] = None
    lines = [f"Commit: {', '.join(commits) or 'not known'}"]
    if found:
        lines.append("Versions: " + ", ".join(f"{package} {' and '.join(seen)}" for package, seen in found.items()))
    return "\n".join(lines)


def _iterations_table(found):
    from tabulate import tabulate

    header = [
        "iteration",
        "asked",
        "parsed",
        "identical",
        "echoed",
        "truth signal [95 %]",
        "trained on",
        "steps",
        "distance",
        "probe",
        "negated",
        "words",
        "last margin",
        "accuracy",
        "DPO seconds (last start)",
    ]
    body = []
    for number, row in found.items():
        pairs, training = row["pairs"] or {}, found.get(number + 1, {}).get("training") or {}
        if not pairs and not training:
            continue
        cells = [pairs.get(key) for key in ("asked", "parsed", "identical", "echoed", "signal")]
        cells += [training.get(key) for key in ("pairs", "steps")]
        cells += [pairs.get(key) for key in ("distance", "probe", "negated", "words")]
        cells += [training.get(key) for key in ("margin", "accuracy", "seconds")]
        body.append([f"M_{number} -> M_{number + 1}", *cells])
    return tabulate(body, header, tablefmt="github", missingval="-", floatfmt=".3f") if body else "No iteration yet."


def _stages(entries):
    from tabulate import tabulate

    if not entries:
        return []
    rows = [[entry["title"], round(entry["seconds"]), entry["starts"], entry["outcome"]] for entry in entries]
    return ["## Stages", tabulate(rows, ["stage", "seconds, all starts", "starts", "outcome"], tablefmt="github")]


def _samples(found):
    answers = {}
    for number, row in found.items():
        if (row["results"] / "samples.jsonl").is_file():
            for sample in read_json_lines(row["results"] / "samples.jsonl", "sample answers"):
                answers.setdefault(sample["question"], []).append((number, sample["answer"]))
    if not answers:
        return []
    parts = ["## The same questions, iteration by iteration"]
    for question, rows in answers.items():
        parts.append(f"**{question}**")
        parts.append("\n".join(f"- M_{number}: {' '.join(answer.split()) or '(nothing)'}" for number, answer in rows))
    return parts
