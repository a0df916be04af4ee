"""docs/configuration.md, generated from the settings.

python -m grath.pipeline configuration > docs/configuration.md
"""

from grath.pipeline.settings import GROUPS, OTHER_VARIABLES


def configuration_page():
    """Return docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "Every setting of the loop is an environment variable: `MAX_STEPS=500 ./run_llama2.sh`. A preset sets those of",
        "its model; what you set wins over the preset. An empty value is the default, except for `TASKS`.",
        "",
        "*First affected* is the first stage whose output the setting changes. You can change a setting until that",
        "stage has started; after that, the run refuses another value, unless the stage refused its input. A dash",
        "means that the setting changes no output, so you can change it between two starts of a run. Of",
        "`DPO_BATCH_SIZE`, `GRADIENT_ACCUMULATION_STEPS` and `NUM_PROCESSES` only the pairs in a step count.",
        "",
        "This page is generated: `python -m grath.pipeline configuration > docs/configuration.md`.",
    ]
    for title, group in GROUPS.items():
        lines += ["", f"## {title}", "", "| variable | default | paper | first affected | meaning |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for setting in group:
            default = f"`{setting.default}`" if setting.default else "empty"
            cells = [f"`{setting.name}`", default, setting.paper or "-", setting.stage or "-", setting.help]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Other variables", "", "| variable | meaning |", "| --- | --- |"]
    lines += [f"| `{name}` | {text} |" for name, text in OTHER_VARIABLES.items()]
    return "\n".join(lines) + "\n"
