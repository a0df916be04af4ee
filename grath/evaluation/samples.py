"""Write a model's own answers to five bundled truthfulness questions: they show degeneration before scores fall.

python -m grath.evaluation.samples MODEL_OR_ADAPTER OUT.jsonl
"""

import json
from pathlib import Path

from grath.common.arguments import Parser
from grath.common.errors import run_main
from grath.common.files import atomic_write_text, check_writable, read_json_lines
from grath.common.paths import PROJECT
from grath.modeling.chat import MODEL_TYPES, prompt_ids, template_for
from grath.modeling.loading import eos_token_ids, load_model, load_tokenizer
from grath.modeling.precision import PRECISIONS, resolve_precision

BUNDLED = PROJECT / "data" / "truthfulness_mc.jsonl"
# Every twentieth question of the bundled set.
SAMPLED = slice(0, 100, 20)
MAX_NEW_TOKENS = 60


def sample_answers(model, tokenizer, template, questions):
    """Answer each question greedily; return a list of str. The prompt is the bare question, as in DPO."""
    from grath.generation.engine import select_generate_fn

    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": question}], template) for question in questions]
    generate, _ = select_generate_fn(model, prompts, MAX_NEW_TOKENS)
    completions = {}
    eos_ids = eos_token_ids(model, tokenizer)
    generate(model, prompts, MAX_NEW_TOKENS, len(prompts), eos_ids, completions.__setitem__)
    return [tokenizer.decode(completions[i], skip_special_tokens=True).strip() for i in range(len(prompts))]


def main():
    parser = Parser(__doc__)
    parser.add_argument("model", help="hub name, model folder or LoRA adapter folder")
    parser.add_argument("out", type=Path, help="JSON-lines file to write")
    parser.add_argument("--model_type", choices=MODEL_TYPES, default="auto", help="chat template")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="auto", help="auto: int8 on a CUDA GPU, bf16 on a CPU"
    )
    args = parser.parse_args()
    check_writable(args.out.parent)
    tokenizer = load_tokenizer(args.model)
    template = template_for(tokenizer, args.model_type)
    questions = [row["question"] for row in read_json_lines(BUNDLED, "bundled question set")[SAMPLED]]
    model = load_model(args.model, resolve_precision(args.precision, "pairs"))
    rows = zip(questions, sample_answers(model, tokenizer, template, questions), strict=True)
    lines = [json.dumps({"question": q, "answer": a}, ensure_ascii=False) + "\n" for q, a in rows]
    atomic_write_text(args.out, "".join(lines))
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    run_main(main)
