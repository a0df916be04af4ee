"""The memory plan: its formulas against the tensors of real passes, which torch's `meta` device runs without memory."""

import weakref
from functools import partial

import pytest
import torch
from support import PROJECT, call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grath.common.errors import UserError
from grath.modeling import memory

SIZES = {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 11008}
# Llama-2 7B, and sizes with grouped keys, a wide vocabulary and a narrow feed-forward layer.
MODELS = [
    {**SIZES, "vocab_size": 32000},
    {**SIZES, "num_hidden_layers": 24, "num_key_value_heads": 8, "vocab_size": 128000, "intermediate_size": 8192},
]


class TrackMemory(TorchDispatchMode):
    """Count the bytes of the tensors that operations create, and the most that are alive at once (`peak`)."""

    def __enter__(self):
        self.live, self.peak, self.known = 0, 0, set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {self._key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and self._key(leaf) not in self.known | given:
                storage = leaf.untyped_storage()
                self.known.add(self._key(leaf))
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, self._key(leaf), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    @staticmethod
    def _key(tensor):
        return tensor.untyped_storage()._cdata

    def _free(self, key, size):
        self.known.discard(key)
        self.live -= size


class FusedAttention(torch.autograd.Function):
    """Allocate and keep what a fused attention kernel does; the values do not matter."""

    @staticmethod
    def forward(ctx, query, key, value, bias):
        out, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, lse, bias)
        return out, lse

    @staticmethod
    def backward(ctx, grad, _):
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


