"""What must hold on a GPU: `make gpu-test`. Each test also runs on the CPU, except where only a GPU has the code.

make gpu-test      prints a table to paste into an issue
"""

import json
import re
import sys
import time

import pytest
import torch
from support import BUNDLED, PROJECT, call, call_here, norms_of, rows, tiny

from grath.evaluation.loglikelihood import window_loglikelihoods
from grath.generation.attention import explicit_attention, fused_kernels_differ, partial_attention
from grath.generation.engine import generate_shared_prefix
from grath.modeling.loading import load_for_inference, load_model, load_tokenizer

HALF = [torch.float16, torch.bfloat16]


def deep_llama(device, **changes):
    """A Llama of 32 layers with narrow matrices."""
    return tiny("llama", num_hidden_layers=32, **changes).to(device)


def prompts_of(tokenizer, count):
    from grath.modeling.chat import prompt_ids, template_for
    from grath.pairs.prompts import build_messages, load_demos
    from grath.pairs.questions import load_questions

    template, demos = template_for(tokenizer, "auto"), load_demos("truthfulqa")
    questions = load_questions(data_path=BUNDLED)[:count]
    return [prompt_ids(tokenizer, build_messages(question, 0, False, demos), template) for question in questions]


def same_as_generate(model, prompts, count, eos_ids):
    """Compare the engine with `generate`; a difference must be a tie of the two best logits within rounding."""
    done = {}
    generate_shared_prefix(model, prompts, count, 5, eos_ids, done.__setitem__)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt], device=model.device)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=eos_ids,
            pad_token_id=eos_ids[0],
        )[0, len(prompt) :].tolist()  # fmt: skip
        expected = output[: next((at for at, token in enumerate(output) if token in eos_ids), count)]
        if done[i] != expected:
            pairs = list(zip(done[i], expected, strict=False))
            at = next((at for at, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + expected[:at]], device=model.device)).logits[0, -1]
            best = logits.topk(2).values
            assert best[0] - best[1] <= 1e-4 * logits.abs().max(), f"{done[i]} is not {expected}"


def test_the_engine_equals_generate_in_fp32(device):
    model = deep_llama(device)
    same_as_generate(model, [[*range(1, 40), i, *range(1, 2 + i % 4)] for i in range(12)], 12, [5, 7])


def test_the_engine_equals_generate_on_smollm2(device, smollm2):
    model, tokenizer = load_model(str(smollm2), "fp32").to(device).eval(), load_tokenizer(str(smollm2))
    same_as_generate(model, prompts_of(tokenizer, 2), 8, [tokenizer.eos_token_id])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("heads", "size"), [(32, 128), (3, 64)])
def test_the_kernels_equal_the_exact_attention(device, dtype, heads, size):
    if device == "cuda":
        assert fused_kernels_differ(torch.device(device), dtype, heads, size) is None
        return
    query, key, value = (torch.randn(2, heads, length, size).to(dtype) for length in (9, 33, 33))
    ours, exact = (way(query, key, value, 0.1) for way in (partial_attention, explicit_attention))
    for one, other in zip(ours, exact, strict=True):
        assert (one.float() - other).abs().max() <= 8 * torch.finfo(dtype).eps * other.abs().max()


@pytest.mark.parametrize("precision", ["int8", "nf4", "fp4"])
def test_quantized_models_write_pairs_and_train(device, precision, tiny_llama, pair_file, tmp_path):
    ask = ("create_pair_responses.py", "--model_name_or_path", tiny_llama, "--save_prefix", "p", "--save_dir", tmp_path)
    call_here(*ask, "--precision", precision, "--data_path", BUNDLED, "--num_query", 4, "--useFS")
    assert len(rows(next(tmp_path.glob("p_num_4_*.json")))) == 4
    out = tmp_path / "out"
    call_here(
        "dpo.py", "--dataset_path", pair_file, "--model_name_or_path", tiny_llama, "--output_dir", out, "--precision",
        precision, "--max_steps", 8, "--warmup_steps", 0, "--learning_rate", "5e-3", "--logging_steps", 1,
    )  # fmt: skip
    log = [row for row in rows(out / "training_log.jsonl") if "loss" in row]
    assert float(log[-1]["loss"]) < float(log[0]["loss"]) and all(float(row["grad_norm"]) > 0 for row in log[:2])


def test_norms_are_one_operator_on_a_gpu(device, tiny_llama):
    model = load_for_inference(str(tiny_llama), "fp32")
    norms = norms_of(model)
    assert norms and all(("forward" in vars(norm)) == (model.device.type == "cuda") for norm in norms)


