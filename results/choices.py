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
    """Question -> what the harness has kept of it."""
    files = sorted(folder.rglob("samples_truthfulqa_mc1_*.jsonl"))
    if not files:
        raise UserError(f"{folder} holds no samples_truthfulqa_mc1_*.jsonl: score with --log_samples")
    rows = map(json.loads, files[-1].read_text(encoding="utf-8").splitlines())
    return {row["doc"]["question"]: row for row in rows}


def shortest(choices):
    """Of each choice, whether it has the fewest words."""
    words = [len(choice.split()) for choice in choices]
    return [count == min(words) for count in words]


def chosen_is_shortest(row):
    likelihoods = [float(answer[0]) for answer in row["filtered_resps"]]
    return shortest(row["doc"]["mc1_targets"]["choices"])[likelihoods.index(max(likelihoods))]


def rule_score(targets, rule):
    """Percent that a rule gets which gives all its probability, evenly, to the choices for which it holds."""
    shares = []
    for target in targets:
        held = [label for label, holds in zip(target["labels"], rule(target["choices"]), strict=True) if holds]
        shares.append(sum(held) / len(held))
    return 100 * sum(shares) / len(shares)


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
            (row["acc"] == 1, after[question]["acc"] == 1)
            for question, row in before.items()
            if negated(row["doc"]["mc1_targets"]["choices"][:1]) == wanted
        ]
        shares = [100 * sum(side) / len(pairs) for side in zip(*pairs, strict=True)]
        body.append([title, len(pairs), *shares, pairs.count((False, True)), pairs.count((True, False))])
    header = ["keyed answer", "questions", "MC1 before", "MC1 after", "gained", "lost"]
    print(tabulate(body, header, tablefmt="github", floatfmt=".2f"))
    shares = [sum(map(chosen_is_shortest, side.values())) / len(side) for side in (before, after)]
    print("\nthe shortest choice is chosen in {:.1%} before, {:.1%} after".format(*shares))
    targets = [[row["doc"][f"mc{number}_targets"] for row in before.values()] for number in (1, 2)]
    for title, rule in (
        ("the shortest choices", shortest),
        ("all choices alike", lambda choices: [True] * len(choices)),
    ):
        print(f"{title}: MC1 {rule_score(targets[0], rule):.2f}, MC2 {rule_score(targets[1], rule):.2f}")


if __name__ == "__main__":
    run(main)
