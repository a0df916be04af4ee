"""RMSNorm in one operator: the model's own norm, rounded once."""

import pytest
import torch
from support import norms_of, tiny

from grath.generation.attention import FAMILIES
from grath.modeling.norms import fuse_norms


@pytest.mark.parametrize("family", FAMILIES)
def test_every_norm_of_the_families_is_the_models_own(family):
    model, fused = tiny(family), fuse_norms(tiny(family))
    ids = torch.arange(20)[None]
    theirs = model(ids).logits
    assert (fused(ids).logits - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert norms_of(fused) and all("forward" in vars(norm) for norm in norms_of(fused))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_is_rounded_once(dtype):
    torch.manual_seed(0)
    norm = norms_of(fuse_norms(tiny("llama", hidden_size=96).to(dtype)))[0]
    norm.weight.data = torch.randn(96).to(dtype)
    hidden = torch.randn(1, 50, 96).to(dtype)
    exact = hidden.double() / (hidden.double().square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    exact = exact * norm.weight.double()
    out = norm(hidden)
    assert out.dtype == dtype
    # The float32 result may round to the neighbour of what the exact one rounds to.
    number = torch.finfo(dtype)
    assert ((out.double() - exact).abs() <= 0.51 * number.eps * exact.abs().clamp(min=number.smallest_normal)).all()


def test_other_norms_stay_as_they_are():
    model = tiny("gemma")
    assert norms_of(model) and not any("forward" in vars(norm) for norm in norms_of(fuse_norms(model)))
