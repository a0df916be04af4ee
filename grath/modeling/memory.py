"""The memory plan: how many bytes each stage needs on a GPU, and the largest batch that fits.

    python -m grath.modeling.memory      print what fits for Llama-2 7B, 13B and 70B on 24, 48 and 80 GB

Every formula counts the largest moment of a stage. `tests/modeling/test_memory.py` compares it with the tensors that
are alive in forward and backward passes.
"""

from dataclasses import dataclass
from functools import partial

from grath.common.errors import UserError

# Bytes of a weight. In 4 bit, bitsandbytes keeps a float32 scale for every 64 weights.
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "nf4": 0.5625, "fp4": 0.5625}
# The CUDA context and cuBLAS's workspaces, estimated.
CONTEXT = 500_000_000
# Share of a GPU's memory that a plan may use. The rest is for fragments and for what the display and others use.
USABLE = 0.9
# Bytes that torch can use of cards that are sold as 24, 48 and 80 GB: an L4 or A10G, an L40S, an A100 or H100.
CARDS = {"24 GB": 23.6e9, "48 GB": 47.6e9, "80 GB": 84.9e9}

# Tokens of the few-shot examples (the paper's six: about 700), and of a prompt after them (ARC's, for SmolLM2: to 132).
PAIRS_PREFIX, PAIRS_PROMPT, PREFILL_BATCH = 700, 150, 16
PAIRS_OWN = PAIRS_PROMPT + 100
DRAFT_TOKENS = 64  # a step drafts at most so many tokens, or one for each row if these are more
# MMLU's longest five examples, and the longest row after a prefix.
SCORES_PREFIX, SCORES_ROW, LOGITS_CHUNK = 3000, 2048, 512
# The question once and both answers, in a step of ARC's longest pairs. Most pairs have about 130 tokens.
PAIR_TOKENS = 256
# Pairs in a batch of the reference's log-probabilities; the tiles of TRL's loss; the rank of LoRA.
REFERENCE_BATCH, LOSS_TOKENS, LOSS_VOCABULARY, LORA_R = 16, 4096, 32768, 8

# What a batch is chosen from.
ROWS = (256, 192, 128, 96, 64, 48, 32, 24, 16, 8, 4, 2, 1)
BATCH_TOKENS = (16384, 8192, 4096, 2048)
PAIRS = (16, 8, 4, 2, 1)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder with gated feed-forward layers, as Llama, Mistral and Qwen have."""

    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_size: int
    queries: int  # width of the queries of all heads
    keys: int  # width of the keys of all heads
    intermediate: int
    vocabulary: int
    embeddings: int  # parameters of the embedding and the LM head, which stay in 16 bit
    parameters: int


def read_shape(config, parameters=None):
    """Read a model's sizes.

    Args:
        config: dict of the model's config.json.
        parameters: their number; None: computed from the sizes.

    Raises:
        UserError: sizes are missing, or the model is a mixture of experts.
    """
    config = config.get("text_config") or config
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    if not all(isinstance(config.get(name), int) for name in names):
        raise UserError("the model's config.json does not contain its sizes")
    if config.get("num_local_experts") or config.get("num_experts"):
        raise UserError("the memory of a mixture of experts is not known")
    layers, hidden, heads, intermediate, vocabulary = (config[name] for name in names)
    key_heads, head_size = config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads
    queries, keys = heads * head_size, key_heads * head_size
    # Llama's config.json may omit `tie_word_embeddings`, which is False then.
    embeddings = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
    layer = 2 * hidden * (queries + keys) + 3 * hidden * intermediate + 2 * hidden
    parameters = parameters or embeddings + hidden + layers * layer
    widths = (heads, key_heads, head_size, queries, keys)
    return ModelShape(layers, hidden, *widths, intermediate, vocabulary, embeddings, parameters)


def weight_bytes(shape, precision):
    """Return the bytes of the weights. In 8 and 4 bit the embedding and the LM head stay in 16 bit."""
    rounded = shape.parameters - shape.embeddings
    return round(shape.embeddings * max(2, BYTES[precision]) + rounded * BYTES[precision])


def kv_bytes(shape, precision):
    """Return the bytes of a token's keys and values in all layers."""
    return 2 * shape.layers * shape.keys * _activation(precision)


