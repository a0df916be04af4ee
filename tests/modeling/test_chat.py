"""Chat templates: the exact tokens of prompts and answers, with one BOS and one EOS where the template has one."""

import pytest
from transformers import AutoTokenizer

from grath.common.errors import UserError
from grath.modeling.chat import TEMPLATES, answer_ids, lost_prompt, prompt_ids, template_for

TURN = [{"role": "user", "content": "What is ice?"}]
TURNS = [*TURN, {"role": "assistant", "content": "Frozen water."}, {"role": "user", "content": "And snow?"}]
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
EXPECTED = {
    "llama2": (
        "<s>[INST] What is ice? [/INST]",
        "<s>[INST] What is ice? [/INST] Frozen water. </s><s>[INST] And snow? [/INST]",
    ),
    "zephyr": (
        "<s><|user|>\nWhat is ice?</s>\n<|assistant|>\n",
        "<s><|user|>\nWhat is ice?</s>\n<|assistant|>\nFrozen water.</s>\n<|user|>\nAnd snow?</s>\n<|assistant|>\n",
    ),
    "smollm2": (
        f"{SYSTEM}<|im_start|>user\nWhat is ice?<|im_end|>\n<|im_start|>assistant\n",
        f"{SYSTEM}<|im_start|>user\nWhat is ice?<|im_end|>\n<|im_start|>assistant\nFrozen water.<|im_end|>\n"
        "<|im_start|>user\nAnd snow?<|im_end|>\n<|im_start|>assistant\n",
    ),
}


@pytest.fixture(params=TEMPLATES)
def chat(request, llama_tokenizer, smollm_tokenizer):
    return request.param, smollm_tokenizer if request.param == "smollm2" else llama_tokenizer


def test_a_prompt_is_these_tokens_with_one_bos_where_the_template_has_one(chat):
    model_type, tokenizer = chat
    template = template_for(tokenizer, model_type)
    for messages, text in zip((TURN, TURNS), EXPECTED[model_type], strict=True):
        assert prompt_ids(tokenizer, messages, template) == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("start", ["", "{{ bos_token }}{{ bos_token }}"])
def test_a_template_without_bos_or_with_two_gives_one(llama_tokenizer, start):
    template = TEMPLATES["zephyr"].replace("{{ bos_token }}", start)
    assert prompt_ids(llama_tokenizer, TURN, template) == prompt_ids(llama_tokenizer, TURN, TEMPLATES["zephyr"])


def test_answer_ends_with_one_eos(chat):
    model_type, tokenizer = chat
    template = TEMPLATES[model_type]
    prompt, answer = answer_ids(tokenizer, TURN, "Frozen water.", template)
    assert prompt == prompt_ids(tokenizer, TURN, template)
    assert answer.count(tokenizer.eos_token_id) == 1 and answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer[:-1]).strip() == "Frozen water."


def test_the_smollm2_template_matches_the_models_own(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for messages in (TURNS, [{"role": "system", "content": "Be brief."}, *TURN]):
        own = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert prompt_ids(tokenizer, messages, TEMPLATES["smollm2"]) == own


def test_a_system_turn_in_the_llama2_template(llama_tokenizer):
    ids = prompt_ids(llama_tokenizer, [{"role": "system", "content": "Be brief."}, *TURNS], TEMPLATES["llama2"])
    assert llama_tokenizer.decode(ids) == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is ice? [/INST] Frozen water. </s><s>[INST] And snow? [/INST]"
    )


PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
OTHER_DAYS = "gives different prompts on different days, or at random"
FAILING = {
    "{% for m in messages %}{{ m.content.parts }}{% endfor %}": "leaves out or changes the question 'What is ice",
    "{% for m in messages %}{{ m.content | lower }}{% endfor %}": "leaves out or changes the question",
    "{% if": "the chat template fails",
    PLAIN + "{{ 1 // 0 }}": "the chat template fails",
    PLAIN + "{% if add_generation_prompt %}{{ range(99)|random }}{% endif %}": OTHER_DAYS,
    PLAIN + "{% set format = '%d' %}{{ strftime_now(format) }}": OTHER_DAYS,
    PLAIN + "{{ strftime_now('%d ' ~ '%B') }}": OTHER_DAYS,
    PLAIN + "{{ lipsum(1) }}": OTHER_DAYS,
    PLAIN + "{{ joiner() }}": "shows an address in memory",
    "{% for m in messages %}{{ m.content if m.role == 'user' else m.content[:3] }}{% endfor %}": "changes the answer",
    "{{ messages[0].content }}": "leaves out or changes the answer",
    "{% for m in messages %}{{ m.content }}{{ eos_token if not loop.last }}{% endfor %}": "an EOS before the answer",
    "{{ 'Ask:' if add_generation_prompt else 'Learn:' }}" + PLAIN: "begins differently if an answer follows",
}


@pytest.mark.parametrize(("template", "reason"), FAILING.items())
def test_templates_that_lie_are_refused(smollm_tokenizer, template, reason):
    smollm_tokenizer.chat_template = template
    with pytest.raises(UserError, match=reason):
        template_for(smollm_tokenizer, "auto")


@pytest.mark.parametrize("tail", ["<|think|>\n", ""])
def test_the_end_of_a_prompt_that_an_answer_does_not_follow(smollm_tokenizer, tail):
    template = PLAIN + "{% if add_generation_prompt %}assistant: " + tail + "{% endif %}"
    assert lost_prompt(smollm_tokenizer, template) == tail and lost_prompt(smollm_tokenizer, PLAIN) == ""


def test_a_template_that_cuts_some_questions_is_refused(smollm_tokenizer):
    smollm_tokenizer.chat_template = "{% for m in messages %}{{ m.content[:40] }}{% endfor %}"
    template = template_for(smollm_tokenizer, "auto")
    long = [{"role": "user", "content": "Why " * 20}]
    with pytest.raises(UserError, match="leaves out or changes the question"):
        prompt_ids(smollm_tokenizer, long, template)
    with pytest.raises(UserError, match="leaves out or changes the question"):
        answer_ids(smollm_tokenizer, long, "x", template)


def test_the_date_of_a_template_is_fixed_and_the_default_of_several_is_used(smollm_tokenizer):
    dated = (
        "{% if strftime_now is defined %}{{ strftime_now( '%d %b %Y' ) }} {{ strftime_now(\"%A\") }}{% endif %}" + PLAIN
    )
    smollm_tokenizer.chat_template = {"tool_use": "{{ tools[0] }}", "default": dated}
    ids = prompt_ids(smollm_tokenizer, TURN, template_for(smollm_tokenizer, "auto"))
    assert smollm_tokenizer.decode(ids) == "22 Jan 2024 Mondayuser: What is ice?\n"
    smollm_tokenizer.chat_template = {"tool_use": PLAIN, "rag": PLAIN}
    with pytest.raises(UserError, match="no chat template: set --model_type"):
        template_for(smollm_tokenizer, "auto")
