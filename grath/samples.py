"""A model's own answers to five of the bundled truthfulness questions: degeneration shows here before scores fall.

python -m grath.samples MODEL_OR_ADAPTER OUT.jsonl
"""

import json
from pathlib import Path

from grath.chat import MODEL_TYPES, prompt_ids, template_for
from grath.cli import PROJECT, Parser, check_writable, read_json_lines, run, write_whole
from grath.models import PRECISIONS, load_model, load_tokenizer, resolve_precision, stop_ids

BUNDLED = PROJECT / "data" / "truthfulness_mc.jsonl"
# One question in twenty of the bundled set.
CHOSEN = slice(0, 100, 20)
MAX_NEW_TOKENS = 60


def answers(model, tokenizer, template, questions):
    """Greedy answers, as strings, to bare questions between the chat tags, as they stand in DPO's prompts."""
    from grath.generation import way_to_generate

    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": question}], template) for question in questions]
    way, _ = way_to_generate(model, prompts, MAX_NEW_TOKENS)
    found = {}
    way(model, prompts, MAX_NEW_TOKENS, len(prompts), stop_ids(model, tokenizer), found.__setitem__)
    return [tokenizer.decode(found[i], skip_special_tokens=True).strip() for i in range(len(prompts))]


def main():
    parser = Parser(__doc__)
    parser.add_argument("model", help="hub name, model folder or LoRA adapter's folder")
    parser.add_argument("out", type=Path, help="the file of JSON lines to write")
    parser.add_argument("--model_type", choices=MODEL_TYPES, default="auto", help="chat tags")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="int8 on a CUDA GPU, bf16 on a CPU")
    args = parser.parse_args()
    check_writable(args.out.parent)
    tokenizer = load_tokenizer(args.model)
    template = template_for(tokenizer, args.model_type)
    questions = [row["question"] for row in read_json_lines(BUNDLED, "the bundled set")[CHOSEN]]
    model = load_model(args.model, resolve_precision(args.precision, "pairs"))
    rows = zip(questions, answers(model, tokenizer, template, questions), strict=True)
    write_whole(args.out, "".join(json.dumps({"question": q, "answer": a}, ensure_ascii=False) + "\n" for q, a in rows))
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    run(main)