def forward_bytes(shape, precision, tokens):
    """Return the bytes of a layer's temporaries in a forward pass without gradient."""
    h, i, q, size = shape.hidden, shape.intermediate, shape.queries, _activation(precision)
    # The embedding, the layer's input and the normalized input.
    inputs = 3 * size * h + 4 * size * shape.head_size
    feed_forward = 3 * size * i
    # Attention to a prefix and to the own tokens is merged in float32.
    attention = size * (5 * q + 2 * shape.keys) + 12 * q + 16 * shape.heads
    # bitsandbytes multiplies an int8 copy of the input into int32 numbers.
    int8 = 2 * size * i + h + 4 * i if precision == "int8" else 0
    return tokens * (inputs + max(feed_forward, attention, int8)) + _dequantized(shape, precision)


def pairs_memory(shape, precision, rows, prefix=PAIRS_PREFIX, own=PAIRS_OWN):
    """Return the bytes of stage 1 by part: dict.

    Args:
        rows: responses that are generated at once.
        prefix: tokens that all prompts share.
        own: tokens of a row after the prefix, with its response.
    """
    step = rows + max(rows, DRAFT_TOKENS)
    tokens = max(min(rows, PREFILL_BATCH) * own, prefix, step)
    bias = _bias(shape, precision, max(min(rows, PREFILL_BATCH) * own, step), own)
    return {
        "CUDA context": CONTEXT,
        "weights": weight_bytes(shape, precision),
        "keys and values of the rows": rows * own * kv_bytes(shape, precision),
        "prefix": prefix * kv_bytes(shape, precision),
        "temporaries": forward_bytes(shape, precision, tokens) + bias,
        "logits": step * shape.vocabulary * (_activation(precision) + 4),
    }


def scores_memory(shape, precision, batch_tokens, prefix=SCORES_PREFIX):
    """Return the bytes of stage 4 by part: dict.

    Args:
        batch_tokens: padded tokens of a forward pass.
        prefix: tokens that several contexts share.
    """
    tokens, size = max(batch_tokens, prefix), _activation(precision)
    bias = _bias(shape, precision, batch_tokens, min(batch_tokens, SCORES_ROW))
    return {
        "CUDA context": CONTEXT,
        "weights": weight_bytes(shape, precision),
        "prefix": prefix * kv_bytes(shape, precision),
        "temporaries": forward_bytes(shape, precision, tokens) + bias,
        # Logits, their float32 copy and their log-softmax.
        "logits": LOGITS_CHUNK * (shape.vocabulary * (size + 8) + shape.hidden * size),
    }


def saved_bytes(shape, precision, tokens):
    """Return the bytes that a layer keeps of one token for the backward pass through frozen weights and LoRA.

    Args:
        tokens: tokens of a row, which the attention mask of a token covers.
    """
    h, i, q, size = shape.hidden, shape.intermediate, shape.queries, _activation(precision)
    norms = 8 * h  # two inputs in float32
    # Without autocast, PEFT gives each of the three LoRA matrices a float32 copy of the input.
    lora = 12 * h if precision == "bf16" else size * h
    # Queries, repeated keys and values, output; mask; log-sum-exp.
    attention = size * (4 * q + tokens) + 4 * shape.heads
    feed_forward = 3 * size * i
    int8 = size * (h + i) if precision == "int8" else 0  # bitsandbytes keeps the inputs of all linear layers
    return norms + lora + attention + feed_forward + int8


