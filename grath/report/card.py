"""The model card of an adapter, or of the model that it was merged into."""

import re
from pathlib import Path

from grath.common.layout import find_model, is_run
from grath.pairs.questions import TRUTHFULQA
from grath.report.pages import made_with, settings_table
from grath.report.runs import model_name, read_run, settings_of
from grath.report.tables import score_footer, score_tables

CARD = "README.md"
ABOUT = """# {name}

{kind} of {base}, trained by GRATH
([Chen et al., 2024](https://arxiv.org/abs/2401.12292)) with DPO and LoRA ([TRL](https://github.com/huggingface/trl)).
{data}
{source}The licence of the base applies.

## Use

```python
from transformers import pipeline

chat = pipeline("text-generation", "{name}")
print(chat([{{"role": "user", "content": "Why is the sky blue?"}}]))
```"""
OWN = "The model wrote a correct and an incorrect answer to each of {asked} questions, and learned to prefer the first."
GIVEN = "It was trained on pairs of {data}, not on pairs of its own."
OF_A_FILE = "It was trained on the pairs of a given file."


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

    folder = adapter.resolve().parent.parent
    run = read_run(folder) if is_run(folder) else {"models": ()}
    number = next((i for i in run["models"] if i and find_model(folder, i) == adapter.resolve()), None)
    base = hub_name(record["base_model"])
    metadata = ModelCardData(
        base_model=base,
        base_model_relation=("finetune" if merged else "adapter") if base else None,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=["grath", "dpo", "trl", "lora"],
    )
    settings, records, rows, asked, source = settings_of("dpo", record), [record], [], record["pairs"]["read"], ""
    given = settings.get("dpo dataset_name", "")
    own = OWN if number or record.get("own_pairs", True) else OF_A_FILE
    if number:
        models, settings = run["models"], run["settings"]
        records = models[number]["records"].values()
        asked = (models[0]["pairs"] or {}).get("asked") or asked
        source = f"This is the model of iteration {number}.\n"
        if not given.startswith(TRUTHFULQA) and models[number]["scores"]:
            rows = [(model_name(i), models[i]["scores"]) for i in (0, number)]
    elif record["incoming_adapter"]:
        source = "The training continued an earlier adapter.\n"
    about = ABOUT.format(
        name=name,
        kind="A fine-tuned model" if merged else "A LoRA adapter",
        base=f"[{base}](https://huggingface.co/{base})" if base else Path(record["base_model"]).name,
        data=GIVEN.format(data=given) if given else own.format(asked=asked),
        source=source,
    )
    scores = ["## Scores", score_tables(rows, [rows[0][1]] * 2)[0], score_footer(rows)] if rows else []
    public = {setting: _public(value) for setting, value in settings.items()}
    parts = [f"---\n{metadata.to_yaml()}\n---", about, *scores, "## Settings", settings_table(public)]
    return "\n\n".join([*parts, made_with(records)]) + "\n"


def hub_name(name):
    """Return the name of a model if it is one of the hub, not a path; else None."""
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not Path(name).exists()
    return name if is_name else None


def _public(value):
    """Return a setting; of a path, only its name."""
    local = value.startswith(("/", "./", "../", "~")) or Path(value).exists()
    return Path(value).name if value and local else value
