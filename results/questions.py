"""Write TruthfulQA's questions as a question file, so that a model can write pairs about them without their labels.

    DATASETS_ROOT=FOLDER python results/questions.py 'truthful_qa[:200]' OUT     writes OUT/truthful_qa[:200].jsonl

The choices are those of MC1; of these pairs, only the truth signal uses them. `results/study.py` reads from the file's
name which questions a run has asked, and scores the others.
"""

import json
from pathlib import Path

from grath.common.arguments import Parser
from grath.common.errors import run_main
from grath.common.files import atomic_write_text
from grath.pairs.questions import LABELED, load_labeled


def as_row(question):
    """Return a question in the ARC schema: dict."""
    labels = [str(number) for number in range(1, 1 + len(question["choices"]))]
    choices = {"text": question["choices"], "label": labels}
    return {"question": question["question"], "choices": choices, "answerKey": labels[question["answer"]]}


def main():
    parser = Parser(__doc__)
    parser.add_argument("rows", help="a data set with gold answers, or some of its rows")
    parser.add_argument("folder", type=Path, help="folder to write the file to")
    args = parser.parse_args()
    if not LABELED.fullmatch(args.rows):
        parser.error(f"{args.rows} is no data set with gold answers: for example truthful_qa[:200]")
    questions = load_labeled(args.rows)
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.folder / f"{args.rows.replace('/', '_')}.jsonl"
    atomic_write_text(file, "".join(f"{json.dumps(as_row(question))}\n" for question in questions))
    print(f"Wrote {len(questions)} questions to {file}")


if __name__ == "__main__":
    run_main(main)
