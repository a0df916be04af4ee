"""Compare what two models choose in MC1, by negation and length, with model-free baselines.

    python results/choices.py SAMPLES_BEFORE SAMPLES_AFTER

The arguments are two folders with the harness's samples (`--tasks truthfulqa_mc1 --log_samples`). The first table
divides the questions by whether their gold answer contains a negation. The second shows how often each model picks a
choice of a kind, and the MC1 and MC2 of the baseline that spreads all probability evenly over the choices of that kind
(over all choices if a question has none of that kind).
"""

import json
from pathlib import Path

from grath.common.arguments import Parser
from grath.common.errors import UserError, run_main
from grath.pairs.stats import negated


def shortest(choices):
    """Mark the choices with the fewest words: list of bool."""
    words = [len(choice.split()) for choice in choices]
    return [count == min(words) for count in words]


KINDS = {
    "the shortest, in words": shortest,
    "with a negation": lambda choices: [negated([choice]) == 1 for choice in choices],
    "without a negation": lambda choices: [negated([choice]) == 0 for choice in choices],
    "any": lambda choices: [True] * len(choices),
}


def read_samples(folder):
    """Read the last samples file, by name, below a folder: dict of question -> sample."""
    files = sorted(folder.rglob("samples_truthfulqa_mc1*.jsonl"))
    if not files:
        raise UserError(f"{folder} contains no samples_truthfulqa_mc1*.jsonl: score with --log_samples")
    rows = map(json.loads, files[-1].read_text(encoding="utf-8").splitlines())
    return {row["doc"]["question"]: row for row in rows}


def percent(values):
    values = list(values)
    return 100 * sum(values) / len(values)


def chosen_is(kind, row):
    """Tell whether the choice with the highest log-likelihood is of a kind."""
    log_likelihoods = [float(answer[0]) for answer in row["filtered_resps"]]
    return kind(row["doc"]["mc1_targets"]["choices"])[log_likelihoods.index(max(log_likelihoods))]


def baseline_score(kind, target):
    """Return the probability of the true choices if it is spread evenly over the choices of a kind."""
    of_kind = kind(target["choices"])
    labels = [label for label, chosen in zip(target["labels"], of_kind, strict=True) if chosen or not any(of_kind)]
    return sum(labels) / len(labels)


def main():
    from tabulate import tabulate

    parser = Parser(__doc__)
    parser.add_argument("before", type=Path, help="samples of the first model, for example the base")
    parser.add_argument("after", type=Path, help="samples of the second model")
    args = parser.parse_args()
    before, after = read_samples(args.before), read_samples(args.after)
    docs = [row["doc"] for row in before.values()]
    body = []
    for title, wanted in (("with a negation", 1), ("without", 0)):
        group = [doc for doc in docs if negated(doc["mc1_targets"]["choices"][:1]) == wanted]
        pairs = [(before[doc["question"]]["acc"] == 1, after[doc["question"]]["acc"] == 1) for doc in group]
        chance = percent(baseline_score(KINDS["any"], doc["mc1_targets"]) for doc in group)
        shares = [percent(side) for side in zip(*pairs, strict=True)]
        body.append([title, len(pairs), chance, *shares, pairs.count((False, True)), pairs.count((True, False))])
    header = ["gold answer", "questions", "by chance", "MC1 before", "MC1 after", "gained", "lost"]
    print(tabulate(body, header, tablefmt="github", floatfmt=".2f"))
    body = []
    for title, kind in KINDS.items():
        chosen = [percent(chosen_is(kind, row) for row in side.values()) for side in (before, after)]
        chance = percent(percent(kind(doc["mc1_targets"]["choices"])) / 100 for doc in docs)
        scores = [percent(baseline_score(kind, doc[f"mc{number}_targets"]) for doc in docs) for number in (1, 2)]
        body.append([title, chance, *chosen, *scores])
    header = ["choice", "by chance", "chosen before", "chosen after", "MC1 of the baseline", "MC2 of the baseline"]
    print("\n" + tabulate(body, header, tablefmt="github", floatfmt=".2f"))


if __name__ == "__main__":
    run_main(main)
