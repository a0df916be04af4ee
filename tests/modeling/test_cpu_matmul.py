"""Matrix products on a CPU: every way gives the product, and the fastest one is taken, once for a run."""

import json
from types import SimpleNamespace

import psutil
import pytest
import torch
from support import BUNDLED, call_here, rows, tiny

import grath.modeling.cpu_matmul as cpu_matmul
from grath.common.paths import CPU_PRODUCTS_VARIABLE
from grath.modeling.cpu_matmul import fp32_cpu_matmul, make_product, prepare_linear_layers, time_products
from grath.modeling.lora import merge_lora

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def prefer(monkeypatch, way):
    """Let `way` take the least time."""
    times = {other: [2.0, 1.0] for other in cpu_matmul.WAYS}
    monkeypatch.setattr(cpu_matmul, "time_products", lambda weight: {**times, way: [0.5, 2.0]})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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
    model = tiny("llama", hidden_size=96, intermediate_size=2500).to(dtype).requires_grad_(False)
    layer = model.model.layers[0].mlp.gate_proj
    x = torch.randn(70, 2, 96, dtype=dtype, requires_grad=True)
    weights = torch.randn(70, 2, 2500, dtype=dtype)
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


def with_adapter(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(model, config).eval().requires_grad_(False)


def ways(dtype, *names):
    """Those of the ways that this CPU has for a dtype."""
    return [way for way in names if way in time_products(torch.zeros(8, 8, dtype=dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_prepared_model_gives_the_same_logits(dtype, adapted, tied, monkeypatch):
    """As exact as the plain model, compared with the logits in float64; an adapter is merged into float32 only."""
    build = lambda: tiny("llama", initializer_range=0.1, tie_word_embeddings=tied).to(dtype)  # noqa: E731
    wrap = with_adapter if adapted else lambda model: model
    ids = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        plain = wrap(build())(ids).logits.double()
        exact = wrap(build()).double()(ids).logits
        for way in ways(dtype, "packed", "float32"):
            prefer(monkeypatch, way)
            model = prepare_linear_layers(wrap(build()))
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


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}]
)
def test_other_adapters_are_left_as_they_are(options, monkeypatch):
    from peft import LoraConfig, get_peft_model

    prefer(monkeypatch, "packed")
    config = LoraConfig(**{"target_modules": ["q_proj"], "init_lora_weights": False, **options})
    model = get_peft_model(tiny("llama"), config)
    assert prepare_linear_layers(model) is model
    assert not [layer for layer in model.modules() if type(layer) is torch.nn.Linear and layer.weight is None]
    model(torch.tensor([[1, 2]]))


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


def test_the_choice_is_printed_and_kept_for_a_run(tiny_llama, tmp_path, monkeypatch):
    file = tmp_path / "cpu_products.json"

    def ask(out, way):
        prefer(monkeypatch, way)
        done = call_here(
            "create_pair_responses.py", "--model_name_or_path", tiny_llama, "--save_prefix", "x", "--save_dir",
            tmp_path / out, "--data_path", BUNDLED, "--num_query", "4", "--precision", "bf16",
        )  # fmt: skip
        assert len(rows(next((tmp_path / out).glob("x_*.json")))) == 4
        return [line for line in done.stdout.splitlines() if line.startswith("Matrix products of bfloat16 weights: ")]

    assert ask("a", "plain")[0].startswith("Matrix products of bfloat16 weights: plain; 128 rows and 1 row take plain")
    assert not file.exists()
    monkeypatch.setenv(CPU_PRODUCTS_VARIABLE, str(file))
    assert " float32; " in ask("b", "float32")[0]
    recorded = json.loads(file.read_text())
    assert recorded["bfloat16 128x64"]["way"] == "float32"
    assert recorded["bfloat16 128x64"]["milliseconds"]["float32"] == [0.5, 2.0]
    # Another measurement changes nothing.
    assert ask("c", "plain") == []
    assert json.loads(file.read_text()) == recorded
    # On a CPU without the recorded products, it counts.
    monkeypatch.setattr(cpu_matmul, "_is_available", lambda weight, way: way == "plain")
    assert " plain; " in ask("d", "plain")[0]


def test_all_stages_of_a_run_record_one_choice(llama_run):
    run, _, _ = llama_run
    recorded = json.loads((run / "cpu_products.json").read_text())
    assert {product["way"] for product in recorded.values()} <= set(cpu_matmul.WAYS)
    entries = json.loads((run / "manifest.json").read_text())["stages"]
    assert {entry["stage"] for entry in entries if entry.get("cpu_products") == recorded} == {"pairs", "dpo", "scores"}