def test_scores_equal_those_of_hf_in_fp32(device, tiny_llama, tmp_path):
    for backend in ("hf", "hf-shared"):
        score = (tiny_llama, tmp_path / backend, "--tasks", "grath_mc1", "grath_mc2", "--limit", 20)
        call_here("grath.evaluation", *score, "--precision", "fp32", "--backend", backend)
    for task in ("grath_mc1", "grath_mc2"):
        theirs, ours = (
            json.loads((tmp_path / backend / f"{task}.json").read_text())["results"][task]["acc,none"]
            for backend in ("hf", "hf-shared")
        )
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_scores_of_quantized_models(device, precision, tiny_llama, tmp_path):
    likely = []
    for name in ("fp32", precision):
        score = (tiny_llama, tmp_path / name, "--tasks", "grath_mc1", "--limit", 4, "--log_samples", "--samples")
        call_here("grath.evaluation", *score, "--precision", name)
        questions = rows(tmp_path / name / "samples_grath_mc1.jsonl")
        likely.append([float(answer[0][0]) for question in questions for answer in question["resps"]])
        assert len(rows(tmp_path / name / "samples.jsonl")) == 5
    assert f"dtype={precision}\n" in (tmp_path / precision / "settings.txt").read_text()
    # Rounded weights change every log-likelihood, but not by much.
    exact, rounded = likely
    assert all(one != other for one, other in zip(exact, rounded, strict=True))
    assert rounded == pytest.approx(exact, rel=0.2, abs=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no driver")
def test_the_check_describes_the_gpu(monkeypatch):
    from grath.pipeline.machine import check_device

    monkeypatch.setenv("DEVICE", "")
    assert re.search(r"compute capability \d+\.\d; driver for CUDA \d\d\.\d; torch .* for CUDA", check_device(1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no work in a queue")
def test_results_are_read_while_later_work_runs():
    from grath.generation.cache import download

    numbers, large = torch.arange(3, device="cuda"), torch.ones(8192, 8192, dtype=torch.float16, device="cuda")
    large @ large  # chooses the kernel
    torch.cuda.synchronize()
    read = download(numbers)
    for _ in range(200):
        large @ large
    assert read() == [0, 1, 2] and not torch.cuda.current_stream().query()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes has paged optimizers on a GPU only")
def test_paged_adamw(monkeypatch, tiny_llama, pair_file, tmp_path):
    monkeypatch.setenv("DEVICE", "")
    call(
        "dpo.py", "--dataset_path", pair_file, "--model_name_or_path", tiny_llama, "--output_dir", tmp_path, "--optim",
        "paged_adamw_32bit", "--max_steps", 3, "--warmup_steps", 0,
    )  # fmt: skip
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="test_the_demo_on_smollm2_with_reduced_sizes runs it on a CPU"
)
def test_two_iterations_of_the_demo(monkeypatch, tmp_path):
    monkeypatch.setenv("DEVICE", "")
    env = {"NUM_QUERY": "24", "MAX_STEPS": "8", "WARMUP_STEPS": "0", "LIMIT": "20", "RUNS_DIR": str(tmp_path)}
    done = call("run_smollm2.sh", env=env)
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("M_")][-3:] == ["M_0", "M_1", "M_2"]


def test_milliseconds_beside_the_constants(device, measured):
    """Measure what benchmarks/gpu_cost.py assumes. On a CPU the numbers say nothing about a GPU."""
    sys.path.insert(0, str(PROJECT / "benchmarks"))
    from operator_counter import HOST_US

    sizes = {"hidden_size": 512, "intermediate_size": 1024, "max_position_embeddings": 4096}
    model = deep_llama(device, **sizes).to(torch.bfloat16)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    counted = []
    model.model.register_forward_pre_hook(lambda *_: counted.append(1))

    def milliseconds(work, label):
        work()
        counted.clear()
        wait()
        start = time.perf_counter()
        work()
        wait()
        spent = 1000 * (time.perf_counter() - start)
        measured.append((f"{label}, {device}", f"{spent / len(counted):.2f} ms a forward pass"))
        return spent

    prompts = [[*range(1, 50), i % 60, i // 60 + 1] for i in range(64)]
    steps = 20 if device == "cuda" else 3
    spent = milliseconds(
        lambda: generate_shared_prefix(model, prompts, steps, 64, [63], lambda *_: None), "generation of 64 rows"
    )
    windows = [(tuple(range(1, 50)) * 4 + (i,), (5, 6)) for i in range(16)]
    milliseconds(lambda: list(window_loglikelihoods(model, windows, 16_384)), "scoring")
    one = torch.ones(8, device=device)
    launches = 2000
    wait()
    start = time.perf_counter()
    for _ in range(launches):
        one.add_(1)
    wait()
    bare = 1e6 * (time.perf_counter() - start) / launches
    measured.append((f"a launch, {device}", f"{bare:.1f} us alone; assumed in a model: {HOST_US['forward']} us"))
    assert spent > 0 and len(measured) >= 3
