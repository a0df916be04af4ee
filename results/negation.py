"""Where MC1 changed: questions whose keyed answer holds a negation, and the others, for two models.

    python results/negation.py SAMPLES_OF_ONE SAMPLES_OF_THE_OTHER

The two are folders in which the harness has kept single questions (`--tasks truthfulqa_mc1 --log_samples`).
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grath.cli import Parser, UserError, run  # noqa: E402
from grath.distance import negated  # noqa: E402


def read_samples(folder):
    """Question -> (its keyed answer, whether the model chose it)."""
    files = sorted(folder.rglob("samples_truthfulqa_mc1_*.jsonl"))
    if not files:
        raise UserError(f"{folder} holds no samples_truthfulqa_mc1_*.jsonl: score with --log_samples")
    rows = map(json.loads, files[-1].read_text(encoding="utf-8").splitlines())
    return {row["doc"]["question"]: (row["doc"]["mc1_targets"]["choices"][0], row["acc"] == 1) for row in rows}


def main():
    from tabulate import tabulate

    parser = Parser(__doc__)
    parser.add_argument("before", type=Path, help="samples of one model, as the base")
    parser.add_argument("after", type=Path, help="samples of the other")
    args = parser.parse_args()
    before, after = read_samples(args.before), read_samples(args.after)
    body = []
    for title, wanted in (("with a negation", 1), ("without", 0)):
        pairs = [(right, after[question][1]) for question, (key, right) in before.items() if negated([key]) == wanted]
        shares = [100 * sum(side) / len(pairs) for side in zip(*pairs, strict=True)]
        body.append([title, len(pairs), *shares, pairs.count((False, True)), pairs.count((True, False))])
    header = ["keyed answer", "questions", "MC1 before", "MC1 after", "gained", "lost"]
    print(tabulate(body, header, tablefmt="github", floatfmt=".2f"))


if __name__ == "__main__":
    run(main)
