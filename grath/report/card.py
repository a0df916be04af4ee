"""The model card of an adapter, or of the model that it was merged into."""

import re
from pathlib import Path

from grath.common.layout import find_model
from grath.evaluation.tasks import get_task
from grath.pairs.questions import LABELED, LABELED_DATASETS, TRUTHFULQA
from grath.report.pages import made_with, settings_table
from grath.report.runs import is_run, model_name, read_run, settings_of
from grath.report.tables import score_footer, score_tables

CARD = "README.md"
ABOUT = """# {name}

{kind} of {base}, {how} by GRATH
([Chen et al., 2024](https://arxiv.org/abs/2401.12292)) with DPO and LoRA ([TRL](https://github.com/huggingface/trl)).
{data}
{iteration}{earlier}The licence of the base applies."""
OWN = "The model wrote a correct and an incorrect answer to each of {asked} questions, and learned to prefer the first."
GIVEN = "It was trained on pairs of {data}, not on pairs of its own."
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

    It contains no scores of a model that was trained on TruthfulQA.

    Args:
        adapter: its folder (Path).
        record: the record of its training.
        name: the repository's.
        merged: whether the card is of the model that the adapter was merged into.
    """
    from huggingface_hub import ModelCardData

    number, run = _run_of(adapter)
    base = hub_name(record["base_model"])
    shown = base or Path(record["base_model"]).name
    settings = run["settings"] if run else settings_of("dpo", record)
    given = settings.get("dpo dataset_name", "")
    labeled = LABELED.fullmatch(given)
    data = LABELED_DATASETS[labeled[1]][0] if labeled else given
    if not given and not settings.get("pairs data_path"):
        data = settings.get("pairs data_name")
    rows = [(model_name(i), run["models"][i]["scores"]) for i in (0, number)] if run else []
    if given.startswith(TRUTHFULQA) or not any(scores for _, scores in rows):
        rows = []
    whole = rows and not settings.get("scores limit")
    metadata = ModelCardData(
        model_name=name.rpartition("/")[2],
        base_model=base,
        base_model_relation=("finetune" if merged else "adapter") if base else None,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        datasets=[data] if data and hub_name(data) else None,
        tags=["grath", "dpo", "trl", "lora"],
        eval_results=[_result(task, score) for task, score in rows[1][1].items()] if whole else None,
    )
    pairs = run and run["models"][0]["pairs"]
    asked = (pairs or {}).get("asked") or record["pairs"]["read"]
    first = run["models"][1]["records"]["dpo"] if run else record
    about = ABOUT.format(
        name=name,
        kind="A fine-tuned model" if merged else "A LoRA adapter",
        base=f"[{base}](https://huggingface.co/{base})" if base else shown,
        how="trained" if given else "made more truthful",
        data=GIVEN.format(data=given) if given else OWN.format(asked=asked),
        iteration=f"This is the model of iteration {number}.\n" if number else "",
        earlier="The training continued an earlier adapter.\n" if first.get("incoming_adapter") else "",
    )
    use = f"{(USE_MERGED if merged else USE_ADAPTER).format(name=name, base=shown)[:-4]}\nprint({ASK})\n```"
    parts = ["---\n" + metadata.to_yaml() + "\n---", about, "## Use", use]
    if rows:
        parts += ["## Scores", score_tables(rows, [rows[0][1]] * 2)[0], score_footer(rows)]
    records = [*run["models"][number]["records"].values()] if run else [record]
    settings = {setting: _public(value) for setting, value in settings.items()}
    return "\n\n".join([*parts, "## Settings", settings_table(settings), made_with(records)]) + "\n"


def hub_name(name):
    """Return the name of a model or data set if it is one of the hub, not a path; else None."""
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not Path(name).exists()
    return name if is_name else None


def _run_of(adapter):
    """Return (i, what `read_run` returned) if an adapter is M_i of a run, else (None, None)."""
    folder = adapter.resolve().parent.parent
    run = read_run(folder) if is_run(folder) else {"models": ()}
    numbers = [i for i in run["models"] if i and find_model(folder, i) == adapter.resolve()]
    return (numbers[0], run) if numbers else (None, None)


def _public(value):
    """Return a setting; of a path, only its name."""
    local = value.startswith(("/", "./", "../", "~")) or Path(value).exists()
    return Path(value).name if value and local else value


def _result(task, score):
    from huggingface_hub import EvalResult

    known = get_task(task)
    return EvalResult(
        task_type="text-generation",
        dataset_type=known.dataset or task,
        dataset_name=(known.dataset or task).rpartition("/")[2],
        metric_type=task,
        metric_name=known.title,
        metric_value=round(score["score"], 2),
    )
