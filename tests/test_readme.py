"""Every command of the README is run by a test, and what the pages say of the code is true."""

import json
import re
import shlex
import shutil
from pathlib import Path
from string import Template

import pytest
from support import BUNDLED, PROJECT, call_here, cells_of

from grath.evaluation.results import read_scores

ASK = "python create_pair_responses.py --model_name_or_path $model_name_or_path --save_prefix $save_prefix"
FEW = ["--data_path", BUNDLED, "--num_query", 2]
# Commands that `test_the_commands_of_the_steps` runs, in this order, with these flags to make them small.
STEPS = {
    ASK: FEW,
    f"{ASK} --useGT": FEW,
    f"{ASK} --useFS": FEW,
    f"{ASK} --useGT --useFS": FEW,
    "python combine_new_correct_ori_wrong.py --new_data_path $new_data_path --ori_data_path $ori_data_path": [],
    "python -m grath.report $run_dir": [],
    "python -m grath.report $run_dir $other_run_dir": [],
    "python -m grath.distance $pairs --model_name_or_path $model_name_or_path": [],
    "python -m grath.export $adapter $merged_model": [],
}
DRY_RUN = "tests/run/test_loop.py::test_dry_run_prints_every_command_and_runs_none"
TRAIN = "--model_name_or_path $model_name_or_path --output_dir $output_dir"
# The other commands, and where each is run: by a test, or by CI itself.
ELSEWHERE = {
    "make demo": "tests/run/test_whole_runs.py::test_the_demo_on_smollm2_with_reduced_sizes",
    "make test": ".ci/run",
    "./run_llama2.sh": "tests/conftest.py::llama_run",
    "./run_llama2_fix_ref.sh": DRY_RUN,
    "./run_zephyr.sh": DRY_RUN,
    "./run_zephyr_fix_ref.sh": DRY_RUN,
    "./run_smollm2.sh": "tests/run/test_whole_runs.py::test_the_demo_on_smollm2_with_reduced_sizes",
    "./run_smollm2_fix_ref.sh": DRY_RUN,
    "DRY_RUN=1 ./run_llama2.sh": DRY_RUN,
    "CHECK=1 ./run_llama2.sh": "tests/run/test_check.py::test_check_passes_and_prints_the_plan",
    "FRESH=1 ./run_llama2.sh": "tests/run/test_loop.py::test_fresh_moves_the_old_run_aside",
    "sbatch ./run_llama2.sh": "tests/run/test_loop.py::test_presets_can_be_given_to_slurm",
    "./prefetch.sh $folder $model": "tests/evaluation/test_harness.py::test_prefetch_names_what_it_fetches",
    f"accelerate launch dpo.py --dataset_path $dataset_path {TRAIN} --seed $seed": (
        "tests/dpo/test_launch.py::test_accelerate_launch_gives_the_same_adapter"
    ),
    f"accelerate launch dpo.py --dataset_name $dataset_name {TRAIN} --seed $seed": (
        "tests/dpo/test_dataset.py::test_labeled_datasets"
    ),
    "accelerate launch --config_file accelerate_configs/data_parallel.yaml --num_processes 2 dpo.py "
    f"--dataset_path $dataset_path {TRAIN}": "tests/dpo/test_launch.py::test_two_processes_give_the_same_training",
    "./evaluation.sh $model_or_adapter $output_dir": (
        "tests/evaluation/test_harness.py::test_all_tasks_of_the_leaderboard_offline"
    ),
    "./evaluation.sh": "tests/run/test_loop.py::test_evaluation_scores_what_is_left_of_the_newest_run",
}


