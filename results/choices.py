"""What two models choose in MC1, by negations and length, and what a rule without a model gets.

    python results/choices.py SAMPLES_OF_ONE SAMPLES_OF_THE_OTHER

The two are folders in which the harness has kept single questions (`--tasks truthfulqa_mc1 --log_samples`). The first
table divides the questions by their keyed answer. The second says how often a choice of a kind is chosen, and what MC1
and MC2 are if all probability goes, evenly, to the choices of that kind (to all choices where there is none of it).
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grath.cli import Parser, UserError, run  # noqa: E402
from grath.distance import negated  # noqa: E402


def shortest(choices):
    words = [len(choice.split()) for choice in choices]
    return [count == min(words) for count in words]


KINDS = {
    "the shortest, in words": shortest,
    "with a negation": lambda choices: [negated([choice]) == 1 for choice in choices],
    "without a negation": lambda choices: [negated([choice]) == 0 for choice in choices],
    "any": lambda choices: [True] * len(choices),
}


def read_samples(folder):
    """Question -> what the harness has kept of it."""
    files = sorted(folder.rglob("samples_truthfulqa_mc1_*.jsonl"))
    if not files:
        raise UserError(f"{folder} holds no samples_truthfulqa_mc1_*.jsonl: score with --log_samples")
    rows = map(json.loads, files[-1].read_text(encoding="utf-8").splitlines())
    return {row["doc"]["question"]: row for row in rows}


def percent(values):
    values = list(values)
    return 100 * sum(values) / len(values)


def chosen_is(kind, row):
    likelihoods = [float(answer[0]) for answer in row["filtered_resps"]]
    return kind(row["doc"]["mc1_targets"]["choices"])[likelihoods.index(max(likelihoods))]


def rule_score(kind, target):
    """The share of a question's probability that falls on true choices, if it all goes to those of a kind."""
    of_kind = kind(target["choices"])
    labels = [label for label, holds in zip(target["labels"], of_kind, strict=True) if holds or not any(of_kind)]
    return sum(labels) / len(labels)


def main():
    from tabulate import tabulate

    parser = Parser(__doc__)
    parser.add_argument("before", type=Path, help="samples of one model, as the base")
    parser.add_argument("after", type=Path, help="samples of the other")
    args = parser.parse_args()
    before, after = read_samples(args.before), read_samples(args.after)
    docs = [row["doc"] for row in before.values()]
    body = []
    for title, wanted in (("with a negation", 1), ("without", 0)):
        group = [doc for doc in docs if negated(doc["mc1_targets"]["choices"][:1]) == wanted]
        pairs = [(before[doc["question"]]["acc"] == 1, after[doc["question"]]["acc"] == 1) for doc in group]
        chance = percent(rule_score(KINDS["any"], doc["mc1_targets"]) for doc in group)
        shares = [percent(side) for side in zip(*pairs, strict=True)]
        body.append([title, len(pairs), chance, *shares, pairs.count((False, True)), pairs.count((True, False))])
    header = ["keyed answer", "questions", "by chance", "MC1 before", "MC1 after", "gained", "lost"]
    print(tabulate(body, header, tablefmt="github", floatfmt=".2f"))
    body = []
    for title, kind in KINDS.items():
        chosen = [percent(chosen_is(kind, row) for row in side.values()) for side in (before, after)]
        chance = percent(percent(kind(doc["mc1_targets"]["choices"])) / 100 for doc in docs)
        scores = [percent(rule_score(kind, doc[f"mc{number}_targets"]) for doc in docs) for number in (1, 2)]
        body.append([title, chance, *chosen, *scores])
    header = ["choice", "by chance", "chosen before", "chosen after", "MC1 of the rule", "MC2 of the rule"]
    print("\n" + tabulate(body, header, tablefmt="github", floatfmt=".2f"))


if __name__ == "__main__":
    run(main)
