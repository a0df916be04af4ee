"""Score a model on tasks of lm-evaluation-harness: one result file a task.

    python -m grath.evaluation MODEL OUTPUT --tasks truthfulqa_mc1 truthfulqa_mc2

`./evaluation.sh MODEL OUTPUT` does the same with its settings in the environment, on one GPU or several.
"""

from pathlib import Path

from grath.common.arguments import Parser, positive_int
from grath.common.errors import UserError, run_main
from grath.evaluation.harness import MODEL_NAME
from grath.evaluation.run import score_model
from grath.modeling.chat import MODEL_TYPES
from grath.modeling.precision import PRECISIONS, SERVER


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("model", help="hub name, model folder or LoRA adapter folder")
    add("output", type=Path, help="folder of the result files")
    add("--tasks", nargs="+", required=True, help="tasks of lm-evaluation-harness")
    add("--precision", choices=PRECISIONS, default="auto", help="auto: fp16 on a GPU, fp32 on a CPU")
    add("--batch_size", type=positive_int, help="contexts at once; if left out, as many as make a batch of tokens")
    add("--limit", type=positive_int, help="questions of each task; all if not set")
    add("--backend", choices=("hf", MODEL_NAME, SERVER), default=MODEL_NAME, help="model class, or --server_url")
    add("--server_url", nargs="+", dest="servers", default=(), help="servers of --backend server")
    add("--server_timeout", type=positive_int, default=600, help="seconds to wait for a server that does not respond")
    add("--chat_template", action="store_true", help="apply the chat template")
    add("--log_samples", action="store_true", help="also write every question and its log-likelihoods")
    add("--samples", action="store_true", help="also write the model's own answers to five questions")
    add("--model_type", choices=MODEL_TYPES, default="auto", help="chat template, of these questions too")
    args = parser.parse_args()
    if args.servers and args.backend != SERVER:
        raise UserError("--server_url needs --backend server")
    score_model(**vars(args))
    print(f"Wrote the results to {args.output}; next: python -m grath.report {args.output}")


if __name__ == "__main__":
    run_main(main)
