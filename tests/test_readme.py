"""Every command of the README is run by a test, and what the pages say about the code is true."""

import itertools
import re
import shlex
import shutil
from string import Template

import pytest
from support import BUNDLED, CORRECT, INCORRECT, PROJECT, call_here, pair, rows

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
    "python -m grath.export $adapter $merged_model": ["--precision", "fp32"],
}
TRAIN = "--model_name_or_path $model_name_or_path --output_dir $output_dir"
DRY_RUN = "test_dry_run_prints_every_command_and_runs_none"
# The other commands, and the test or fixture that runs each.
ELSEWHERE = {
    "make demo": "test_the_demo_on_smollm2_with_reduced_sizes",
    "./run_llama2.sh": "llama_run",
    "./run_llama2_fix_ref.sh": DRY_RUN,
    "./run_zephyr.sh": DRY_RUN,
    "./run_zephyr_fix_ref.sh": DRY_RUN,
    "./run_smollm2.sh": "test_the_demo_on_smollm2_with_reduced_sizes",
    "./run_smollm2_fix_ref.sh": DRY_RUN,
    "DRY_RUN=1 ./run_llama2.sh": DRY_RUN,
    "CHECK=1 ./run_llama2.sh": "test_check_passes_and_prints_the_plan",
    'TASKS="truthfulqa_mc1 truthfulqa_mc2" ./run_llama2.sh': "llama_run",
    "python -m grath.push $adapter $name": "test_an_adapter_is_pushed_with_a_card_of_its_run",
    "python -m grath.push $adapter $name --merged $merged_model": "test_a_merged_model_is_pushed_whole",
    "FRESH=1 ./run_llama2.sh": "test_fresh_moves_the_old_run_aside_and_makes_the_same_bytes",
    "sbatch ./run_llama2.sh": "test_presets_can_be_given_to_slurm",
    f"accelerate launch dpo.py --dataset_path $dataset_path {TRAIN} --seed $seed": (
        "test_accelerate_launch_gives_the_same_adapter"
    ),
    f"accelerate launch dpo.py --dataset_name $dataset_name {TRAIN} --seed $seed": "test_labeled_datasets",
    "accelerate launch --config_file accelerate_configs/data_parallel.yaml --num_processes 2 dpo.py "
    f"--dataset_path $dataset_path {TRAIN}": "test_two_processes_resume_the_training_of_one",
    "./evaluation.sh $model_or_adapter $output_dir": "test_all_tasks_of_the_leaderboard_offline",
    "./evaluation.sh": "test_evaluation_scores_what_is_left_of_the_newest_run",
}


def test_every_command_is_run():
    """Every line of the code blocks without a language, apart from `export` lines."""
    page = (PROJECT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    quoted = [line for line in lines if not line.startswith("export ")]
    assert sorted(quoted) == sorted(["make test", *STEPS, *ELSEWHERE])
    assert "\nmake test\n" in (PROJECT / ".ci" / "run").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (PROJECT / "tests").rglob("*.py"))
    assert [name for name in ELSEWHERE.values() if f"\ndef {name}(" not in tests] == []


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
    written = [pair(row["question"], CORRECT, INCORRECT) for row in rows(BUNDLED)[:2]]
    for gt, fs in itertools.product((False, True), repeat=2):
        assert rows(tmp_path / f"data/truthfulness/x_num_2_useGT_{gt}_useFS_{fs}.json") == written


def test_the_messages_of_the_troubleshooting_table_are_in_the_code():
    page = (PROJECT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    table = page.split("| error message | fix |")[1].split("\n\n")[0]
    lines = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    paths = [*(PROJECT / "grath").rglob("*.*"), PROJECT / "run_grath.sh"]
    code = "".join(path.read_text(encoding="utf-8") for path in paths if path.suffix in (".py", ".sh"))
    assert len(lines) > 5
    assert [line for line in lines if " ".join(line.split()[:4]) not in code] == []


def test_every_module_is_on_the_map():
    tree = (PROJECT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")[1]
    package, mapped = "", set()
    for line in tree.split("grath/\n")[1].splitlines():
        entry = re.match(r"  (?:(\w+/)| {7} *)? *(\w+)", line)
        if not entry:
            break
        package = entry[1] or ("" if line[2:3].strip() else package)
        mapped.add(f"{package}{entry[2]}")
    modules = {str(path.relative_to(PROJECT / "grath").with_suffix("")) for path in (PROJECT / "grath").rglob("*.py")}
    modules = {name for name in modules if not name.endswith("__init__")} | {"run/lock"}
    assert len(modules) > 30 and modules == mapped


PAGES = [page for folder in (".", "results", "docs") for page in PROJECT.glob(f"{folder}/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if not link.startswith(("http:", "https:"))]
    assert [link for link in local if not (page.parent / link).exists()] == []
