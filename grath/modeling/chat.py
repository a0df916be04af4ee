"""Chat templates: render a conversation as one string and tokenize it.

`TEMPLATES` has one Jinja template for each model family. The model type `auto` uses the tokenizer's own template.
"""

import re
from datetime import date
from os.path import commonprefix

from grath.common.errors import UserError, first_line

TEMPLATES = {
    # In Llama-2-chat, every user turn starts with a BOS and every assistant turn ends with an EOS.
    "llama2": (
        "{% set said = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set said.system = '<<SYS>>\n' + m.content | trim + '\n<</SYS>>\n\n' %}{% elif m.role == 'user' %}"
        "{{ bos_token }}[INST] {{ said.system }}{{ m.content | trim }} [/INST]{% set said.system = '' %}"
        "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    "zephyr": (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "smollm2": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
        "trained by Hugging Face<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
MODEL_TYPES = ("auto", *TEMPLATES)
# What a template that asks for the date gets, so that the same command uses the same prompts every day.
TODAY = date(2024, 1, 22)
PROBE = [{"role": "user", "content": "What is ice?"}]
ASKS_DATE = re.compile(r"""strftime_now\(\s*(["'])([^"']*)\1\s*\)""")
OTHER_TEMPLATE = f"set --model_type (MODEL_TYPE) to {', '.join(TEMPLATES)}, or choose another --tokenizer_name"


def template_for(tokenizer, model_type):
    """Return the Jinja chat template of `model_type` for `tokenizer`, with the date `TODAY`.

    Raises:
        UserError: the tokenizer has no EOS token, or no chat template for `auto`, or no BOS token for the template; or
            the template fails, leaves out or changes a turn, depends on the day or on chance, or begins a conversation
            differently if an answer follows.
    """
    if tokenizer.eos_token is None:
        raise UserError("the tokenizer has no EOS token, so no response could end: choose another --tokenizer_name")
    if model_type == "auto":
        try:
            template = tokenizer.get_chat_template()
        except ValueError:  # none, or several without a default
            template = None
        if not isinstance(template, str):
            raise UserError(f"the tokenizer has no chat template: {OTHER_TEMPLATE}")
    else:
        template = TEMPLATES[model_type]
        if "bos_token" in template and tokenizer.bos_token is None:
            raise UserError(f"--model_type {model_type} needs a BOS token, and this tokenizer has none")
    template = ASKS_DATE.sub(lambda found: repr(TODAY.strftime(found[2])), template)
    code = re.sub(r"{#.*?#}", "", template, flags=re.DOTALL)
    if re.search(r"strftime_now\b(?!\s+is\s)|\|\s*random\b|\blipsum\b", code):
        raise UserError(f"the chat template gives different prompts on different days, or at random: {OTHER_TEMPLATE}")
    if " at 0x" in render(tokenizer, PROBE, template):
        raise UserError(f"the chat template shows an address in memory: {OTHER_TEMPLATE}")
    prompt, completion = answer_ids(tokenizer, PROBE, "Water.", template)
    if "".join(PROBE[0]["content"].split()) not in "".join(tokenizer.decode(prompt).split()):
        raise UserError(f"the chat template begins differently if an answer follows: {OTHER_TEMPLATE}")
    if "Water" not in tokenizer.decode(completion):
        raise UserError(f"the chat template has an EOS before the answer: {OTHER_TEMPLATE}")
    return template


def lost_prompt(tokenizer, template):
    """Return the end of the prompt that the template leaves out if an answer follows, such as `<think>`: str."""
    asked = render(tokenizer, PROBE, template, add_generation_prompt=True)
    whole = render(tokenizer, [*PROBE, {"role": "assistant", "content": "Water."}], template)
    return asked[len(commonprefix([asked, whole])) :]


def render(tokenizer, messages, template, **options):
    """Render a conversation: str. Raise `UserError` if the template fails, or leaves out or changes a turn."""
    try:
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    except Exception as error:  # a template can raise anything
        raise UserError(f"the chat template fails ({first_line(error)[:200]}): {OTHER_TEMPLATE}") from error
    found = "".join(text.split())
    for turn in messages:
        if "".join(turn["content"].split()) not in found:
            what = {"user": "question", "assistant": "answer"}.get(turn["role"], "text")
            start = turn["content"][:60]
            raise UserError(f"the chat template leaves out or changes the {what} {start!r}...: {OTHER_TEMPLATE}")
    return text


def prompt_ids(tokenizer, messages, template):
    """Tokenize a conversation that ends with a user turn, up to where the assistant's answer starts: list of int.

    There is a BOS wherever the template has one, and never two in a row.
    """
    return _encode(tokenizer, render(tokenizer, messages, template, add_generation_prompt=True))


def answer_ids(tokenizer, messages, answer, template):
    """Tokenize a conversation and the assistant's `answer` to it.

    The answer ends with exactly one EOS. Text that the template adds after the EOS (a line break) is cut off.

    Returns:
        (prompt, completion): two lists of int. The prompt is the longest common beginning of `prompt_ids(messages)` and
        the tokens of the whole conversation: all of `prompt_ids`, unless the tokenizer merges across the boundary.
    """
    whole = [*messages, {"role": "assistant", "content": answer}]
    ids = _encode(tokenizer, render(tokenizer, whole, template))
    prompt = commonprefix([prompt_ids(tokenizer, messages, template), ids])
    completion, eos = ids[len(prompt) :], tokenizer.eos_token_id
    end = completion.index(eos) if eos in completion else len(completion)
    return prompt, [*completion[:end], eos]


def _encode(tokenizer, text):
    """Tokenize a rendered conversation. It starts with one BOS if the tokenizer adds a BOS to every text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return [bos, *ids] if adds_bos and ids[:1] != [bos] else ids
