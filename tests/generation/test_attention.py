"""The attention of a GPU, with CPU kernels in place of the fused ones."""

import pytest
import torch
from greedy import same, shared
from support import FAMILIES, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from grath.evaluation.loglikelihood import window_loglikelihoods
from grath.generation import attention
from grath.generation.attention import explicit_attention, fused_attention, fused_kernels_differ, select_attention_fn

CPU = torch.device("cpu")


def efficient(query, key, value, bias, compute_lse, dropout=0.0, causal=False, scale=None):
    """What CUDA's memory-efficient kernel promises: it checks the bias and pads the log-sum-exp to blocks of 32."""
    assert compute_lse and not dropout and not causal
    if bias is not None:
        assert bias.dtype == query.dtype and bias.shape == (*query.shape[:3], key.shape[2])
        assert bias.stride(-1) == 1 and bias.stride(-2) % 8 == 0
    out, lse = explicit_attention(query, key, value, scale, bias)
    padded = lse.new_full((*lse.shape[:2], -(-lse.shape[2] // 32) * 32), float("nan"))
    padded[..., : lse.shape[2]] = lse
    return out.to(query.dtype), padded, torch.zeros(()), torch.zeros(())


def flash(query, key, value, dropout=0.0, causal=False, return_mask=False, scale=None):
    """What CUDA's flash kernel promises: 16-bit numbers only, and no mask."""
    assert query.dtype != torch.float32 and not dropout and not causal
    out, lse = explicit_attention(query, key, value, scale)
    empty = torch.zeros(0)
    return out.to(query.dtype), lse, empty, empty, query.shape[2], key.shape[2], empty, empty, empty


def wrong(kernel):
    """The kernel with a log-sum-exp to the base 2, as some kernels have."""

    def changed(*args, **kwargs):
        out, lse, *rest = kernel(*args, **kwargs)
        return out, lse * 1.4427, *rest

    return changed


@pytest.fixture
def kernels():
    """A function that registers kernels for the CPU: efficient, flash."""
    library = torch.library.Library("aten", "IMPL")

    def register(efficient, flash):
        library.impl("_scaled_dot_product_efficient_attention", efficient, "CPU")
        library.impl("_scaled_dot_product_flash_attention", flash, "CPU")

    yield register
    library._destroy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fused_kernels_are_compared_with_the_exact_attention(kernels, dtype):
    assert "_scaled_dot_product" in fused_kernels_differ(CPU, dtype, 2, 16)  # there are none on a CPU
    kernels(efficient, flash)
    assert fused_kernels_differ(CPU, dtype, 2, 16) is None


@pytest.mark.parametrize("pair", [(wrong(efficient), flash), (efficient, wrong(flash))])
def test_kernels_that_differ_are_found(kernels, pair):
    kernels(*pair)
    assert "differ from the exact result" in fused_kernels_differ(CPU, torch.float16, 2, 16)


def test_a_full_memory_is_no_difference(kernels):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    kernels(full, full)
    with pytest.raises(torch.OutOfMemoryError):
        fused_kernels_differ(CPU, torch.float32, 2, 16)


def test_without_fused_kernels_the_exact_attention_is_used_and_a_line_says_so(monkeypatch, capsys):
    cuda = torch.device("cuda", 7)
    select_attention_fn.cache_clear()
    monkeypatch.setattr(attention, "fused_kernels_differ", lambda *_: "no kernel")
    assert select_attention_fn(cuda, torch.float16, 2, 16) is explicit_attention
    assert select_attention_fn(cuda, torch.float16, 2, 16) is explicit_attention
    assert capsys.readouterr().out.count("without fused kernels") == 1
    monkeypatch.setattr(attention, "fused_kernels_differ", lambda *_: None)
    assert select_attention_fn(cuda, torch.bfloat16, 2, 16) is fused_attention


def scored(model, windows):
    found = window_loglikelihoods(model, windows, 120)
    return [score for _, score in sorted((place, score) for places, score in found for place in places)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_gives_the_same_with_the_kernels_of_a_gpu(kernels, monkeypatch, family, dtype):
    kernels(efficient, flash)
    model = tiny(family).to(dtype)
    head = [7, 8, 9, *range(20, 55)]
    prompts = [[*head, i, *range(1, 2 + i % 5)] for i in range(9)]
    windows = [((*prompt, 3), (i, 4)) for prompt in prompts for i in (1, 2)] + [((1, 2), (3,)), ((4,) * 90, (5, 6))]
    expected, likely = shared(model, prompts, 9, {5}, 3), scored(model, windows)
    used = []
    monkeypatch.setattr(attention, "select_attention_fn", lambda *_: used.append(1) or fused_attention)
    ours, scores = shared(model, prompts, 9, {5}, 3), scored(model, windows)
    assert used
    tolerance = {"rel": 1e-5, "abs": 1e-4} if dtype == torch.float32 else {"rel": 0.05, "abs": 0.1}
    assert [score for score, _ in scores] == pytest.approx([score for score, _ in likely], **tolerance)
    if dtype == torch.float32:
        same(model, prompts, ours, expected)


def test_one_synchronization_for_each_forward_pass(monkeypatch):
    """On a GPU, reading a number or a list waits for all kernels, and so does an upload from ordinary memory."""
    model, prompts = tiny("llama"), [[*range(1, 45), i, *range(1, 2 + i % 5)] for i in range(40)]
    windows = [((*prompt, 3), (i, 4)) for prompt in prompts for i in (1, 2)]
    reads, forwards = [], []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(1) or tolist(tensor))
    model.model.register_forward_pre_hook(lambda *_: forwards.append(len(reads)))
    tensor, uploads = torch.tensor, []
    monkeypatch.setattr(
        torch, "tensor", lambda *args, **more: uploads.extend(more.keys() & {"device"}) or tensor(*args, **more)
    )

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
                reads.append(func)
            return func(*args, **(kwargs or {}))

    for work in (lambda: shared(model, prompts, 9, {5}, 3), lambda: scored(model, windows)):
        work()  # what is done once, such as choosing the attention, is not counted
        reads.clear(), forwards.clear(), uploads.clear()
        with Reads():
            work()
        # The prefix's own forward pass is not read.
        assert len(reads) == len(forwards) - 1 > 2 and not uploads
    # A batch of scores is read when the next one has been launched.
    assert forwards == [0, 0, *range(len(forwards) - 2)]
