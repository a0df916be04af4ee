"""Log-likelihoods of answers. Every context and every shared prefix is computed once."""

from itertools import accumulate

import torch

from grath.generation.attention import engine_attention, lm_head_logits
from grath.generation.cache import common_prefix_length, prefill_prefix

# Minimum number of tokens of a common prefix, and of a single context, that gets a forward pass of its own.
SHORTEST_PREFIX = 32
LONG_CONTEXT = 256


def truncate_window(context, answer, max_length):
    """Truncate a context and its answer on the left to the model's window, as `HFLM` does.

    Args:
        context, answer: lists of token ids.
        max_length: maximum number of input tokens. The last token of the answer is no input.

    Returns:
        (context, answer): tuples of token ids.
    """
    kept = (context + answer)[-(max_length + 1) :]
    return tuple(kept[: -len(answer)]), tuple(answer)


def window_loglikelihoods(model, windows, batch_size):
    """Compute the log-likelihoods of (context, answer) windows. Equal windows are computed once.

    Args:
        windows: list of (context, answer), tuples of token ids.

    Yields:
        (list of indices of equal windows, (log-likelihood, whether greedy decoding gives the answer)).
    """
    contexts = {}
    for i, (context, answer) in enumerate(windows):
        contexts.setdefault(context, {}).setdefault(answer, []).append(i)
    for length, members in group_by_prefix(list(contexts)):
        trees = [(context[length:], list(contexts[context])) for context in members]
        for tree, results in loglikelihoods(model, list(members[0][:length]), trees, batch_size):
            yield from zip(contexts[members[tree]].values(), results, strict=True)


def group_by_prefix(contexts):
    """Group contexts by common prefixes, so that each prefix is computed once.

    Args:
        contexts: list of different, non-empty tuples of token ids.

    Returns:
        list of (length of the common prefix, list of contexts). The prefix leaves at least one token of each context.
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
    short = [members[0] for _, members in groups if len(members) == 1 and len(members[0]) < LONG_CONTEXT]
    groups = [group for group in groups if len(group[1]) > 1 or len(group[1][0]) >= LONG_CONTEXT]
    return [*groups, (0, short)] if short else groups


@torch.inference_mode()
def loglikelihoods(model, prefix_ids, trees, batch_size):
    """Compute the log-likelihoods of answers to contexts with a common prefix. Every token is computed once.

    Args:
        prefix_ids: list of token ids before every context; may be empty.
        trees: list of (context, answers): token ids, and a list of lists of token ids. No list is empty.
        batch_size: number of contexts in a batch.

    Yields:
        (index of the tree, list with one (log-likelihood, whether greedy decoding gives the answer) per answer).
    """
    # A row contains the context and each answer without its last token, because no token follows that.
    order = sorted(range(len(trees)), key=lambda i: len(trees[i][0]) + sum(len(answer) - 1 for answer in trees[i][1]))
    with engine_attention(model):
        cache = prefill_prefix(model, prefix_ids, 0, 0)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            rows = [_tree_row(*trees[i]) for i in batch]
            longest = max(len(ids) for ids, *_ in rows)
            ids, depths, branches = (
                torch.tensor([row[field] + [0] * (longest - len(row[field])) for row in rows], device=model.device)
                for field in range(3)
            )
            hidden = cache.forward_trees(model, ids, depths, branches)
            targets = [(n, column, token) for n, row in enumerate(rows) for column, token in row[3]]
            log_probs = _token_log_probs(model, hidden, targets)
            for i in batch:
                tokens = [[next(log_probs) for _ in answer] for answer in trees[i][1]]
                yield i, [(sum(p for p, _ in answer), all(greedy for _, greedy in answer)) for answer in tokens]


def _tree_row(context, answers):
    """Build the row of a tree.

    Returns:
        (ids, depths, branches, targets): three lists of int for `forward_trees`, and a list with one (column whose
        hidden state predicts the token, token id) per token of the answers.
    """
    ids, depths, branches = list(context), list(range(len(context))), [0] * len(context)
    targets = []
    for branch, answer in enumerate(answers, start=1):
        columns = [len(context) - 1, *range(len(ids), len(ids) + len(answer) - 1)]
        targets += zip(columns, answer, strict=True)
        ids += answer[:-1]
        depths += range(len(context), len(context) + len(answer) - 1)
        branches += [branch] * (len(answer) - 1)
    return ids, depths, branches, targets


def _token_log_probs(model, hidden, targets, chunk=512):
    """Compute the log-probabilities of tokens.

    Args:
        hidden: (n, L, d) last hidden states.
        targets: list of (row, column of the hidden state that predicts the token, token id).
        chunk: number of hidden states per call of the LM head.

    Returns:
        iterator over (log-probability, whether the token is the greedy one), one per target.
    """
    # One hidden state predicts the first tokens of all answers to a context. Its logits are computed once.
    states = list(dict.fromkeys((row, column) for row, column, _ in targets))
    ends = [min(end, len(states)) for end in accumulate([chunk] * -(-len(states) // chunk))]
    index = {state: i for i, state in enumerate(states)}
    device = hidden.device
    state_of = torch.tensor([index[row, column] for row, column, _ in targets], device=device)
    tokens = torch.tensor([token for *_, token in targets], device=device)
    target_log_probs, greedy = torch.empty(len(targets), device=device), torch.empty_like(tokens)
    rows, columns = torch.tensor(states, device=device).T
    for start, end in zip([0, *ends], ends, strict=False):
        # The harness uses `log_softmax`. `logsumexp` is more exact, but the results would differ from the harness's.
        log_probs = lm_head_logits(model, hidden[rows[start:end], columns[start:end]]).float().log_softmax(-1)
        here = (state_of >= start) & (state_of < end)
        at = state_of[here] - start
        target_log_probs[here] = log_probs[at, tokens[here]]
        greedy[here] = log_probs.argmax(-1)[at]
    return zip(target_log_probs.tolist(), (greedy == tokens).tolist(), strict=True)
