"""The model card of an adapter, or of the model that it was merged into."""

from pathlib import Path

from grath.common.layout import find_model
from grath.evaluation.tasks import get_task
from grath.report.pages import made_with, settings_table
from grath.report.runs import is_run, model_name, read_run, settings_of
from grath.report.tables import score_footer, score_tables

CARD = "README.md"
ABOUT = """# {name}

{kind} of [{base}](https://huggingface.co/{base}), made more truthful by GRATH
([Chen et al., 2024](https://arxiv.org/abs/2401.12292)): the model wrote a correct and an incorrect answer to each of
{asked} questions, and DPO with LoRA ([TRL](https://github.com/huggingface/trl)) taught it to prefer the correct one.
{iterations}The licence of the base applies."""
USE_ADAPTER = """```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, pipeline

model = AutoPeftModelForCausalLM.from_pretrained("{name}")
chat = pipeline("text-generation", model, tokenizer=AutoTokenizer.from_pretrained("{base}"))
```"""
USE_MERGED = """```python
from transformers import pipeline

chat = pipeline("text-generation", "{name}")
```"""
ASK = 'chat([{"role": "user", "content": "Why is the sky blue?"}])'


def model_card(adapter, record, name, merged):
    """Return the model card of an adapter of `dpo.py`, with metadata for the hub.

    Args:
        adapter: its folder (Path).
        record: the record of its training.
        name: the repository's.
        merged: whether the card is of the model that the adapter was merged into.
    """
    from huggingface_hub import ModelCardData

    base, (number, run) = _public(record["base_model"]), _run_of(adapter)
    rows = [(model_name(i), run["models"][i]["scores"]) for i in (0, number)] if run else []
    settings = run["settings"] if run else settings_of({"dpo": record})
    settings = {setting: _public(value) for setting, value in settings.items()}
    pairs = run and run["models"][0]["pairs"]
    asked = (pairs or {}).get("asked") or record["pairs"]["read"]
    data = settings.get("dpo dataset_name") or (not settings.get("pairs data_path") and settings.get("pairs data_name"))
    metadata = ModelCardData(
        model_name=name.partition("/")[2],
        base_model=base if base == record["base_model"] else None,
        base_model_relation="finetune" if merged else "adapter",
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        datasets=[data] if data else None,
        tags=["grath", "dpo", "trl", "lora"],
        eval_results=[_result(task, score) for task, score in rows[1][1].items()] if rows else None,
    )
    about = ABOUT.format(
        name=name,
        kind="A fine-tuned model" if merged else "A LoRA adapter",
        base=base,
        asked=asked,
        iterations=f"This is the model of iteration {number}.\n" if number else "",
    )
    use = f"{(USE_MERGED if merged else USE_ADAPTER).format(name=name, base=base)[:-4]}\nprint({ASK})\n```"
    parts = ["---\n" + metadata.to_yaml() + "\n---", about, "## Use", use]
    if any(scores for _, scores in rows):
        parts += ["## Scores", score_tables(rows, [rows[0][1]] * 2)[0], score_footer(rows)]
    records = [*run["models"][number]["records"].values()] if run else [record]
    return "\n\n".join([*parts, "## Settings", settings_table(settings), made_with(records)]) + "\n"


def _run_of(adapter):
    """Return (i, what `read_run` returned) if an adapter is M_i of a run, else (None, None)."""
    folder = adapter.resolve().parent.parent
    run = read_run(folder) if is_run(folder) else {"models": ()}
    numbers = [i for i in run["models"] if i and find_model(folder, i) == adapter.resolve()]
    return (numbers[0], run) if numbers else (None, None)


def _public(value):
    """Return a setting without a folder of this machine."""
    return Path(value).name if value and Path(value).exists() else value


def _result(task, score):
    from huggingface_hub import EvalResult

    known = get_task(task)
    return EvalResult(
        task_type="text-generation",
        dataset_type=known.dataset or task,
        dataset_name=known.title,
        metric_type=task,
        metric_value=round(score["score"], 2),
        dataset_revision=None,
    )
