"""Show how a training changes the scores step by step: accuracy and margin of DPO, and the change of every score.

    python results/dose.py RUN_DIR [RUN_DIR ...]

Score the checkpoints first: ./evaluation.sh RUN_DIR/models/iter_1_.../checkpoint-40 RUN_DIR/results/step_40
"""

from pathlib import Path

from study import is_fold

from grath.common.arguments import Parser
from grath.common.errors import UserError, run_main
from grath.evaluation.results import read_scores, tasks_of
from grath.evaluation.tasks import get_task
from grath.report.runs import read_run
from grath.report.tables import score_cell, table

NO_MODEL = {"training": ()}


def dose_rows(folder):
    """Return (name, steps, accuracy, margin, scores, those of the base) for every scored step of M_1's training."""
    run = read_run(folder)
    log = {entry["step"]: entry for entry in run["models"].get(1, NO_MODEL)["training"] if "rewards/margins" in entry}
    if not log or is_fold(run):
        raise UserError(f"{folder} has no training with a log, or one about questions of TruthfulQA")
    steps = {path.name.removeprefix("step_"): path for path in folder.glob("results/step_*")}
    scored = {int(step): read_scores(path) for step, path in steps.items() if step.isdecimal()}
    scored[max(log)] = run["models"][1]["scores"]
    if unknown := scored.keys() - log.keys():
        raise UserError(f"{folder}: the log has no step {min(unknown)}, only {', '.join(map(str, log))}")
    base = run["models"][0]["scores"]
    return [
        (folder.resolve().name, step, log[step]["rewards/accuracies"], log[step]["rewards/margins"], scores, base)
        for step, scores in sorted(scored.items())
    ]


def main():
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    rows = [row for folder in parser.parse_args().runs for row in dose_rows(folder)]
    tasks = tasks_of([(name, scores) for name, *_, scores, _ in rows])
    body = [
        [name, str(step), f"{accuracy:.2f}", f"{margin:.2f}"]
        + [score_cell(scores.get(task), base.get(task)) for task in tasks]
        for name, step, accuracy, margin, scores, base in rows
    ]
    header = ["run", "steps", "accuracy", "margin", *(get_task(task).title for task in tasks)]
    print(table(header, body, numbers=False))


if __name__ == "__main__":
    run_main(main)
