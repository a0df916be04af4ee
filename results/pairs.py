"""Compare a pair file's answers with ARC's gold answers, and print a sample of pairs to read.

    DATASETS_ROOT=FOLDER python results/pairs.py PAIRS [--sample 40]

Of the pairs with different answers, it counts those in which an answer is ARC-Challenge's gold answer, or any of its
choices, word for word except for case and a final full stop. It prints `--sample` pairs, with their line numbers in the
file.
"""

import random
from pathlib import Path

from grath.common.arguments import Parser, positive_int
from grath.common.errors import UserError, run_main
from grath.pairs.files import read_pairs
from grath.pairs.questions import LABELED_DATASETS, load_questions


def normalize(text):
    return text.strip().rstrip(".").casefold()


def main():
    parser = Parser(__doc__)
    parser.add_argument("pairs", type=Path, help="pair file with the questions of ARC-Challenge")
    parser.add_argument("--sample", type=positive_int, default=40, help="number of pairs to print, drawn with seed 0")
    args = parser.parse_args()
    different = [
        (line, row) for line, row in enumerate(read_pairs(args.pairs), 1) if row["correct"] != row["incorrect"]
    ]
    asked = {question["question"]: question for question in load_questions(*LABELED_DATASETS["ai2_arc/ARC-Challenge"])}
    if any(row["question"] not in asked for _, row in different):
        raise UserError(f"{args.pairs} contains questions that are not in the train split of ARC-Challenge")
    for side in ("correct", "incorrect"):
        gold = choices = 0
        for _, row in different:
            question = asked[row["question"]]
            is_choice = [normalize(choice) == normalize(row[side]) for choice in question["choices"]]
            gold, choices = gold + is_choice[question["answer"]], choices + any(is_choice)
        print(f"{side}: the gold answer in {gold}, any choice in {choices} of {len(different)} pairs that differ")
    random.seed(0)
    for line, row in random.sample(different, min(args.sample, len(different))):
        print(f"\nline {line}: {row['question']}\n  correct:   {row['correct']}\n  incorrect: {row['incorrect']}")


if __name__ == "__main__":
    run_main(main)
