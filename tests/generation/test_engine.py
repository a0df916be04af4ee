"""The shared-prefix engine gives the same tokens as `model.generate`."""

import random
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from support import FAMILIES, HUB, PROJECT, VLLM_ENV, call, needs_hub, tiny
from transformers import LlamaConfig

from grath.evaluation.loglikelihood import loglikelihoods
from grath.generation.attention import engine_attention, unsupported_reason
from grath.generation.cache import common_prefix_length
from grath.generation.shared_prefix import generate_shared_prefix
from grath.generation.select import BATCH_SIZE, select_rows
from grath.generation.hf import generate_hf
from grath.generation.prompt_lookup import NgramIndex
from grath.modeling.cpu_matmul import prepare_linear_layers, time_products
from grath.modeling.memory import PAIRS_PREFIX, PAIRS_PROMPT


def plain(model, prompts, max_new_tokens, eos_ids):
    """Generate with `model.generate`, one prompt at a time."""
    completions = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
            eos_token_id=sorted(eos_ids) or None, pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        end = next((i for i, token in enumerate(output) if token in eos_ids), len(output))
        completions.append(output[:end])
    return completions


def shared(model, prompts, max_new_tokens, eos_ids, batch_size):
    """Generate with the shared-prefix engine."""
    done = {}
    generate_shared_prefix(model, prompts, max_new_tokens, batch_size, eos_ids, done.__setitem__)
    return [done[i] for i in range(len(prompts))]


def same(model, prompts, ours, theirs):
    """Assert equal completions. Two may differ from a token on whose two best logits tie within float32 rounding."""
    for prompt, one, other in zip(prompts, ours, theirs, strict=True):
        if one == other:
            continue
        at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + one[:at]])).logits[0, -1]
        best = logits.topk(2).values
        assert best[0] - best[1] <= 1e-5 * logits.abs().max(), f"{one} is not {other}, from token {at} on"


def make_prompts(count, prefix, seed=0):
    """Return random prompts of different lengths after a common prefix of `prefix` tokens."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(1, 60, (n,), generator=generator).tolist()  # noqa: E731
    common = draw(prefix)
    return [common + [i + 1] + draw(int(torch.randint(0, 12, (), generator=generator))) for i in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3, 17])
def test_ragged_prompts(family, batch_size):
    model, prompts = tiny(family), make_prompts(20, 30)
    expected = plain(model, prompts, 12, {5, 7})
    assert len({len(completion) for completion in expected}) > 1
    same(model, prompts, shared(model, prompts, 12, {5, 7}, batch_size), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_common_prefix(family):
    model, prompts = tiny(family), make_prompts(6, 0)
    assert common_prefix_length(prompts) == 0
    same(model, prompts, shared(model, prompts, 8, set(), 4), plain(model, prompts, 8, set()))


def test_prompts_with_one_token_after_the_prefix():
    model = tiny("llama")
    prompts = [[*range(1, 20), i] for i in range(20, 25)]
    assert common_prefix_length(prompts) == 19
    same(model, prompts, shared(model, prompts, 8, {3}, 3), plain(model, prompts, 8, {3}))


def test_equal_prompts_and_a_single_prompt():
    model = tiny("llama")
    prompts = [[4, 5, 6, 7]] * 3
    assert common_prefix_length(prompts) == 3
    same(model, prompts, shared(model, prompts, 6, set(), 2), plain(model, prompts, 6, set()))
    same(model, [[9]], shared(model, [[9]], 6, set(), 2), plain(model, [[9]], 6, set()))


def test_completions_end_at_the_first_step_and_at_the_limit():
    model, prompts = tiny("llama"), make_prompts(5, 10)
    first = {completion[0] for completion in plain(model, prompts, 1, set())}
    assert shared(model, prompts, 5, first, 2) == [[]] * 5
    assert [len(completion) for completion in shared(model, prompts, 7, set(), 2)] == [7] * 5


def test_the_models_own_attention_is_restored():
    model, prompts = tiny("llama"), make_prompts(3, 4)
    original = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="stop"):
        generate_shared_prefix(model, prompts, 3, 2, set(), lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    assert model.config._attn_implementation == original
    assert plain(model, prompts, 3, set())


def test_a_model_with_an_adapter():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny("llama"), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    prompts = make_prompts(7, 12)
    adapted = plain(model, prompts, 8, set())
    with model.disable_adapter():
        assert plain(model, prompts, 8, set()) != adapted
    same(model, prompts, shared(model, prompts, 8, set(), 3), adapted)


@pytest.mark.parametrize("batch_size", [1, 8, 32, 128])
@pytest.mark.parametrize("way", ["plain", "packed"])
def test_prepared_weights_and_a_merged_adapter_change_no_token(way, batch_size, monkeypatch):
    from peft import LoraConfig, get_peft_model

    if way not in time_products(torch.zeros(8, 8)):
        pytest.skip(f"this CPU has no {way} products")
    config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model, prompts = get_peft_model(tiny("llama", vocab_size=140), config).eval(), make_prompts(batch_size + 2, 12)
    expected = plain(model, prompts[:40], 8, {5})
    monkeypatch.setattr("grath.modeling.cpu_matmul.choose_way", lambda model: way)
    prepared = prepare_linear_layers(model)
    assert hasattr(prepared, "peft_config") == (way == "plain")
    same(prepared, prompts[:40], shared(prepared, prompts, 8, {5}, batch_size)[:40], expected)


def test_prompt_lookup_continues_the_longest_n_gram_that_occurred():
    index = NgramIndex([1, 2, 3, 7, 5, 2, 3, 8, 1, 2, 3])
    assert index.draft(2) == [7, 5]
    assert index.draft(99) == [7, 5, 2, 3, 8, 1, 2, 3]
    index.append(8)
    assert index.draft(3) == [1, 2, 3]
    index.append(6)
    assert index.draft(3) == []
    assert NgramIndex([]).draft(3) == NgramIndex([4, 4]).draft(3) == []
    assert NgramIndex([4, 4, 4]).draft(3) == [4]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("batch_size", "prefix"), [(1, 12), (8, 0), (8, 12), (32, 12), (128, 12)])
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("batch_size", "prefix"), [(1, 25), (3, 0), (17, 25)])
def test_log_likelihoods_of_answers(family, batch_size, prefix):
    model = tiny(family)
    common = make_prompts(1, 25)[0][:prefix]
    answers = [prompt[1:] for prompt in make_prompts(6, 3, seed=1)]
    # Equal beginnings in three depths, an answer that begins another one, and the same answer twice.
    answers += [[7, 8, 9, 1], [7], [7, 3, 1], [7, 8, 9, 2, 4], [7, 8], [7, 8, 9, 1]]
    trees = [(context, answers[i:]) for i, context in enumerate(make_prompts(5, 0, seed=2))]
    with engine_attention(model):
        batches = loglikelihoods(model, common, trees, 40 * batch_size, batch_size)
        results = {tree: found for read in batches for tree, found in read()}
    assert sorted(results) == list(range(5))
    for i, (context, answers) in enumerate(trees):
        for answer, (log_prob, greedy) in zip(answers, results[i], strict=True):
            logits = model(torch.tensor([common + context + answer])).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
            expected = logits.gather(1, torch.tensor(answer)[:, None]).sum().item()
            assert log_prob == pytest.approx(expected, rel=1e-5, abs=1e-4)
            best = logits.topk(2).values
            ties = (best[:, 0] - best[:, 1]).min() <= 1e-5 * logits.abs().max()
            assert ties or greedy == (logits.argmax(-1).tolist() == answer)


@pytest.mark.parametrize(
    ("precision", "memory", "rows"),
    [("fp16", 23.6e9, 48), ("int8", 23.6e9, 96), ("fp16", 84.9e9, 256), ("fp16", 9e9, 1)],
)
def test_a_batch_has_as_many_rows_as_the_memory_of_a_gpu_takes(precision, memory, rows, monkeypatch):
    """The table in docs/hardware.md, for prompts of the lengths that it assumes."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory))
    prompts = [[1] * PAIRS_PREFIX + [2] * PAIRS_PROMPT, [1] * PAIRS_PREFIX + [3]]
    for device, expected in (("cuda", rows), ("cpu", BATCH_SIZE)):
        model = SimpleNamespace(device=torch.device(device), config=LlamaConfig())  # Llama-2-7B's sizes
        assert select_rows(model, precision, prompts, 100) == expected


