"""The training set: pairs as token ids, without the pairs that give no gradient."""

from datasets import Dataset

from grath.common.errors import UserError
from grath.modeling.chat import answer_ids
from grath.modeling.devices import print_once


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
    differing = dataset.filter(lambda row: row["chosen_ids"] != row["rejected_ids"])
    lengths = pair_lengths(differing)
    fitting = differing.select([i for i, length in enumerate(lengths) if max_length is None or length <= max_length])
    counts = {
        "read": len(dataset),
        "identical": len(dataset) - len(differing),
        "too_long": len(differing) - len(fitting),
        "kept": len(fitting),
    }
    print_once(
        f"{counts['read']} pairs, {counts['identical']} with identical answers and {counts['too_long']} over "
        f"{max_length} tokens dropped"
    )
    if not counts["kept"]:
        raise UserError("no pair is left to train on: all have identical answers or are too long")
    return fitting, counts


def pair_lengths(dataset):
    """Return the number of tokens of each pair: the prompt plus the longer answer."""
    return [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in dataset]
