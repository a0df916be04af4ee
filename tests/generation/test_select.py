"""The rows of a batch when the memory is full, and the benchmark of the ways to generate."""

import re
import sys
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from greedy import make_prompts, plain, same
from support import HUB, PROJECT, VLLM_ENV, call, needs_hub, tiny

from grath.generation import select
from grath.generation.select import GPU_ROWS, ROWS, LocalGenerator

TOKENIZER = SimpleNamespace(
    eos_token_id=5, decode=lambda ids: " ".join(map(str, ids)), added_tokens_decoder={99: SimpleNamespace(special=True)}
)


def full_at(*passes):
    """A hook of forward passes; the memory is full at the passes of these numbers, from 0 on."""
    numbers = count()

    def hook(*_):
        if next(numbers) in passes:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return hook


@pytest.mark.parametrize(("engine", "name"), [("shared_prefix", "generate_shared_prefix"), ("generate", "generate_hf")])
@pytest.mark.parametrize(
    ("passes", "rows"),
    [((), 8), ((0,), 4), ((1,), 4), ((5,), 4), ((0, 1, 2), 1), ((9, 20), 2)],
    ids=["never", "prefix", "prefill", "step", "to one row", "twice"],
)
def test_when_the_memory_is_full_half_of_the_rows_remain(engine, name, passes, rows, monkeypatch, capsys):
    """All completions come once, are those of a small batch, and are not computed again."""
    model, prompts, asked, found = tiny("llama"), make_prompts(24, 12), [], {}
    model.generation_config.eos_token_id = [5, *range(0, 60, 7)]
    expected = plain(model, prompts, 12, set(model.generation_config.eos_token_id))
    generate_fn = getattr(select, name)
    monkeypatch.setattr(select, name, lambda model, new, *rest: asked.append(new) or generate_fn(model, new, *rest))
    model.model.register_forward_pre_hook(full_at(*passes))
    generator = LocalGenerator(model, TOKENIZER, 12, 8, engine)
    for index, text, cut in generator.generate(prompts):
        assert index not in found and prompts[index] in asked[-1]
        found[index] = [*map(int, text.split())]
        assert cut == (len(found[index]) == 12)
    same(model, prompts, [found[i] for i in range(24)], expected)
    assert generator.rows == rows and len(asked) == len(passes) + 1
    assert capsys.readouterr().out.count("The memory is full with") == len(passes)
    if passes in ((5,), (9, 20)) and engine == "shared_prefix":
        assert len(asked[-1]) < 24


def test_a_single_row_that_does_not_fit_is_an_error():
    model, prompts, found = tiny("llama"), make_prompts(24, 12), []
    model.model.register_forward_pre_hook(full_at(*range(99)))
    generator = LocalGenerator(model, TOKENIZER, 12)
    with pytest.raises(torch.OutOfMemoryError):
        found += generator.generate(prompts)
    assert generator.rows == 1 and not found


def test_special_tokens_become_line_breaks(monkeypatch):
    completions = [(0, [99, 3, 9, 99, 99, 4, 99]), (1, [99, 3, 9, 8])]
    monkeypatch.setattr(select, "generate_shared_prefix", lambda *_: iter(completions))
    generator = LocalGenerator(tiny("llama"), TOKENIZER, 12)
    assert list(generator.generate([[1], [2]])) == [(0, "3 9\n4", False), (1, "3 9 8", False)]


def test_the_device_decides_the_first_rows(monkeypatch):
    for name in ("generate_shared_prefix", "generate_hf"):
        monkeypatch.setattr(select, name, lambda model, prompts, *_: ((i, [1]) for i in range(len(prompts))))
    config = {"config": tiny("llama").config, "generation_config": tiny("llama").generation_config}
    kinds = ("cuda", "shared_prefix", GPU_ROWS), ("cuda", "generate", ROWS), ("cpu", "shared_prefix", ROWS)
    for device, engine, rows in kinds:
        model = SimpleNamespace(device=torch.device(device), **config)
        generator = LocalGenerator(model, TOKENIZER, 12, engine=engine)
        assert len(list(generator.generate(make_prompts(3, 4)))) == 3 and generator.rows == rows


@needs_hub
def test_the_generation_benchmark(tiny_llama):
    ways = ["one", "padded", "copied", "vllm", "engine"]
    done = call(
        sys.executable, PROJECT / "benchmarks" / "generation.py", "--model", tiny_llama, "--num_query", "5",
        "--batch_size", "2", "--max_new_tokens", "40", "--dtype", "fp32", "--data_name", "allenai/ai2_arc",
        "--runs", "1", "--ways", *ways, cwd=HUB, env=VLLM_ENV,
    )  # fmt: skip
    table = [line.split() for line in done.stdout.splitlines() if re.search(r"\d of 5$", line)]
    assert [(line[0], line[-3]) for line in table] == [(way, "5") for way in ways]
    assert "engine over" in done.stdout
