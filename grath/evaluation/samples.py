"""A model's own answers to five bundled truthfulness questions: they show degeneration before scores fall."""

import json

from grath.common.files import atomic_write_text, read_json_lines
from grath.common.layout import PROJECT
from grath.modeling.chat import prompt_ids
from grath.modeling.loading import check_vocabulary

BUNDLED = PROJECT / "data" / "truthfulness_mc.jsonl"
# Every twentieth question of the bundled set.
SAMPLED = slice(0, 100, 20)
MAX_NEW_TOKENS = 60


def ask_samples(model, tokenizer, template):
    """Return five bundled questions and their prompts: lists of str, and of lists of token ids.

    `model` is its name, `template` a Jinja chat template from `template_for`.
    """
    questions = [row["question"] for row in read_json_lines(BUNDLED, "bundled question set")[SAMPLED]]
    # The prompt is the bare question, as in DPO.
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": question}], template) for question in questions]
    check_vocabulary(model, tokenizer, prompts)
    return questions, prompts


def write_samples(generator, questions, prompts, path):
    """Write greedy answers as JSON lines to the file `path`; `generator`: a `LocalGenerator` or `ServerGenerator`."""
    answers = {index: text.strip() for index, text, _ in generator.generate(prompts)}
    rows = [{"question": question, "answer": answers[i]} for i, question in enumerate(questions)]
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
