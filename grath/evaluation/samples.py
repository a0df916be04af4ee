"""A model's own answers to five bundled truthfulness questions: they show degeneration before scores fall."""

import json
import sys

from grath.common.errors import UserError
from grath.common.files import atomic_write_text, read_json_lines
from grath.common.paths import PROJECT
from grath.modeling.chat import prompt_ids, template_for

SAMPLES = "samples.jsonl"
BUNDLED = PROJECT / "data" / "truthfulness_mc.jsonl"
# Every twentieth question of the bundled set.
SAMPLED = slice(0, 100, 20)
MAX_NEW_TOKENS = 60


def write_samples(generate, tokenizer, model_type, path):
    """Write a model's greedy answers to five bundled questions as JSON lines; without a chat template, only say so.

    Args:
        generate: `generate_here` or `generate_on_servers` with its model; it takes the tokenizer, the maximum number of
            tokens, the batch size, the prompts and a function for each completion.
    """
    try:
        template = template_for(tokenizer, model_type)
    except UserError as error:
        print(f"no sample answers: {error}", file=sys.stderr)
        return
    questions = [row["question"] for row in read_json_lines(BUNDLED, "bundled question set")[SAMPLED]]
    # The prompt is the bare question, as in DPO.
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": question}], template) for question in questions]
    answers = {}
    generate(tokenizer, MAX_NEW_TOKENS, len(prompts), prompts, lambda i, text, _: answers.update({i: text.strip()}))
    rows = [{"question": question, "answer": answers[i]} for i, question in enumerate(questions)]
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
