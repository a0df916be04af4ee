"""What must hold on a GPU: `make gpu-test`. Each test also runs on the CPU, except where only a GPU has the code.

make gpu-test      prints a table to paste into an issue
"""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from support import asking, call, call_here, rows, score_values, tiny

from grath.evaluation.harness import load_local
from grath.generation.attention import fused_kernels_differ
from grath.generation.cache import download
from grath.generation.select import LocalGenerator
from grath.generation.shared_prefix import generate_shared_prefix
from grath.modeling.loading import load_for_inference


def needs_gpu(reason):
    """Mark a test that runs on a GPU only."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason=reason)
    return lambda test: pytest.mark.gpu(skip(test))


def test_the_engine_is_greedy_in_fp32(device):
    """Each token has the best logit of a forward pass of its row alone, within rounding."""
    model = tiny("llama", num_hidden_layers=32).to(device)
    prompts = [[*range(1, 40), i, *range(1, 2 + i % 4)] for i in range(12)]
    for i, ids in list(generate_shared_prefix(model, prompts, 12, 5, [5, 7])):
        with torch.inference_mode():
            logits = model(torch.tensor([prompts[i] + ids], device=model.device)).logits[0, len(prompts[i]) - 1 :]
        taken = [[token] for token in ids] + [[5, 7]] * (len(ids) < 12)
        for row, tokens in zip(logits, taken, strict=False):
            assert row.max() - row[tokens].max() <= 1e-4 * row.abs().max(), f"{ids} of prompt {i}"


@needs_gpu("tests/generation/test_attention.py compares a CPU's kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "size"), [(32, 128), (3, 64)])
def test_the_kernels_equal_the_exact_attention(dtype, heads, size):
    assert fused_kernels_differ(torch.device("cuda"), dtype, heads, size) is None


@pytest.mark.parametrize("precision", ["int8", "nf4", "fp4"])
def test_quantized_models_write_pairs_and_train(device, precision, tiny_llama, pair_file, tmp_path, monkeypatch):
    loaded = []
    load = lambda *args: loaded.append(load_for_inference(*args)) or loaded[-1]  # noqa: E731
    monkeypatch.setattr("create_pair_responses.load_for_inference", load)
    call_here(*asking(tiny_llama, tmp_path, "--precision", precision, "--useFS", count=4))
    assert len(rows(next(tmp_path.glob("p_num_4_*_True.json")))) == 4
    weight = loaded[0].model.layers[0].self_attn.q_proj.weight
    assert type(weight).__name__ == ("Int8Params" if precision == "int8" else "Params4bit")
    assert getattr(weight, "quant_type", "int8") == precision
    assert loaded[0].lm_head.weight.is_floating_point()
    out = tmp_path / "out"
    call_here(
        "dpo.py", "--dataset_path", pair_file, "--model_name_or_path", tiny_llama, "--output_dir", out, "--precision",
        precision, "--max_steps", 8, "--warmup_steps", 0, "--learning_rate", "5e-3", "--logging_steps", 1,
    )  # fmt: skip
    log = [row for row in rows(out / "training_log.jsonl") if "loss" in row]
    assert float(log[-1]["loss"]) < float(log[0]["loss"]) and all(float(row["grad_norm"]) > 0 for row in log[:2])


def test_scores_equal_those_of_hf_in_fp32(device, tiny_llama, tmp_path):
    for backend in ("hf", "hf-shared"):
        flags = ("--tasks", "grath_mc1", "grath_mc2", "--limit", 20, "--batch_size", 4, "--precision", "fp32")
        call_here("grath.evaluation", tiny_llama, tmp_path / backend, *flags, "--backend", backend)
    assert score_values(tmp_path / "hf-shared") == pytest.approx(score_values(tmp_path / "hf"), abs=1e-2)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_scores_of_quantized_models(device, precision, tiny_llama, tmp_path):
    likely = {}
    for name in ("fp32", precision):
        score = (tiny_llama, tmp_path / name, "--tasks", "grath_mc1", "--limit", 4, "--log_samples", "--samples")
        call_here("grath.evaluation", *score, "--precision", name)
        questions = rows(tmp_path / name / "samples_grath_mc1.jsonl")
        likely[name] = [float(answer[0][0]) for question in questions for answer in question["resps"]]
        assert len(rows(tmp_path / name / "samples.jsonl")) == 5
    assert json.loads((tmp_path / precision / "settings.json").read_text())["inputs"]["precision"] == precision
    # Rounded weights change every log-likelihood, but not by much.
    assert all(one != other for one, other in zip(*likely.values(), strict=True))
    assert likely[precision] == pytest.approx(likely["fp32"], rel=0.2, abs=2)


@needs_gpu("a CPU has no work in a queue")
def test_results_are_read_while_later_work_runs():
    numbers, large = torch.arange(3, device="cuda"), torch.ones(8192, 8192, dtype=torch.float16, device="cuda")
    large @ large  # chooses the kernel
    torch.cuda.synchronize()
    read = download(numbers)
    for _ in range(200):
        large @ large
    assert read() == [0, 1, 2] and not torch.cuda.current_stream().query()


@needs_gpu("test_the_demo_on_smollm2_with_reduced_sizes runs it on a CPU")
def test_two_iterations_of_the_demo(monkeypatch, tmp_path):
    """In int8, fp4 and fp16, with the paged optimizer."""
    monkeypatch.setenv("DEVICE", "")
    env = {"NUM_QUERY": "24", "MAX_STEPS": "8", "WARMUP_STEPS": "0", "LIMIT": "20", "RUNS_DIR": str(tmp_path)}
    done = call("run_smollm2.sh", env=env)
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("M_")][-3:] == ["M_0", "M_1", "M_2"]


@contextmanager
def little_memory(work):
    """Leave 30 MB more of the GPU's memory than work (a function) reserves."""
    for _ in range(2):  # the first time allocates what stays
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work()
    limit = torch.cuda.max_memory_reserved() + 30e6
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@needs_gpu("a CPU's memory has no limit")
def test_pairs_that_do_not_fit_are_asked_in_smaller_batches(capsys):
    model = tiny("llama", num_hidden_layers=32).to("cuda")
    tokenizer = SimpleNamespace(eos_token_id=59, decode=lambda ids, **_: str(ids))
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_(), layer.mlp.down_proj.weight.data.zero_()
    # The token t + 1 follows the token t, by a wide margin.
    model.lm_head.weight.data = 10 * model.model.embed_tokens.weight.data.roll(1, 0)
    prompts = [[1, i // 59, *range(1, 59), *range(1, 59), i % 59] for i in range(256)]

    def ask(rows):
        generator = LocalGenerator(model, tokenizer, 30, batch_size=rows)
        return {index: text for index, text, _ in generator.generate(prompts)}

    with little_memory(lambda: ask(4)):
        found = ask(256)
    assert "The memory is full" in capsys.readouterr().out
    assert found == {i: str([*range(i % 59 + 1, min(59, i % 59 + 31))]) for i in range(256)}


@needs_gpu("a CPU's memory has no limit")
def test_scores_that_do_not_fit_are_computed_in_smaller_batches(capsys, tiny_llama):
    lm = load_local("hf-shared", str(tiny_llama), "fp32")
    windows = [((i + 1, *range(1, 500 - i)), (5, 6, 7)) for i in range(64)]

    def score(tokens):
        lm.batch_tokens = tokens
        return [likely for likely, _ in lm.score(windows, disable_tqdm=True)]

    with little_memory(lambda: score(512)):
        found = score(32_768)
    assert "The memory is full" in capsys.readouterr().out
    assert found == pytest.approx(score(512), rel=1e-4)