@pytest.mark.parametrize("configured", [{}, {"repetition_penalty": 9.0}, {"no_repeat_ngram_size": 1}, {"num_beams": 3}])
def test_generate_hf_gives_the_same(configured):
    """It is greedy whatever the model's generation configuration says."""
    model, prompts, done = tiny("llama"), make_prompts(9, 12), {}
    expected = plain(model, prompts, 10, {5, 7})
    model.generation_config.update(**configured)
    assert not configured or plain(model, prompts, 10, {5, 7}) != expected
    generate_hf(model, prompts, 10, 4, [5, 7], done.__setitem__)
    same(model, prompts, [done[i] for i in range(9)], expected)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {}, None),
        ("mistral", {"sliding_window": 100}, None),
        ("mistral", {"sliding_window": 99}, "its sliding window of 99 tokens is shorter than a sequence of 100"),
        ("gemma2", {}, "its family gemma2 is not one of"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "its dynamic position embedding",
        ),
    ],
)
def test_models_that_the_engine_does_not_support(family, changes, reason):
    found = unsupported_reason(tiny(family, **changes), 100)
    assert found is None if reason is None else found.startswith(reason)


def test_an_adapter_of_virtual_tokens_is_not_supported():
    from peft import PromptTuningConfig, get_peft_model

    adapted = get_peft_model(tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert unsupported_reason(adapted, 100) == "its adapter adds virtual tokens"


@needs_hub
@pytest.mark.parametrize(("dtype", "ways"), [("fp32", ["one", "vllm", "engine"]), ("bf16", ["padded", "copied"])])
def test_the_generation_benchmark(dtype, ways, tiny_llama):
    env = VLLM_ENV if "vllm" in ways else {}
    done = call(
        sys.executable, PROJECT / "benchmarks" / "generation.py", "--model", tiny_llama, "--num_query", "5",
        "--batch_size", "2", "--max_new_tokens", "40", "--dtype", dtype, "--data_name", "allenai/ai2_arc",
        "--runs", "1", "--ways", *ways, cwd=HUB, env=env,
    )  # fmt: skip
    table = [line.split() for line in done.stdout.splitlines() if re.search(r"\d of 5$", line)]
    assert [line[0] for line in table] == ways
    if dtype == "fp32":
        assert [line[-3] for line in table] == ["5"] * 3
    assert ("engine over" in done.stdout) == ("engine" in ways)


def test_the_generation_benchmark_needs_the_python_of_vllm():
    script = [sys.executable, PROJECT / "benchmarks" / "generation.py", "--ways", "vllm"]
    done = call(*script, env={"VLLM_PYTHON": ""}, status=2)
    assert "needs VLLM_PYTHON" in done.stderr and done.stderr.count("\n") == 1
