"""Chat tags: how turns of a conversation become one string, and that string token ids.

A model family is one row of `TEMPLATES`, a Jinja template as tokenizers carry them. `auto` takes the tokenizer's own.
"""

from grath.cli import UserError

TEMPLATES = {
    # Every user turn of Llama-2-chat opens with a BOS of its own, every assistant turn closes with an EOS.
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


def template_for(tokenizer, model_type):
    """The Jinja chat template that `model_type` means for `tokenizer`.

    Raises:
        UserError: `auto`, and the tokenizer has no chat template; or the tokenizer lacks a token that the tags need.
    """
    if tokenizer.eos_token is None:
        raise UserError("the tokenizer has no EOS token, so an answer could never end: choose another --tokenizer_name")
    if model_type == "auto":
        if not isinstance(tokenizer.chat_template, str):
            raise UserError(f"the tokenizer has no chat template: pass --model_type ({', '.join(TEMPLATES)})")
        return tokenizer.chat_template
    template = TEMPLATES[model_type]
    if "bos_token" in template and tokenizer.bos_token is None:
        raise UserError(f"--model_type {model_type} opens with a BOS token, and this tokenizer has none")
    return template


def prompt_ids(tokenizer, messages, template):
    """Token ids of a conversation that ends with a user turn, up to where the assistant's answer begins.

    Args:
        messages: list of `{"role": "user" | "assistant", "content": str}`.
        template: what `template_for` gave.

    Returns:
        list[int] with a BOS wherever the format has one, and never two in a row.
    """
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    return _encode(tokenizer, text)


def answer_ids(tokenizer, messages, answer, template):
    """Token ids of `prompt_ids(messages)` and of the assistant's `answer` to it.

    The answer ends with exactly one EOS; what a template writes behind it (a line break) is cut off.

    Returns:
        (prompt, completion): two lists of int. The prompt is where the tokens of the prompt alone and of the whole
        conversation agree, which is all of it unless the tokenizer merges across the boundary.
    """
    prompt = prompt_ids(tokenizer, messages, template)
    whole = [*messages, {"role": "assistant", "content": answer}]
    ids = _encode(tokenizer, tokenizer.apply_chat_template(whole, chat_template=template, tokenize=False))
    length = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids)))
    completion = ids[length:]
    eos = tokenizer.eos_token_id
    end = completion.index(eos) if eos in completion else len(completion)
    return ids[:length], [*completion[:end], eos]


def _encode(tokenizer, text):
    """Token ids of a rendered conversation, opened by one BOS if the tokenizer opens its texts with one."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    opens_with_bos = bos is not None and tokenizer("a")["input_ids"][0] == bos
    return [bos, *ids] if opens_with_bos and ids[:1] != [bos] else ids
