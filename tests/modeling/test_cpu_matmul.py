"""Matrix products on a CPU: every way gives the product, and the fastest one is taken."""

import json
import re
from types import SimpleNamespace

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import asking, call_here, tiny

import grath.modeling.cpu_matmul as cpu_matmul
from grath.modeling.cpu_matmul import make_product, prepare_for_inference, prepare_for_training, time_products


def prefer(monkeypatch, way):
    """Let `way` take the least time."""
    times = {other: [2.0, 1.0] for other in cpu_matmul.WAYS}
    monkeypatch.setattr(cpu_matmul, "time_products", lambda weight: {**times, way: [0.5, 1.5]})


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
        of_way = torch.float32 if way == "float32" else dtype
        out = make_product(weight.to(of_way), bias.to(of_way), way)(x.to(of_way))
        assert out.dtype == of_way
        # Each sum is rounded in float32, by the size of what is added, and the output once in its dtype.
        added = torch.nn.functional.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
        bound = torch.finfo(dtype).eps * exact.abs() + 4 * torch.finfo(torch.float32).eps * added
        assert ((out.double() - exact).abs() <= bound).all(), way


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", cpu_matmul.WAYS)
def test_training_computes_in_float32_where_that_is_faster(dtype, way, monkeypatch):
    prefer(monkeypatch, way)
    model = prepare_for_training(with_adapter(tiny("llama").to(dtype)))
    computed = torch.float32 if way == "float32" else dtype
    assert hasattr(model, "load_warnings") == (way == "float32")  # for the record
    for name, weight in tiny("llama").to(dtype).state_dict().items():
        ours = model.get_base_model().state_dict()[re.sub("(q|down)_proj", r"\g<0>.base_layer", name)]
        assert ours.dtype == computed and torch.equal(ours, weight.to(computed))


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
            model, computed = prepare_for_inference(build()), torch.float32 if way == "float32" else dtype
            assert hasattr(model, "peft_config") == (adapted and dtype == torch.bfloat16 and way == "packed")
            base = model.get_base_model() if hasattr(model, "peft_config") else model
            assert base.model.layers[0].mlp.up_proj.weight is None
            assert base.get_input_embeddings().weight.dtype == computed
            assert base.lm_head.weight.dtype == computed  # some models' code reads it
            ours = model(ids).logits
            assert ours.dtype == computed
            if way == "float32":  # an adapter that was merged into 16 bits would be rounded
                torch.testing.assert_close(ours, build().float()(ids).logits, atol=1e-4, rtol=1e-4)
            error = (ours.double() - exact).abs().max()
            assert error <= 2 * (plain - exact).abs().max() + 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_other_families_keep_their_weights(monkeypatch):
    """Some models' code reads them, such as Mamba's."""
    for way, dtype in (("packed", torch.bfloat16), ("float32", torch.float32)):
        prefer(monkeypatch, way)
        model = prepare_for_inference(tiny("gemma2").to(torch.bfloat16))
        assert model.model.layers[0].mlp.up_proj.weight.dtype == dtype


def test_float32_is_not_chosen_if_the_memory_is_too_small(monkeypatch, capsys):
    prefer(monkeypatch, "float32")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert prepare_for_inference(tiny("llama").bfloat16()).dtype == torch.bfloat16
    assert "Computing in 16 bits: float32 would be faster" in capsys.readouterr().out


def test_a_model_without_such_layers_is_left_alone(monkeypatch):
    monkeypatch.setattr(cpu_matmul, "time_products", lambda weight: pytest.fail("timed"))
    model = torch.nn.Module()
    model.get_output_embeddings = lambda: None
    assert prepare_for_inference(model) is prepare_for_training(model) is model


def test_every_start_measures_and_prints_its_choice(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("GRATH_DEBUG", "1")
    for way in ("plain", "float32"):
        prefer(monkeypatch, way)
        done = call_here(*asking(tiny_llama, tmp_path / way, "--precision", "bf16"))
        assert f"Matrix products of bfloat16 weights: {way}; 128 rows and 1 row take plain " in done.stdout
        assert f"{way} 0.50 and 1.50 ms" in done.stdout


def test_a_training_in_float32_is_recorded(tiny_llama, pair_file, tmp_path, monkeypatch):
    """Of pairs in a file without a record, the model card cannot say that the model wrote them."""
    prefer(monkeypatch, "float32")
    flags = ("--dataset_path", pair_file, "--output_dir", tmp_path / "m", "--max_steps", 1, "--precision", "bf16")
    call_here("dpo.py", "--model_name_or_path", tiny_llama, *flags)
    record = json.loads((tmp_path / "m" / "grath.json").read_text())
    assert record["warnings"][0] == "the 16-bit model computes in float32, which is faster on this CPU"
    assert record["own_pairs"] is False


def test_a_near_tie_never_changes_the_precision(monkeypatch):
    times = {"plain": [2.0, 1.0], "packed": [1.0, 1.0], "float32": [0.7, 1.0]}
    monkeypatch.setattr(cpu_matmul, "time_products", lambda weight: times)
    assert cpu_matmul.choose_way(tiny("llama").bfloat16()) == "packed"
    times["float32"] = [0.5, 1.0]
    assert cpu_matmul.choose_way(tiny("llama").bfloat16()) == "float32"


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
