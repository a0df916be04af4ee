"""Log-likelihoods of answers. Every context and every shared prefix is computed once."""

from bisect import bisect_left
from functools import partial
from itertools import accumulate, chain, pairwise

import torch

from grath.generation.attention import engine_attention
from grath.generation.cache import NO_END, common_prefix_length, download, prefill_prefix, upload

# Minimum number of tokens of a common prefix that gets a forward pass of its own, and the minimum share of its group's
# tokens that it must save.
SHORTEST_PREFIX = 32
MIN_SAVED = 1 / 5
# On a CPU, minimum tokens of a context that gets a forward pass of its own: attention without a mask is faster.
LONG_CONTEXT = 256
# Hidden states whose logits are computed at a time.
LOGITS_CHUNK = 512


def truncate_window(context, answer, max_length):
    """Truncate a context and its answer (lists of token ids) on the left, as `HFLM` does; return them as tuples.

    The model's input has at most `max_length` tokens. The last token of the answer is not an input.
    """
    kept = (context + answer)[-(max_length + 1) :]
    return tuple(kept[: -len(answer)]), tuple(answer)


def window_loglikelihoods(model, windows, batch_tokens, max_rows=None):
    """Compute the log-likelihoods of (context, answer) windows. Equal windows are computed once.

    Args:
        windows: list of (context, answer), tuples of token ids.
        batch_tokens: maximum number of tokens in a batch, with padding. A longer context is a batch of its own.
        max_rows: maximum number of contexts in a batch, or None.

    Yields:
        (list of indices of equal windows, (log-likelihood, whether greedy decoding gives the answer)).
    """
    contexts = {}
    for i, (context, answer) in enumerate(windows):
        contexts.setdefault(context, {}).setdefault(answer, []).append(i)
    rows = {context: len(_tree_row(context, answers)[0]) for context, answers in contexts.items()}
    groups = group_by_prefix(rows, LONG_CONTEXT if model.device.type == "cpu" else None)
    # The largest first: if the memory is too small, the first batch shows it.
    groups.sort(key=lambda group: group[0] + max(rows[context] for context in group[1]), reverse=True)

    def batches():
        for length, members in groups:
            trees = [(context[length:], list(contexts[context])) for context in members]
            for read in loglikelihoods(model, list(members[0][:length]), trees, batch_tokens, max_rows):
                yield members, read

    with engine_attention(model):
        # A batch is read when the next one has been launched, so that a GPU does not wait for the host.
        for (members, read), _ in pairwise(chain(batches(), [None])):
            for tree, results in read():
                yield from zip(contexts[members[tree]].values(), results, strict=True)


def group_by_prefix(contexts, long_context=None):
    """Group contexts by common prefixes, so that each prefix is computed once.

    Args:
        contexts: dict of different, non-empty contexts (tuples of token ids) -> tokens of the row with its answers.
        long_context: minimum number of tokens of a context that is a group of its own, with all but its last token as
            prefix; None: no context is.

    Returns:
        list of (length of the common prefix, list of contexts). The prefix leaves at least one token of each context.
        Contexts without a prefix that saves enough are one group with the length 0.
    """
    groups = []
    for context in sorted(contexts):
        if groups:
            length, members = groups[-1]
            common = min(length, common_prefix_length([members[-1], context]))
            # One more context may shorten the group's prefix only if that saves more than it costs.
            if common >= SHORTEST_PREFIX and common * len(members) >= length * (len(members) - 1):
                groups[-1] = (common, [*members, context])
                continue
        groups.append((len(context) - 1, [context]))
    found, alone = [], []
    for length, members in groups:
        saved = length * (len(members) - 1)
        if saved and saved >= MIN_SAVED * sum(contexts[context] for context in members):
            found.append((length, members))
            continue
        for context in members:
            if long_context and len(context) >= long_context:
                found.append((len(context) - 1, [context]))
            else:
                alone.append(context)
    return [*found, (0, alone)] if alone else found