def quoted_commands(page):
    """Return the lines of the code blocks without a language, but for `export` lines."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", (PROJECT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    return [line for line in lines if not line.startswith("export ")]


def test_every_command_is_run():
    assert sorted(quoted_commands("README.md")) == sorted([*STEPS, *ELSEWHERE])
    for command, place in ELSEWHERE.items():
        file, _, name = place.partition("::")
        wanted = rf"^def {name}\(" if name else rf"^{command}$"
        assert re.search(wanted, (PROJECT / file).read_text(encoding="utf-8"), re.MULTILINE), place


def test_the_commands_of_the_steps(llama_run, tiny_llama, pair_file, tmp_path):
    for name in ("run_dir", "other_run_dir"):
        shutil.copytree(llama_run[0], tmp_path / name)
    shutil.copy(pair_file, tmp_path)
    made = "data/truthfulness/x_num_2_useGT_{}_useFS_True.json"
    values = {
        "model_name_or_path": tiny_llama,
        "save_prefix": "x",
        "new_data_path": made.format(False),
        "ori_data_path": made.format(True),
        "run_dir": "run_dir",
        "other_run_dir": "other_run_dir",
        "pairs": pair_file.name,
        "adapter": next((tmp_path / "run_dir" / "models").iterdir()),
        "merged_model": "merged",
    }
    for command, flags in STEPS.items():
        words = shlex.split(command)[1:]
        script, *arguments = [Template(word).substitute(values) for word in words if word != "-m"]
        call_here(script, *arguments, *flags, cwd=tmp_path)


def test_the_published_comparison_is_made_from_the_published_runs(tmp_path):
    page = PROJECT / "results" / "comparison.md"
    commands = (PROJECT / "results" / "README.md").read_text(encoding="utf-8")
    report = re.search(r"^python -m grath\.report (.*_seed_0)$", commands, re.MULTILINE)[1]
    names = [Path(run).name for run in report.split()]
    for name in names:
        shutil.copytree(PROJECT / "results" / name, tmp_path / name)
    call_here("grath.report", *(tmp_path / name for name in names))
    assert (tmp_path / "comparison.md").read_text(encoding="utf-8") == page.read_text(encoding="utf-8")


def test_results_in_the_readme_are_those_of_the_comparison():
    compared = cells_of((PROJECT / "results" / "comparison.md").read_text(encoding="utf-8"))
    table = (PROJECT / "README.md").read_text(encoding="utf-8").split("| run | pairs | truth signal |")[1]
    shown = cells_of(table.split("\n\n")[0])[1:]
    assert 2 < len(shown) <= 8
    for name, _, signal, *scores in shown:
        assert [name, *scores] in compared
        run, number = re.match(r"(.*): M_(\d)", name).groups()
        signals = [row[6] for row in compared if row[:2] == [run, f"M_{int(number) - 1}"]]
        assert signal == (" and ".join(signals) or "1")


def test_the_table_of_the_earlier_runs_equals_the_published_scores():
    table = (
        (PROJECT / "results" / "earlier.md").read_text(encoding="utf-8").split("| run | model |")[1].split("\n\n")[0]
    )
    found = re.findall(r"^\| (\w+) \| M_(\d)[^|]*\| (.*) \|$", table, re.MULTILINE)
    assert len(found) == 11
    for run, number, cells in found:
        scores = read_scores(PROJECT / "results" / run / "results" / f"iter_{number}")
        tasks = ("truthfulqa_mc1", "truthfulqa_mc2", "arc_challenge")
        expected = [
            f"{scores[task]['score']:.2f} ± {scores[task]['stderr']:.2f}" if task in scores else "-" for task in tasks
        ]
        pairs = [
            json.loads(path.read_text())
            for path in (PROJECT / "results" / run).glob(f"models/iter_{number}_*/grath.json")
        ]
        assert cells.split(" | ") == [*([str(pairs[0]["pairs"]["kept"])] if pairs else [""]), *expected]


def test_the_messages_of_the_troubleshooting_table_are_in_the_code():
    page = (PROJECT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    table = page.split("| error message | fix |")[1].split("\n\n")[0]
    lines = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    code = "".join(path.read_text(encoding="utf-8") for path in (PROJECT / "grath").rglob("*.py"))
    assert len(lines) > 5
    assert [line for line in lines if " ".join(line.split()[:4]) not in code] == []


def test_the_functions_that_the_method_names_exist():
    text = (PROJECT / "docs" / "method.md").read_text(encoding="utf-8")

    def linked(part):
        return {PROJECT / "docs" / name for name in re.findall(r"\]\((\.\./[^)]+)\)", part)}

    found = 0
    for line in text.splitlines():
        names = [name.split(".")[-1] for name in re.findall(r"`([A-Za-z_.]+)`", line)]
        names = [name for name in names if name not in ("rolling", "fixed", "DPOTrainer")]
        code = "".join(path.read_text(encoding="utf-8") for path in linked(line) or linked(text))
        assert [name for name in names if not re.search(rf"(def|class) {name}\b", code)] == []
        found += len(names)
    assert found > 15


def test_every_module_is_on_the_map():
    text = (PROJECT / "docs" / "architecture.md").read_text(encoding="utf-8")
    modules = {
        str(path.relative_to(PROJECT)) for path in (PROJECT / "grath").rglob("*.py") if path.name != "__init__.py"
    }
    linked = set(re.findall(r"\]\(\.\./(grath/[\w/.]+\.py)\)", text))
    assert len(modules) > 30 and modules == linked


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "results/README.md",
    "results/earlier.md",
    *(f"docs/{path.name}" for path in PROJECT.glob("docs/*.md")),
]


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name):
    page = PROJECT / name
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if not link.startswith(("http:", "https:"))]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_no_place_of_a_machine_stands_in_the_results():
    texts = [path for path in (PROJECT / "results").rglob("*") if path.suffix in (".json", ".jsonl", ".txt", ".md")]
    assert len(texts) > 50
    places = re.compile(r"(?<![\w.$/])/(?:tmp|work|root|home|mnt|Users)/")
    assert [path.name for path in texts if places.search(path.read_text(encoding="utf-8"))] == []
