"""What ARC's key says of a pair file's answers, and a draw of pairs to be read.

    DATASETS_ROOT=FOLDER python results/pairs.py PAIRS [--sample 40]

It counts the pairs of different answers in which an answer is ARC-Challenge's keyed choice word for word, but for case
and a last full stop, and prints as many drawn pairs as `--sample` says with their lines in the file.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grath.cli import Parser, UserError, positive_int, run  # noqa: E402
from grath.pairs import read_pairs  # noqa: E402
from grath.questions import KEYED_SETS, load_questions  # noqa: E402


def plain(text):
    return text.strip().rstrip(".").casefold()


def main():
    parser = Parser(__doc__)
    parser.add_argument("pairs", type=Path, help="pair file of ARC-Challenge's questions")
    parser.add_argument("--sample", type=positive_int, default=40, help="pairs to print, drawn with seed 0")
    args = parser.parse_args()
    drawn_from = [
        (line, row) for line, row in enumerate(read_pairs(args.pairs), 1) if row["correct"] != row["incorrect"]
    ]
    keys = {
        question["question"]: plain(question["choices"][question["answer"]])
        for question in load_questions(*KEYED_SETS["ai2_arc/ARC-Challenge"])
    }
    if any(row["question"] not in keys for _, row in drawn_from):
        raise UserError(f"{args.pairs} holds questions that are none of ARC-Challenge's train split")
    for side in ("correct", "incorrect"):
        keyed = sum(plain(row[side]) == keys[row["question"]] for _, row in drawn_from)
        print(f"{side}: the keyed choice in {keyed} of {len(drawn_from)} pairs of different answers")
    random.seed(0)
    for line, row in random.sample(drawn_from, min(args.sample, len(drawn_from))):
        print(f"\nline {line}: {row['question']}\n  correct:   {row['correct']}\n  incorrect: {row['incorrect']}")


if __name__ == "__main__":
    run(main)
