"""Stage 4 of GRATH: score a model on tasks of lm-evaluation-harness, one result file per task.

    python -m grath.evaluation MODEL OUTPUT --tasks truthfulqa_mc1 truthfulqa_mc2

The same command resumes: a task that has its result file is not scored again. `./evaluation.sh MODEL OUTPUT` is this
command with its settings in the environment, on one GPU or several.
"""

from pathlib import Path

from grath.common.arguments import Parser, batch_size, limit, positive_int
from grath.common.defaults import SERVER_TIMEOUT, TASKS
from grath.common.errors import run_main
from grath.evaluation.run import BACKENDS, score_model
from grath.modeling.chat import MODEL_TYPES
from grath.modeling.precision import PRECISIONS, SERVER


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("model", help="hub name, model folder or LoRA adapter folder")
    add("output", type=Path, help="folder of the result files")
    add("--tasks", nargs="+", default=TASKS.split(), help="tasks of lm-evaluation-harness")
    add("--precision", choices=PRECISIONS, default="auto", help="auto: fp16 on a GPU, fp32 on a CPU")
    rows = "contexts at once (by tokens if not set; hf: 16, or auto), or requests at a server (512)"
    add("--batch_size", type=batch_size, help=rows)
    add("--limit", type=limit, help="questions of each task, or a share below 1; all if not set")
    add("--backend", choices=BACKENDS, help=f"{BACKENDS[0]} if not set, or {SERVER} if --server_url is")
    add("--server_url", nargs="+", dest="servers", default=(), help="servers of --backend server")
    add("--server_timeout", type=positive_int, default=SERVER_TIMEOUT, help="seconds to wait for a lost server")
    add("--chat_template", action="store_true", help="apply the chat template")
    add("--log_samples", action="store_true", help="also write every question and its log-likelihoods")
    add("--samples", action="store_true", help="also write the model's own answers to five questions")
    add("--model_type", choices=MODEL_TYPES, default="auto", help="chat template, of these questions too")
    add("--dry_run", action="store_true", help="check the model, print the plan and score nothing")
    args = parser.parse_args()
    args.backend = args.backend or (SERVER if args.servers else BACKENDS[0])
    score_model(args)


if __name__ == "__main__":
    run_main(main)