class TiledLoss(torch.autograd.Function):
    """Allocate what TRL's loss on a GPU does: one tile of logits, and the gradient of the states in float32."""

    @staticmethod
    def forward(ctx, hidden, vocabulary):
        ctx.save_for_backward(hidden)
        ctx.tile = (min(len(hidden), 4096), min(vocabulary, 32768))
        hidden.new_empty(ctx.tile)
        return hidden.new_empty(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        (hidden,) = ctx.saved_tensors
        tile = hidden.new_empty(ctx.tile)
        grad = hidden.new_zeros(hidden.shape, dtype=torch.float32)
        del tile
        return grad.to(hidden.dtype), None


def attention(module, query, key, value, attention_mask, scaling, **_):
    """A stand-in for `AttentionInterface`; with a prefix, two parts are merged in float32 as in Hydragen."""
    groups = module.num_key_value_groups
    if torch.is_grad_enabled():
        bias = query.new_empty(attention_mask.shape)
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
        return FusedAttention.apply(query, key, value, bias)[0].transpose(1, 2), None
    # Queries that share a key head, and all rows' queries together for the prefix, are contiguous copies.
    queries = [query.clone(), query.clone()]
    (out, lse), (other, other_lse) = (FusedAttention.apply(part, key, value, None) for part in queries)
    share = torch.sigmoid(lse - other_lse)[..., None]
    out = out.float() * share + other.float() * (1 - share)
    return out.to(query.dtype).transpose(1, 2), None


def meta_model(sizes, dtype):
    """A Llama of these sizes without weights, in evaluation mode."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    AttentionInterface.register("stand_in", attention)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="stand_in")).to(dtype)
    return model.eval()


def ids(rows, length):
    return torch.zeros(rows, length, dtype=torch.long, device="meta")


def forward(model, rows, length, masked=True):
    """The last hidden states of rows; masked: with a mask for each row, as trees have."""
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device="meta") if masked else None
    # The engine repeats it for the heads that share a key head, and turns it into numbers to add to the scores.
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    repeated = mask.repeat(1, 1, groups, 1) if masked and not torch.is_grad_enabled() else None
    bias = None if repeated is None else torch.zeros_like(repeated, dtype=model.dtype)
    del repeated
    output = model.model(
        input_ids=ids(rows, length), attention_mask=mask, position_ids=ids(rows, length), use_cache=False
    )
    del bias
    return output.last_hidden_state


def bytes_of(parts, *names):
    return sum(parts[name] for name in names or parts)


def assert_close(planned, measured):
    """The plan covers what was measured, and is not far above it."""
    assert measured <= planned <= 1.5 * measured, f"planned {planned / 1e9:.2f} GB, measured {measured / 1e9:.2f} GB"


@pytest.mark.parametrize("sizes", MODELS, ids=["7B", "grouped"])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_weights_and_the_shape(sizes, precision):
    dtype = {"fp16": torch.float16, "fp32": torch.float32}[precision]
    model = meta_model(sizes, dtype)
    shape = memory.read_shape(model.config.to_dict())
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    held = sum(weight.nbytes for weight in model.parameters())
    assert memory.weight_bytes(shape, precision) == held
    nested = memory.read_shape({"text_config": model.config.to_dict()}, parameters=shape.parameters)
    assert nested == shape


@pytest.mark.parametrize("sizes", MODELS, ids=["7B", "grouped"])
@pytest.mark.parametrize(("rows", "own", "prefix"), [(64, 200, 700), (8, 120, 2000), (256, 60, 0)])
def test_pairs(sizes, rows, own, prefix):
    """The largest of the prefix, a prefill and a step of all rows and drafts, next to the cache of keys and values."""
    model = meta_model(sizes, torch.float16)
    planned = memory.pairs_memory(memory.read_shape(sizes), "fp16", rows, prefix, own)
    with torch.no_grad(), TrackMemory() as track:
        # The engine's cache: keys and values of every row, and of the prefix.
        heads, width = model.config.num_key_value_heads, model.config.head_dim
        cache = [
            torch.empty(model.config.num_hidden_layers, 2, n, heads, length, width, dtype=torch.float16, device="meta")
            for n, length in ((rows, own), (1, prefix))
        ]
        if prefix:
            forward(model, 1, prefix, masked=False)
        forward(model, min(rows, 16), own, masked=False)
        step = rows + max(rows, memory.DRAFT_TOKENS)
        model.lm_head(forward(model, step, 1, masked=False)[:, -1]).float().argmax(-1)
        del cache
    assert_close(bytes_of(planned) - planned["CUDA context"] - planned["weights"], track.peak)


@pytest.mark.parametrize("sizes", MODELS, ids=["7B", "grouped"])
def test_scores(sizes):
    """A full batch of the longest rows, and then the logits of one chunk. The prefix is a cache, as in the pairs."""
    model = meta_model(sizes, torch.float16)
    planned = memory.scores_memory(memory.read_shape(sizes), "fp16", 16384)
    with torch.no_grad(), TrackMemory() as track:
        hidden = forward(model, 16384 // memory.SCORES_ROW, memory.SCORES_ROW)
    assert_close(bytes_of(planned, "temporaries"), track.peak)
    with torch.no_grad(), TrackMemory() as track:
        states = hidden.flatten(0, 1)[torch.arange(512, device="meta")]
        model.lm_head(states).float().log_softmax(-1).argmax(-1)
    assert_close(bytes_of(planned, "logits"), track.peak)


@pytest.mark.parametrize("sizes", MODELS, ids=["7B", "grouped"])
@pytest.mark.parametrize("precision", ["fp4", "bf16", "fp32"])
@pytest.mark.parametrize(("pairs", "tokens"), [(16, 256), (16, 130), (4, 256)])
def test_dpo(sizes, precision, pairs, tokens):
    """A step of the policy with LoRA, without dropout as in TRL.

    Under autocast, which 4 bit uses, LoRA computes in bf16. Here it is stored so too.
    """
    from peft import get_peft_model

    from grath.dpo.trainer import lora_config

    model = meta_model(sizes, torch.float32 if precision == "fp32" else torch.bfloat16)
    model = get_peft_model(model, lora_config(), autocast_adapter_dtype=precision == "bf16").eval()
    parts = memory.dpo_memory(memory.read_shape(sizes), precision, pairs, tokens)
    with TrackMemory() as track:
        hidden = forward(model.get_base_model(), pairs, tokens)
        both = torch.cat((hidden, hidden))[:, : tokens // 2]  # the two sequences of every pair
        TiledLoss.apply(both.flatten(0, 1), sizes["vocab_size"]).sum().backward()
    adapter = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    # Gradients are in the peak. The plan also has the float32 weights, AdamW's averages, the reference, and copies.
    assert parts["LoRA and optimizer"] == 22 * adapter
    planned = bytes_of(parts, "activations", "temporaries", "logits") + 4 * adapter
    assert_close(planned, track.peak)


@pytest.mark.parametrize("config", [{}, {**MODELS[0], "hidden_size": None}, {**MODELS[0], "num_local_experts": 8}])
def test_an_unknown_shape_is_refused(config):
    with pytest.raises(UserError, match="does not contain its sizes|mixture of experts"):
        memory.read_shape(config)


@pytest.mark.parametrize(
    ("function", "stage", "precision", "largest"),
    [
        (memory.fitting_batch_tokens, memory.scores_memory, "fp16", 16384),
        (memory.fitting_pairs, memory.dpo_memory, "fp4", 16),
    ],
)
def test_the_largest_batch_that_fits(function, stage, precision, largest):
    shape = memory.llama_2("7B")
    assert function(shape, precision, 10**12) == largest
    assert function(shape, precision, 10**9) == 0
    half = sum(stage(shape, precision, largest // 2).values())
    assert (
        function(shape, precision, half) in (largest // 2, largest) and function(shape, precision, half - 1) < largest
    )


def test_seven_billion_parameters_on_24_gb():
    """With the batches that the plan proposes, no stage needs more than 22 GB in the precision of `auto`."""
    shape, room = memory.llama_2("7B"), memory.CARDS["24 GB"] * memory.USABLE
    for stage, function, precision in (
        (memory.pairs_memory, partial(memory.fitting, memory.pairs_memory, memory.ROWS), "int8"),
        (memory.dpo_memory, memory.fitting_pairs, "fp4"),
        (memory.scores_memory, memory.fitting_batch_tokens, "fp16"),
    ):
        batch = function(shape, precision, room)
        assert batch and sum(stage(shape, precision, batch).values()) <= 22e9


def test_the_table_of_the_page_is_the_commands_output():
    table = call("python", "-m", "grath.modeling.memory").stdout
    assert table in (PROJECT / "docs" / "hardware.md").read_text(encoding="utf-8")
    # Llama-2 70B fits on 80 GB in 4 bit for pairs and training, and in 8 or 4 bit for scores.
    rows = {tuple(cell.strip() for cell in line.split("|")[1:4]): line for line in table.splitlines()}
    for stage, precision in (("pairs", "nf4"), ("DPO", "nf4"), ("scores", "int8"), ("scores", "nf4")):
        assert "does not fit" not in rows["70B", stage, precision].split("|")[6]
