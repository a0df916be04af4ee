"""The training set: pairs as token ids, without those that give no gradient, in the order of the steps."""

import torch
from datasets import Dataset

from grath.common.errors import UserError
from grath.modeling.chat import answer_ids
from grath.modeling.devices import print_once

# Pairs are sorted by length among those of at most this many steps, and of at most a quarter of an epoch.
SORTED_STEPS = 50


def drop_special(rows, tokenizer):
    """Drop pairs (a list) with the text of BOS or EOS, where answers would be cut; return a warning, or None."""
    tokens, read = {*filter(None, (tokenizer.bos_token, tokenizer.eos_token))}, len(rows)
    rows[:] = [row for row in rows if not any(token in text for token in tokens for text in row.values())]
    if not rows:
        raise UserError(f"no pair is left to train on: all contain {' or '.join(sorted(tokens))}, special tokens")
    found = f"pairs dropped because they contain {' or '.join(sorted(tokens))}, special tokens: {read - len(rows)}"
    return found if len(rows) < read else None


def tokenize_pairs(rows, tokenizer, template):
    """Tokenize pairs as TRL's preference rows: the bare question in the chat template, then either answer.

    Args:
        rows: list of dicts with `question`, `correct`, `incorrect`.

    Returns:
        `Dataset` with `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of int).
    """
    tokenized = []
    for row in rows:
        turn = [{"role": "user", "content": row["question"]}]
        sides = [answer_ids(tokenizer, turn, row[side], template) for side in ("correct", "incorrect")]
        prompt = min((prompt for prompt, _ in sides), key=len)
        chosen, rejected = ([*own, *ids][len(prompt) :] for own, ids in sides)
        tokenized.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return Dataset.from_list(tokenized)


def filter_pairs(dataset, max_length):
    """Drop pairs with identical answers or more than `max_length` tokens, and print how many.

    Returns:
        (dataset, counts): the remaining pairs, and a dict of the numbers "read", "identical", "too_long" and "kept".

    Raises:
        UserError: no pair remains.
    """
    lengths, read = pair_lengths(dataset), len(dataset)
    differing = [i for i, row in enumerate(dataset) if row["chosen_ids"] != row["rejected_ids"]]
    kept = [i for i in differing if max_length is None or lengths[i] <= max_length]
    identical, too_long = read - len(differing), len(differing) - len(kept)
    print_once(f"{read} pairs, {identical} with identical answers and {too_long} over {max_length} tokens dropped")
    if not kept:
        raise UserError("no pair is left to train on: all have identical answers or are too long")
    return dataset.select(kept), {"read": read, "identical": identical, "too_long": too_long, "kept": len(kept)}


def pair_lengths(dataset):
    """Return the number of tokens of each pair: the prompt plus the longer answer."""
    return [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in dataset]


def training_order(lengths, count, batch, strategy, seed):
    """Return the order in which a training uses its pairs: each slice of `batch` indices is an optimizer step.

    Each epoch uses every pair once. Its last pairs and the first ones of the next epoch share a step, so that all steps
    are full. The order does not depend on `count`, nor on the processes that share a step.

    Args:
        lengths: tokens of each pair.
        count: number of indices to return.
        batch: pairs per step.
        strategy: "sequential", "random", or "group_by_length": steps of similar length in random order.
    """
    generator, order = torch.Generator().manual_seed(seed), []
    while len(order) < count:
        epoch = list(range(len(lengths)))
        if strategy != "sequential":
            epoch = torch.randperm(len(lengths), generator=generator).tolist()
        if strategy == "group_by_length":
            started = -len(order) % batch  # pairs that complete the step of the last epoch
            epoch[started:] = _group_by_length(epoch[started:], lengths, batch, generator)
        order += epoch
    return order[:count]


def _group_by_length(pairs, lengths, batch, generator):
    """Return pairs, which are in random order, as full steps in random order, followed by the rest."""
    window = batch * max(1, min(SORTED_STEPS, len(pairs) // (4 * batch)))
    windows = (sorted(pairs[at : at + window], key=lengths.__getitem__) for at in range(0, len(pairs), window))
    steps = [part[at : at + batch] for part in windows for at in range(0, len(part), batch)]
    full = [step for step in steps if len(step) == batch]
    shuffled = [full[i] for i in torch.randperm(len(full), generator=generator)]
    return [pair for step in [*shuffled, *steps[len(full) :]] for pair in step]
