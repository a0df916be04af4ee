"""Report on runs: scores of every iteration against the base, pairs, training, sample answers, and a plot.

    python -m grath.report RUN_DIR              write report.md, pairs.json, iterations.png and .svg in the run folder
    python -m grath.report RUN_DIR RUN_DIR ...  compare runs: write comparison.md and comparison.png next to the first
    python -m grath.report RESULTS_DIR          print the scores of one model

Scores are read from all JSON files that lm-evaluation-harness wrote, whatever their names.
"""

from pathlib import Path

from grath.common.arguments import Parser
from grath.common.errors import run_main
from grath.report.pages import model_scores, write_comparison, write_report
from grath.report.runs import group_runs, is_run, read_run


def main():
    parser = Parser(__doc__)
    parser.add_argument(
        "folders", type=Path, nargs="+", help="a run folder, several run folders, or a folder of result files"
    )
    folders = parser.parse_args().folders
    if len(folders) > 1:
        print(write_comparison(folders[0].resolve().parent, group_runs([read_run(folder) for folder in folders])))
    elif is_run(folders[0]):
        print(write_report(read_run(folders[0])))
    else:
        print(model_scores(folders[0]))


if __name__ == "__main__":
    run_main(main)
