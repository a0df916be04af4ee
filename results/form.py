"""Leave out the pairs in which only one answer contains a negation: how much of a change is the form of the answers.

    python results/form.py PAIRS OUT --only incorrect     without those in which only the incorrect answer denies
    python results/form.py PAIRS OUT --only correct       the mirror image

It is an analysis, not a recipe: it says nothing about the truth of what is left.
"""

from pathlib import Path

from study import ROWS

from grath.common.arguments import Parser
from grath.common.errors import run_main
from grath.common.layout import record_path
from grath.common.record import read_record
from grath.pairs.files import read_pairs, write_pairs
from grath.pairs.stats import negated


def main():
    parser = Parser(__doc__)
    parser.add_argument("pairs", type=Path, help="pair file")
    parser.add_argument("out", type=Path, help="pair file to write")
    parser.add_argument("--only", choices=("correct", "incorrect"), required=True, help="the answer that denies alone")
    args = parser.parse_args()
    asked = (read_record(record_path(args.pairs)) or {}).get("settings", {}).get("data_path") or ""
    questions = ROWS.search(asked)
    if questions and questions[0] not in args.out.name:
        parser.error(f"the name of OUT must contain {questions[0]}, so that results/study.py holds out the others")
    other = {"correct": "incorrect", "incorrect": "correct"}[args.only]
    rows = [row for row in read_pairs(args.pairs) if row["correct"] != row["incorrect"]]
    kept = [row for row in rows if negated([row[args.only]]) <= negated([row[other]])]
    write_pairs(args.out, kept)
    print(f"Kept {len(kept)} of {len(rows)} pairs with different answers in {args.out}")


if __name__ == "__main__":
    run_main(main)