def dpo_memory(shape, precision, pairs, tokens=PAIR_TOKENS):
    """Return the bytes of stage 3 by part: dict. Gradient checkpointing is off.

    Args:
        pairs: pairs in a forward pass.
        tokens: tokens of a pair, with its prompt once.
    """
    h, i, size = shape.hidden, shape.intermediate, _activation(precision)
    lora = shape.layers * LORA_R * (3 * h + shape.queries + 2 * shape.keys)

    def logits(rows):
        """One tile of logits; the hidden states of both sequences of a pair, and their gradient in float32."""
        tile = min(rows * tokens, LOSS_TOKENS) * min(shape.vocabulary, LOSS_VOCABULARY)
        return size * tile + rows * tokens * h * (4 + 4 * size)

    saved = pairs * tokens * shape.layers * saved_bytes(shape, precision, tokens)
    backward = pairs * tokens * size * (4 * h + 4 * i) + _dequantized(shape, precision, backward=True)
    # Before the training, the reference runs on more pairs, without gradient.
    reference = forward_bytes(shape, precision, REFERENCE_BATCH * tokens) + logits(REFERENCE_BATCH)
    return {
        "CUDA context": CONTEXT,
        "weights": weight_bytes(shape, precision),
        "activations": saved,
        "temporaries": max(backward, reference - saved - logits(pairs)),
        "logits": logits(pairs),
        # Weights, gradients, two averages of AdamW and the reference in float32, and a 16-bit copy.
        "LoRA and optimizer": 22 * lora,
    }


def fitting(memory, batches, shape, precision, room, **sizes):
    """Return the first of `batches` with which `memory` (a stage's function) fits into `room` bytes; 0 if none does."""
    return next((batch for batch in batches if sum(memory(shape, precision, batch, **sizes).values()) <= room), 0)


# Each takes a shape, a precision and a number of bytes; see `fitting`.
fitting_rows = partial(fitting, pairs_memory, ROWS)
fitting_batch_tokens = partial(fitting, scores_memory, BATCH_TOKENS)
fitting_pairs = partial(fitting, dpo_memory, PAIRS)


def _bias(shape, precision, tokens, row):
    """The mask of tokens by those of their row: bool, repeated for the heads that share a key head, and as numbers."""
    return tokens * row * (1 + shape.heads // shape.key_heads * (1 + _activation(precision)))


def _activation(precision):
    return 4 if precision == "fp32" else 2


def _dequantized(shape, precision, backward=False):
    """The largest weight in 16 bit: 4-bit weights are multiplied so, and 8-bit ones in the backward pass."""
    needed = BYTES[precision] < 1 or (precision == "int8" and backward)
    return 2 * shape.hidden * shape.intermediate if needed else 0


def llama_2(size):
    """Return the shape of Llama-2 7B, 13B or 70B."""
    sizes = {"7B": (32, 4096, 32, 32, 11008), "13B": (40, 5120, 40, 40, 13824), "70B": (80, 8192, 64, 8, 28672)}
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return read_shape({**dict(zip(names, sizes[size], strict=True)), "vocab_size": 32000})


def memory_table():
    """Return a Markdown table of what fits on `CARDS`."""
    stages = (
        ("pairs", ("fp16", "int8", "nf4"), pairs_memory, ROWS, "rows"),
        ("DPO", ("bf16", "int8", "nf4"), dpo_memory, PAIRS, "pairs"),
        ("scores", ("fp16", "int8", "nf4"), scores_memory, BATCH_TOKENS, "tokens"),
    )
    lines = [f"| model | stage | precision | {' | '.join(CARDS)} |", f"| --- | --- | --- |{' --- |' * len(CARDS)}"]
    for size in ("7B", "13B", "70B"):
        shape = llama_2(size)
        for stage, precisions, memory, batches, unit in stages:
            for precision in precisions:
                cells = []
                for usable in CARDS.values():
                    batch = fitting(memory, batches, shape, precision, USABLE * usable)
                    need = sum(memory(shape, precision, batch or batches[-1]).values()) / 1e9
                    cells.append(f"{batch:,} {unit}, {need:.1f} GB" if batch else f"does not fit ({need:.1f} GB)")
                lines.append(f"| {size} | {stage} | {precision} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(memory_table())
