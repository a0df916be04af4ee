"""Matrix products on a CPU: every way gives the product, and the fastest one is taken."""

from types import SimpleNamespace

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import asking, call_here, tiny

import grath.modeling.cpu_matmul as cpu_matmul
from grath.modeling.cpu_matmul import fp32_cpu_matmul, make_product, merge_lora, prepare_linear_layers, time_products


def prefer(monkeypatch, way):
    """Let `way` take the least time."""
    times = {other: [2.0, 1.0] for other in cpu_matmul.WAYS}
    monkeypatch.setattr(cpu_matmul, "time_products", lambda weight: {**times, way: [0.5, 2.0]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 128, 300])
def test_every_way_gives_the_exact_product_rounded_once(dtype, rows):
    torch.manual_seed(0)
    weight, bias = torch.randn(250, 96).to(dtype), torch.randn(250).to(dtype)
    x = torch.randn(rows, 2, 96).to(dtype)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    ways = time_products(weight)
    assert "plain" in ways and ("float32" in ways) <= (dtype != torch.float32)
    for way, milliseconds in ways.items():
        assert len(milliseconds) == 2 and min(milliseconds) > 0
        out = make_product(weight, bias, way)(x)
        assert out.dtype == dtype
        # Each sum is rounded in float32, by the size of what is added, and the output once in its dtype.
        added = torch.nn.functional.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
        bound = torch.finfo(dtype).eps * exact.abs() + 4 * torch.finfo(torch.float32).eps * added
        assert ((out.double() - exact).abs() <= bound).all(), way


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_converts_and_gives_the_exact_products_and_gradients(dtype, monkeypatch):
    model = tiny("llama", hidden_size=96, intermediate_size=250).to(dtype).requires_grad_(False)
    layer = model.model.layers[0].mlp.gate_proj
    x = torch.randn(70, 2, 96, dtype=dtype, requires_grad=True)
    weights = torch.randn(70, 2, 250, dtype=dtype)
    exact = torch.nn.functional.linear(x.double(), layer.weight.double())
    prefer(monkeypatch, "float32")
    with fp32_cpu_matmul(model):
        assert "forward" in vars(layer)
        out = layer(x)
        (gradient,) = torch.autograd.grad(out, x, weights)
        few = layer(x[:1])
    assert "forward" not in vars(layer)
    assert out.dtype == few.dtype == gradient.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, atol=step, rtol=step)
    torch.testing.assert_close(gradient.double(), weights.double() @ layer.weight.double(), atol=4 * step, rtol=step)
    for way in ("plain", "packed"):
        prefer(monkeypatch, way)
        with fp32_cpu_matmul(model):
            assert "forward" not in vars(layer)


def with_adapter(model, **options):
    torch.manual_seed(1)
    config = LoraConfig(**{"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **options})
    return get_peft_model(model, config).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_prepared_model_gives_the_same_logits(dtype, adapted, tied, monkeypatch):
    """As exact as the plain model, compared with the logits in float64; an adapter is merged into float32 only."""

    def build():
        model = tiny("llama", initializer_range=0.1, tie_word_embeddings=tied).to(dtype)
        return with_adapter(model) if adapted else model

    ids = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        plain, exact = build()(ids).logits.double(), build().double()(ids).logits
        for way in time_products(torch.zeros(8, 8, dtype=dtype)).keys() - {"plain"}:
            prefer(monkeypatch, way)
            model = prepare_linear_layers(build())
            assert hasattr(model, "peft_config") == (adapted and dtype == torch.bfloat16 and way == "packed")
            base = model.get_base_model() if hasattr(model, "peft_config") else model
            assert base.model.layers[0].mlp.up_proj.weight is None
            assert base.get_input_embeddings().weight.dtype == dtype
            assert base.lm_head.weight.dtype == dtype  # some models' code reads it
            ours = model(ids).logits
            assert ours.dtype == dtype
            error = (ours.double() - exact).abs().max()
            assert error <= 2 * (plain - exact).abs().max() + 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_a_merge_into_16_bit_weights_is_not_rounded():
    model = with_adapter(tiny("llama").bfloat16())
    layers = [layer.self_attn.q_proj for layer in model.get_base_model().model.layers]
    expected = [layer.get_base_layer().weight.float() + layer.get_delta_weight("default").float() for layer in layers]
    rounded = [weight.bfloat16().float() for weight in expected]
    merged = [layer.self_attn.q_proj.weight for layer in merge_lora(model).model.layers]
    for ours, exact, other in zip(merged, expected, rounded, strict=True):
        assert torch.equal(ours, exact) and not torch.equal(ours, other)


def test_weights_that_do_not_fit_in_float32_are_converted_for_each_product(monkeypatch, capsys):
    prefer(monkeypatch, "float32")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    model = prepare_linear_layers(tiny("llama").bfloat16())
    assert "are converted for each product" in capsys.readouterr().out
    assert model.lm_head.weight.dtype == torch.bfloat16 and "forward" in vars(model.lm_head)


def test_a_quantized_or_trained_model_is_left_alone(monkeypatch):
    monkeypatch.setattr(cpu_matmul, "time_products", lambda weight: pytest.fail("timed"))
    with fp32_cpu_matmul(tiny("llama")):  # in float32 there is nothing to choose in training
        pass
    model = torch.nn.Module()
    model.get_output_embeddings = lambda: None
    assert prepare_linear_layers(model) is model


def test_every_start_measures_and_prints_its_choice(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("GRATH_DEBUG", "1")
    for way in ("plain", "float32"):
        prefer(monkeypatch, way)
        done = call_here(*asking(tiny_llama, tmp_path / way, "--precision", "bf16"))
        assert f"Matrix products of bfloat16 weights: {way}; 128 rows and 1 row take plain " in done.stdout
        assert f"{way} 0.50 and 2.00 ms" in done.stdout


def test_products_that_this_cpu_lacks_are_not_timed(monkeypatch):
    def make(weight, bias, way):
        return make_product(weight, bias, way) if way == "plain" else torch.ops.mkldnn.missing

    monkeypatch.setattr(cpu_matmul, "make_product", make)
    assert list(time_products(torch.ones(8, 8).bfloat16())) == ["plain"]


def test_the_first_process_chooses_for_all(monkeypatch):
    monkeypatch.setattr(cpu_matmul, "PartialState", lambda: SimpleNamespace(is_main_process=False))
    monkeypatch.setattr(cpu_matmul, "time_products", lambda weight: pytest.fail("timed"))
    monkeypatch.setattr(cpu_matmul, "broadcast_object_list", lambda chosen: ["packed"] if chosen == [None] else 0)
    assert cpu_matmul.choose_way(tiny("llama")) == "packed"
