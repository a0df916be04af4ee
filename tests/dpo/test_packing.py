"""Forward passes of a pair: the shared prompt, and the log-probabilities of the completions."""

from types import SimpleNamespace

import pytest
import torch
from support import FAMILIES, tiny
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from grath.dpo.packing import completion_log_probs, share_prompts
from grath.dpo.trainer import GrathDPOTrainer


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompts_are_computed_once_with_equal_results(family):
    backbone = tiny(family).base_model
    torch.manual_seed(1)
    seen = []
    backbone.layers[0].register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    lengths = [(20, 5, 9), (3, 14, 2), (11, 1, 1), (1, 6, 8)]  # prompt, chosen, rejected
    pairs = [[torch.randint(1, 60, (n,)) for n in row] for row in lengths]
    pairs[2][2] = pairs[2][1]  # equal sequences
    sequences = [torch.cat((p, a)) for side in (1, 2) for p, a in ((row[0], row[side]) for row in pairs)]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True)
    with torch.no_grad():
        plain = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        shared = share_prompts(backbone.forward)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    torch.testing.assert_close(shared[mask.bool()], plain[mask.bool()], atol=1e-5, rtol=1e-4)
    assert seen[1][0] * seen[1][1] < 0.75 * seen[0][0] * seen[0][1]


def test_completion_log_probs_equal_trls(tiny_llama, llama_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    statistics = ("entropy", "mean_logits", "is_top1")
    add_fused_lm_head(model, outputs=("log_probs", *statistics))
    ids = torch.tensor([llama_tokenizer("Why is ice lighter than water?")["input_ids"]] * 2)
    labels = ids.clone()
    labels[0, :4] = labels[1, :7] = -100
    theirs = model(input_ids=ids, labels=labels, fused_lm_head=True)
    hidden = model.base_model(ids).last_hidden_state[:, :-1]
    ours = completion_log_probs(hidden, labels[:, 1:], model.get_output_embeddings())
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, atol=1e-5, rtol=0)
    labelled = labels[:, 1:] != -100
    for name in statistics:
        torch.testing.assert_close(ours[name][labelled], theirs[name][labelled], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("longest", "shared"), [(64, True), (65, False), (None, False)])
def test_prompts_are_not_shared_beyond_a_sliding_window(longest, shared):
    """Without a maximum length, the model's own is the longest."""
    model = tiny("mistral", sliding_window=64)
    forward, place = model.model.forward, SimpleNamespace(device=torch.device("cpu"))
    args = SimpleNamespace(max_length=longest, use_weighting=False)
    trainer = {"model": SimpleNamespace(get_base_model=lambda: model), "window": 256, "accelerator": place}
    GrathDPOTrainer._patch_forward(SimpleNamespace(args=args, **trainer))
    assert (model.model.forward != forward) == shared
