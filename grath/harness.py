"""What lm-evaluation-harness is given: which model, on which base, in which precision.

    python -m grath.harness MODEL_OR_ADAPTER [--precision auto]

Prints the harness's `--model_args` as JSON, which holds any folder's name.
"""

import json

from grath.cli import Parser, run
from grath.models import DTYPES, check_model, resolve_precision, split_adapter


def model_args(name, precision):
    """The harness's model arguments for a model, or for a LoRA adapter on its base."""
    base, adapter = split_adapter(name)
    precision = resolve_precision(precision, "scores")
    args = {"pretrained": base, "dtype": DTYPES[precision]}
    return {**args, "peft": adapter} if adapter else args


def main():
    parser = Parser(__doc__)
    parser.add_argument("model", help="hub name, model folder or LoRA adapter's folder")
    parser.add_argument(
        "--precision", choices=("auto", *DTYPES), default="auto", help="auto: fp16 on a GPU, fp32 on a CPU"
    )
    args = parser.parse_args()
    check_model(args.model)
    print(json.dumps(model_args(args.model, args.precision)))


if __name__ == "__main__":
    run(main)
