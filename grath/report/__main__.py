"""Report on runs: scores of every iteration against the base, pairs, training, sample answers, and a plot.

    python -m grath.report RUN_DIR              write report.md, pairs.json, iterations.png and .svg in the run folder
    python -m grath.report RUN_DIR RUN_DIR ...  compare runs: write comparison.md and comparison.png next to the first
    python -m grath.report RESULTS_DIR          print the scores of one model

Scores are read from the JSON files that the record of a folder names; without a record, from all that
lm-evaluation-harness wrote.
"""

from pathlib import Path

from grath.common.arguments import Parser
from grath.common.errors import UserError, printable, run_main
from grath.common.layout import is_run
from grath.evaluation.results import read_scores
from grath.report.pages import write_comparison, write_report
from grath.report.runs import group_runs, read_run
from grath.report.tables import score_footer, score_tables


def main():
    parser = Parser(__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="run folders, or a folder of result files")
    folders = parser.parse_args().folders
    if len(folders) > 1:
        text = write_comparison(folders[0].resolve().parent, group_runs([read_run(folder) for folder in folders]))
    elif is_run(folders[0]):
        text = write_report(read_run(folders[0]))
    else:
        rows = [(folders[0].name, read_scores(folders[0]))]
        if not rows[0][1]:
            raise UserError(f"{folders[0]} contains neither a run nor results of lm-evaluation-harness")
        text = f"{score_tables(rows, [{}])[1]}\n{score_footer(rows)}"
    print(printable(text))


if __name__ == "__main__":
    run_main(main)
