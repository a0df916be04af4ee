"""The shared-prefix engine gives the same tokens as `model.generate`, in fewer passes."""

import random

import pytest
import torch
from greedy import make_prompts, plain, same, shared
from peft import LoraConfig, get_peft_model
from support import FAMILIES, tiny

from grath.generation.attention import unsupported_reason
from grath.generation.cache import common_prefix_length
from grath.generation.hf import generate_hf
from grath.generation.prompt_lookup import NgramIndex
from grath.generation.shared_prefix import generate_shared_prefix
from grath.modeling.cpu_matmul import prepare_for_inference, time_products

# Name: (prompts, length of their common prefix).
PROMPTS = {
    "of different lengths": (make_prompts(20, 30), 30),
    "without a common prefix": (make_prompts(6, 0), 0),
    "of one token after the prefix": ([[*range(1, 20), i] for i in range(20, 25)], 19),
    "that are equal": ([[4, 5, 6, 7]] * 3, 3),
    "of one token": ([[9]], 0),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("prompts", "length"), PROMPTS.values(), ids=PROMPTS)
def test_prompts(family, prompts, length):
    model = tiny(family)
    assert common_prefix_length(prompts) == length
    expected = plain(model, prompts, 12, {5, 7})
    for batch_size in (1, 3, 17):
        same(model, prompts, shared(model, prompts, 12, {5, 7}, batch_size), expected)


def test_completions_end_at_the_first_step_and_at_the_limit():
    model, prompts = tiny("llama"), make_prompts(5, 10)
    first = {completion[0] for completion in shared(model, prompts, 1, set(), 2)}
    assert shared(model, prompts, 5, first, 2) == [[]] * 5
    assert [len(completion) for completion in shared(model, prompts, 7, set(), 2)] == [7] * 5


@pytest.mark.parametrize("end", ["close", "error"])
def test_the_models_own_attention_is_restored(end):
    """The reader of the completions is not in inference mode."""
    model, prompts = tiny("llama"), make_prompts(3, 4)
    original = model.config._attn_implementation
    found = generate_shared_prefix(model, prompts, 3, 1, set())
    next(found)
    assert model.config._attn_implementation != original and not torch.is_inference_mode_enabled()
    if end == "close":
        found.close()
    else:
        model.model.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(found)
    assert model.config._attn_implementation == original


@pytest.mark.parametrize("batch_size", [1, 8, 128])
@pytest.mark.parametrize("way", [None, "plain", "packed"])
def test_an_adapter_and_prepared_weights(way, batch_size, monkeypatch):
    """None: an adapter on weights that are not prepared."""
    if way and way not in time_products(torch.zeros(8, 8)):
        pytest.skip(f"this CPU has no {way} products")
    config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model, prompts = get_peft_model(tiny("llama", vocab_size=140), config).eval(), make_prompts(batch_size + 2, 12)
    expected = plain(model, prompts[:40], 8, {5})
    with model.disable_adapter():
        assert plain(model, prompts[:40], 8, {5}) != expected
    if way:
        monkeypatch.setattr("grath.modeling.cpu_matmul.choose_way", lambda model: way)
        model = prepare_for_inference(model)
        assert hasattr(model, "peft_config") == (way == "plain")
    same(model, prompts[:40], shared(model, prompts, 8, {5}, batch_size)[:40], expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("batch_size", "prefix"), [(1, 12), (8, 0), (32, 12)])
def test_drafts_change_no_token_and_save_passes(family, batch_size, prefix, monkeypatch):
    """The drafts are the tokens that come, of which some are replaced."""
    model, prompts = tiny(family, vocab_size=140), make_prompts(batch_size + 2, prefix)
    expected, length = plain(model, prompts[:40], 20, {5}), common_prefix_length(prompts)
    draw, passes, known = random.Random(0), [], {}
    model.model.register_forward_pre_hook(lambda *_: passes.append(1))

    class Drafts(NgramIndex):
        def __init__(self, tokens):
            super().__init__(tokens)
            self.prompt = tuple(tokens)

        def draft(self, limit):
            coming = known.get(self.prompt, [])
            done = self.tokens[len(self.prompt) :]
            if coming[: len(done)] != done:  # no drafts are known, or two logits tie within the rounding
                return []
            return [(i + 1) % 140 if draw.random() < 0.2 else i for i in coming[len(done) : len(done) + limit]]

    monkeypatch.setattr("grath.generation.shared_prefix.NgramIndex", Drafts)
    without = shared(model, prompts, 20, {5}, batch_size)
    same(model, prompts[:40], without[:40], expected)
    passes_without = len(passes)
    known.update((tuple(prompt[length:]), ids) for prompt, ids in zip(prompts, without, strict=True))
    same(model, prompts, shared(model, prompts, 20, {5}, batch_size), without)
    assert len(passes) - passes_without < passes_without


def test_a_completion_that_repeats_itself_needs_fewer_passes():
    model, prompts, passes = tiny("llama"), make_prompts(3, 12), []
    with torch.no_grad():  # the next token depends on the last one only, so the completions run in circles
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    expected = plain(model, prompts, 80, set())
    model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    same(model, prompts, shared(model, prompts, 80, set(), 3), expected)
    assert len(passes) < 60


@pytest.mark.parametrize(
    "configured",
    [{}, {"repetition_penalty": 9.0}, {"no_repeat_ngram_size": 1}, {"num_beams": 3}, {"suppress_tokens": [*range(30)]}],
)
def test_generate_hf_gives_the_same(configured):
    """It is greedy whatever the model's generation configuration says."""
    model, prompts = tiny("llama"), make_prompts(9, 12)
    expected = plain(model, prompts, 10, {5, 7})
    model.generation_config.update(**configured)
    assert not configured or plain(model, prompts, 10, {5, 7}) != expected
    found = dict(generate_hf(model, prompts, 10, 4, [5, 7]))
    same(model, prompts, [found[i] for i in range(9)], expected)


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {}, None),
        ("mistral", {"sliding_window": 100}, None),
        ("mistral", {"sliding_window": 99}, "its sliding window of 99 tokens is shorter than a sequence of 100"),
        ("gemma2", {}, "its family gemma2 is not one of"),
        ("llama", DYNAMIC, "its dynamic position embedding"),
    ],
)
def test_models_that_the_engine_does_not_support(family, changes, reason):
    found = unsupported_reason(tiny(family, **changes), 100)
    assert found is None if reason is None else found.startswith(reason)
