"""What two models choose in MC1: where it changed, by negations in the keyed answer, and how often the shortest choice.

    python results/choices.py SAMPLES_OF_ONE SAMPLES_OF_THE_OTHER

The two are folders in which the harness has kept single questions (`--tasks truthfulqa_mc1 --log_samples`).
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grath.cli import Parser, UserError, run  # noqa: E402
from grath.distance import negated  # noqa: E402


def read_samples(folder):
    """Question -> (its keyed answer, whether the model chose it, whether what it chose is the shortest, in words)."""
    files = sorted(folder.rglob("samples_truthfulqa_mc1_*.jsonl"))
    if not files:
        raise UserError(f"{folder} holds no samples_truthfulqa_mc1_*.jsonl: score with --log_samples")
    found = {}
    for row in map(json.loads, files[-1].read_text(encoding="utf-8").splitlines()):
        choices = row["doc"]["mc1_targets"]["choices"]
        likelihoods = [float(answer[0]) for answer in row["filtered_resps"]]
        words = [len(choice.split()) for choice in choices]
        shortest = words[likelihoods.index(max(likelihoods))] == min(words)
        found[row["doc"]["question"]] = (choices[0], row["acc"] == 1, shortest)
    return found


def main():
    from tabulate import tabulate

    parser = Parser(__doc__)
    parser.add_argument("before", type=Path, help="samples of one model, as the base")
    parser.add_argument("after", type=Path, help="samples of the other")
    args = parser.parse_args()
    before, after = read_samples(args.before), read_samples(args.after)
    body = []
    for title, wanted in (("with a negation", 1), ("without", 0)):
        pairs = [
            (right, after[question][1]) for question, (key, right, _) in before.items() if negated([key]) == wanted
        ]
        shares = [100 * sum(side) / len(pairs) for side in zip(*pairs, strict=True)]
        body.append([title, len(pairs), *shares, pairs.count((False, True)), pairs.count((True, False))])
    header = ["keyed answer", "questions", "MC1 before", "MC1 after", "gained", "lost"]
    print(tabulate(body, header, tablefmt="github", floatfmt=".2f"))
    shares = [sum(shortest for *_, shortest in side.values()) / len(side) for side in (before, after)]
    print("\nthe shortest choice is chosen in {:.1%} before, {:.1%} after".format(*shares))


if __name__ == "__main__":
    run(main)
