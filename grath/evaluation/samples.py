"""A model's own answers to five bundled truthfulness questions: they show degeneration before scores fall."""

import json
import sys

from grath.common.errors import UserError
from grath.common.files import atomic_write_text, read_json_lines
from grath.common.paths import PROJECT
from grath.modeling.chat import prompt_ids, template_for
from grath.modeling.loading import eos_token_ids

SAMPLES = "samples.jsonl"
BUNDLED = PROJECT / "data" / "truthfulness_mc.jsonl"
# Every twentieth question of the bundled set.
SAMPLED = slice(0, 100, 20)
MAX_NEW_TOKENS = 60


def write_samples(complete, tokenizer, model_type, path):
    """Write a model's answers to five bundled questions as JSON lines; without a chat template, only say so.

    Args:
        complete: function that takes prompts (lists of token ids) and returns their greedy completions (list of str).
    """
    try:
        template = template_for(tokenizer, model_type)
    except UserError as error:
        print(f"no sample answers: {error}", file=sys.stderr)
        return
    questions = [row["question"] for row in read_json_lines(BUNDLED, "bundled question set")[SAMPLED]]
    # The prompt is the bare question, as in DPO.
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": question}], template) for question in questions]
    rows = zip(questions, complete(prompts), strict=True)
    lines = [json.dumps({"question": q, "answer": a.strip()}, ensure_ascii=False) + "\n" for q, a in rows]
    atomic_write_text(path, "".join(lines))


def complete_here(model, tokenizer, prompts):
    """Return the greedy completions of prompts by a loaded model: list of str."""
    from grath.generation.engine import select_generate_fn

    generate, _ = select_generate_fn(model, prompts, MAX_NEW_TOKENS)
    completions = {}
    eos_ids = eos_token_ids(model, tokenizer)
    generate(model, prompts, MAX_NEW_TOKENS, len(prompts), eos_ids, completions.__setitem__)
    return [tokenizer.decode(completions[i], skip_special_tokens=True) for i in range(len(prompts))]


def complete_on_servers(served, model, tokenizer, prompts):
    """Return the greedy completions of prompts by a model on servers: list of str.

    Args:
        served: what `serve` yielded for `model`.
    """
    from grath.serving.completions import generate_server

    completions = {}
    eos_ids = eos_token_ids(model, tokenizer)
    generate_server(served, prompts, MAX_NEW_TOKENS, eos_ids, lambda i, text, _: completions.update({i: text}))
    return [completions[i] for i in range(len(prompts))]