@torch.inference_mode()
def loglikelihoods(model, prefix_ids, trees, batch_tokens, max_rows=None):
    """Compute the log-likelihoods of answers to contexts with a common prefix. Every token is computed once.

    The model must attend to a `SharedPrefixCache` (`engine_attention`).

    Args:
        prefix_ids: list of token ids before every context; may be empty.
        trees: list of (context, answers): token ids, and a list of lists of token ids. No list is empty.
        batch_tokens, max_rows: as in `window_loglikelihoods`; the prefix does not count.

    Yields:
        for each batch a function that waits for its results and returns them: list of (index of the tree, list of
        (log-likelihood, whether greedy decoding gives the answer) for each answer).
    """
    cache = prefill_prefix(model, prefix_ids, 0, 0)
    all_rows = [_tree_row(*tree) for tree in trees]
    # The longest row first: if the memory is too small, the first batch shows it.
    order = sorted(range(len(trees)), key=lambda i: len(all_rows[i][0]), reverse=True)
    while order:
        count = min(max_rows or len(trees), max(1, batch_tokens // len(all_rows[order[0]][0])))
        batch, order = order[:count], order[count:]
        rows = [all_rows[i] for i in batch]
        hidden = cache.forward_trees(model, [row[:3] for row in rows])
        starts = accumulate((len(ids) for ids, *_ in rows), initial=0)
        targets = [
            (start + column, token) for start, row in zip(starts, rows, strict=False) for column, token in row[3]
        ]
        yield partial(_read, {i: trees[i][1] for i in batch}, _token_log_probs(model, hidden, targets))


def _read(answers_of, token_log_probs):
    """Add up the tokens' log-probabilities of each answer. `answers_of`: index of a tree -> its answers."""
    log_probs, results = iter(token_log_probs()), []
    for tree, answers in answers_of.items():
        tokens = [[next(log_probs) for _ in answer] for answer in answers]
        results.append((tree, [(sum(p for p, _ in answer), all(greedy for _, greedy in answer)) for answer in tokens]))
    return results


def _tree_row(context, answers):
    """Build the row of a tree: the context, then the answers, depth first. Equal beginnings of answers are one branch.

    Returns:
        (ids, depths, ends, targets): three lists of int for `forward_trees`, and for each token of the answers
        (column whose hidden state predicts the token, token id). The last token of an answer has no column.
    """
    ids, depths, ends = list(context), list(range(len(context))), [NO_END] * len(context)
    answers = [tuple(answer) for answer in answers]
    children, columns_of = {}, {}
    for answer in sorted(answers):
        columns = [len(context) - 1]
        for token in answer[:-1]:
            child = children.setdefault((columns[-1], token), len(ids))
            if child == len(ids):
                ids.append(token)
                depths.append(depths[columns[-1]] + 1)
                ends.append(0)
            columns.append(child)
        for column in columns[1:]:
            ends[column] = len(ids)
        columns_of[answer] = columns
    targets = [target for answer in answers for target in zip(columns_of[answer], answer, strict=True)]
    return ids, depths, ends, targets


def _token_log_probs(model, hidden, targets):
    """Compute the log-probabilities of `targets`: list of (index of the predicting row of `hidden`, token id).

    Returns:
        function that waits for the results and returns them: list of (log-probability, whether the token is greedy).
    """
    # One hidden state predicts the first tokens of all answers to a context. Its logits are computed once.
    states = sorted({state for state, _ in targets})
    index = {state: i for i, state in enumerate(states)}
    order = sorted(range(len(targets)), key=lambda i: targets[i][0])
    state_of = [index[targets[i][0]] for i in order]
    uploaded_states = upload(states, hidden.device)
    state, token = upload([state_of, [targets[i][1] for i in order]], hidden.device)
    found, start = [], 0
    for first in range(0, len(states), LOGITS_CHUNK):
        last = first + LOGITS_CHUNK
        # The harness uses `log_softmax`. `logsumexp` is more exact, but the results would differ from the harness's.
        log_probs = model.get_output_embeddings()(hidden[uploaded_states[first:last]]).float().log_softmax(-1)
        end = bisect_left(state_of, last)
        at, tokens = state[start:end] - first, token[start:end]
        found.append(torch.stack((log_probs[at, tokens], log_probs.argmax(-1)[at] == tokens)))
        start = end
    read = download(torch.cat(found, 1))
    return lambda: [(log_prob, bool(best)) for _, log_prob, best in sorted(zip(order, *read(), strict=True))]
