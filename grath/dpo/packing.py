"""Forward passes that compute the shared prompt of a pair once, and log-probabilities of the completions only."""

from functools import wraps

import torch
from torch.nn.functional import cross_entropy
from trl.trainer.utils import FusedCausalLMOutput


def share_prompts(forward):
    """Wrap a backbone's `forward` so that it computes the common prefix of a pair's two sequences once.

    A batch contains B chosen sequences followed by their B rejected ones, (2B, L), padded on the right. Each pair is
    packed into one row: the chosen sequence, then the tokens of the rejected one after the common prefix. Those keep
    their own positions and do not attend to the rest of the chosen sequence.
    """

    @wraps(forward)
    def shared(input_ids, attention_mask, **kwargs):
        device = input_ids.device
        chosen, rejected = input_ids.chunk(2)
        chosen_end, rejected_end = (mask.sum(1, keepdim=True) for mask in attention_mask.chunk(2))
        at = torch.arange(input_ids.shape[1], device=device)
        same = (chosen == rejected) & (at < torch.minimum(chosen_end, rejected_end))
        common = same.cumprod(1).sum(1, keepdim=True)

        column = torch.arange(int((chosen_end + rejected_end - common).max()), device=device)
        second = column >= chosen_end  # (B, W): a token of the rejected sequence
        position = torch.where(second, column - chosen_end + common, column).clamp(max=len(at) - 1)
        packed = torch.where(second, rejected.gather(1, position), chosen.gather(1, position))
        chosen_only = (column >= common) & ~second
        visible = (column <= column[:, None]) & ~(second[:, :, None] & chosen_only[:, None])
        output = forward(input_ids=packed, attention_mask=visible[:, None], position_ids=position, **kwargs)

        theirs = torch.where(at < common, at, at - common + chosen_end).clamp(max=len(column) - 1)
        columns = torch.stack((at.clamp(max=len(column) - 1).expand_as(theirs), theirs))  # (2, B, L)
        rows = torch.arange(len(chosen), device=device)[:, None]
        output.last_hidden_state = output.last_hidden_state[rows, columns].flatten(0, 1)
        return output

    return shared


def project_completions_only(base, fused_forward):
    """Wrap the `forward` of TRL's fused head so that it projects only the completions.

    On a CPU, TRL 1.16 projects every position, including prompt and padding. The log-probabilities are the same.
    """

    @wraps(fused_forward)
    def forward(*args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head:
            return fused_forward(*args, labels=labels, **kwargs)
        hidden = base.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        return completion_log_probs(hidden, labels[:, 1:], base.get_output_embeddings())

    return forward


def completion_log_probs(hidden, labels, lm_head):
    """Compute log-probabilities of the labelled tokens, and TRL's statistics of their distributions.

    Args:
        hidden: (B, L, d).
        labels: (B, L), -100 where there is no label.

    Returns:
        `FusedCausalLMOutput`, whose fields are (B, L), 0 where there is no label.
    """
    labelled = labels != -100
    logits, targets = lm_head(hidden[labelled]).float(), labels[labelled]
    found = {"log_probs": -cross_entropy(logits, targets, reduction="none")}
    with torch.no_grad():
        log_sum = logits.gather(1, targets[:, None])[:, 0] - found["log_probs"]
        found["entropy"] = log_sum - torch.einsum("nv,nv->n", (logits - log_sum[:, None]).exp_(), logits)
        found |= {"mean_logits": logits.mean(-1), "is_top1": logits.argmax(-1) == targets}
    fields = {name: field.new_zeros(labels.shape).masked_scatter(labelled, field) for name, field in found.items()}
    return FusedCausalLMOutput(loss=-found["log_probs"].mean(), **fields)
