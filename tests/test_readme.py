"""Every command in the README has a test that runs it, on a small model, or as a dry run where it would take a GPU."""

import json
import re

from conftest import PROJECT

from grath.scores import read_scores

PAIRS = "test_pairs.py::test_the_papers_commands"
ENGINE = "test_shared_prefix.py::test_the_benchmark_compares_all_ways"
EXPERIMENT = "test_pipeline.py::test_the_experiments_commands_with_reduced_sizes"
# Each command's shape -> where it runs, with a small model and other sizes (CI itself runs the make targets).
RUN_BY = {
    "make demo": "test_pipeline.py::test_the_demo_on_smollm2_with_reduced_sizes",
    "make test": ".ci/run",
    "python create_pair_responses.py --model_name_or_path --save_prefix": PAIRS,
    "python create_pair_responses.py --model_name_or_path --save_prefix --useFS": PAIRS,
    "python create_pair_responses.py --model_name_or_path --save_prefix --useGT": PAIRS,
    "python create_pair_responses.py --model_name_or_path --save_prefix --useGT --useFS": PAIRS,
    "python combine_new_correct_ori_wrong.py --new_data_path --ori_data_path": "test_pairs.py::test_splice",
    "accelerate launch dpo.py --dataset_path --model_name_or_path --output_dir --seed": (
        "test_dpo.py::test_accelerate_launch_trains_the_same"
    ),
    "accelerate launch dpo.py --dataset_name --model_name_or_path --output_dir --seed": (
        "test_dpo.py::test_keyed_sets_by_name"
    ),
    "./evaluation.sh MODEL OUTPUT": "test_pipeline.py::test_leaderboard_tasks_on_real_data",
    "./evaluation.sh": "test_pipeline.py::test_evaluation_scores_what_is_left_of_the_newest_run",
    "DRY_RUN=1 ./run_llama2.sh": "test_pipeline.py::test_dry_run_prints_every_command_and_runs_none",
    "CHECK=1 ./run_llama2.sh": "test_pipeline.py::test_a_check_before_the_night",
    "FRESH=1 ./run_llama2.sh": "test_pipeline.py::test_fresh_moves_the_old_run_aside",
    "sbatch ./run_llama2.sh": "test_pipeline.py::test_presets_can_be_given_to_slurm",
    "./run_llama2.sh": "conftest.py::llama_run",
    "./run_llama2_fix_ref.sh": "test_pipeline.py::test_dry_run_prints_every_command_and_runs_none",
    "./run_zephyr.sh": "test_pipeline.py::test_dry_run_prints_every_command_and_runs_none",
    "./run_zephyr_fix_ref.sh": "test_pipeline.py::test_dry_run_prints_every_command_and_runs_none",
    "./run_smollm2.sh": "test_pipeline.py::test_the_demo_on_smollm2_with_reduced_sizes",
    "./run_smollm2_fix_ref.sh": "test_pipeline.py::test_dry_run_prints_every_command_and_runs_none",
    "export": EXPERIMENT,
    "RUN_NAME=rolling ./run_smollm2.sh": EXPERIMENT,
    "RUN_NAME=fixed ./run_smollm2_fix_ref.sh": EXPERIMENT,
    "RUN_NAME=useGT USE_GT=1 ./run_smollm2.sh": EXPERIMENT,
    'RUN_NAME=halueval DEMOS=halueval TASKS="truthfulqa_mc1 truthfulqa_mc2" ./run_smollm2.sh': EXPERIMENT,
    "python -m grath.report runs/rolling_seed_0 runs/fixed_seed_0 runs/useGT_seed_0 runs/halueval_seed_0": EXPERIMENT,
    "python benchmarks/generation.py --dtype bf16 --num_query 128 --batch_size 128 --data_name allenai/ai2_arc": ENGINE,
    "python benchmarks/generation.py --dtype fp32 --num_query 128 --batch_size 64 --data_name allenai/ai2_arc": ENGINE,
    "python benchmarks/training.py --dtype bf16": "test_dpo.py::test_the_training_benchmark",
    "python benchmarks/evaluation.py --limit 20": "test_harness.py::test_the_evaluation_benchmark",
    "./prefetch.sh": "test_harness.py::test_prefetch_names_what_it_fetches",
    "python -m grath.report": "test_report.py::test_the_report_of_a_made_run",
    "python -m grath.distance --model_name_or_path": (
        "test_report.py::test_the_distance_of_a_pair_file_and_its_place_in_the_report"
    ),
    "python -m grath.export --precision bf16": "test_dpo.py::test_export_is_a_model_as_any_other",
    "accelerate launch --config_file accelerate_configs/data_parallel.yaml --num_processes 2 dpo.py --dataset_path "
    "--model_name_or_path --output_dir": "test_dpo.py::test_a_training_by_a_configuration_file",
}


def quoted_commands():
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [line for language, block in blocks if not language for line in block.splitlines()]


def shape(command):
    """A command without the values of its flags."""
    if command.startswith("export"):
        return "export"
    if command.startswith(("make", "DRY_RUN", "CHECK", "FRESH", "sbatch", "RUN_NAME", "./run_")):
        return command
    if command.startswith("./evaluation.sh"):
        return "./evaluation.sh MODEL OUTPUT" if "$" in command else command
    return " ".join(part for part in command.split() if not part.startswith("$"))


def test_every_quoted_command_is_run():
    commands = [shape(command) for command in quoted_commands()]
    assert len(commands) > 15
    assert sorted(set(commands)) == sorted(RUN_BY)


def test_the_table_of_results_is_that_of_the_experiment():
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    table = readme.split("| run | model |")[1].split("\n\n")[0]
    assert table in (PROJECT / "results" / "README.md").read_text(encoding="utf-8")
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


def test_the_run_that_was_made_again_is_the_first_one():
    first, again = (PROJECT / "results" / name for name in ("rolling", "rolling_again"))
    hashes = []
    for folder in (first, again):
        stages = json.loads((folder / "manifest.json").read_text())["stages"]
        made = {name: value for stage in stages for name, value in stage["outputs"].items()}
        hashes.append({n: v for n, v in made.items() if n.startswith("data/") or n.endswith(".safetensors")})
    assert len(hashes[0]) == 5 and hashes[0] == hashes[1]
    for number in range(3):
        scores, other = (read_scores(folder / "results" / f"iter_{number}") for folder in (first, again))
        assert len(scores) == 3 and scores == other


def test_the_tests_named_above_exist():
    for place in RUN_BY.values():
        name, _, test = place.partition("::")
        file = PROJECT / name if name.startswith(".") else PROJECT / "tests" / name
        assert f"def {test}(" in file.read_text() if test else file.is_file(), place


def test_the_table_of_settings_names_settings_of_the_loop():
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    table = readme.split("| variable |")[1].split("\n\n")[0]
    names = re.findall(r"`([A-Z_]{4,})`", table)
    loop = (PROJECT / "run_grath.sh").read_text() + (PROJECT / "evaluation.sh").read_text()
    assert len(names) > 15
    assert [name for name in names if f"{name}=" not in loop] == []
    of_the_loop = re.findall(r'^([A-Z_]{4,})="\$\{\1', loop, re.MULTILINE)
    assert len(of_the_loop) > 25
    assert set(of_the_loop) - set(names) == set()


def test_the_lines_of_the_troubleshooting_table_are_in_the_code():
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    table = readme.split("| the line | what to do |")[1].split("\n\n")[0]
    lines = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    code = "".join(path.read_text(encoding="utf-8") for path in (PROJECT / "grath").glob("*.py"))
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


def test_every_module_has_its_place_in_the_layout():
    text = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    modules = {path.name for path in (PROJECT / "grath").glob("*.py")} - {"__init__.py"}
    assert modules == set(re.findall(r"`(\w+\.py)`", text)) & modules
    named = re.findall(r"`((?:tests|benchmarks|grath|docs)/[\w.]+|\w+\.(?:py|sh))`", text)
    assert len(named) > 25
    assert [name for name in named if not any((PROJECT / folder / name).is_file() for folder in ("", "grath"))] == []


def test_no_place_of_a_machine_stands_in_the_results():
    texts = [path for path in (PROJECT / "results").rglob("*") if path.suffix in (".json", ".jsonl", ".txt", ".md")]
    assert len(texts) > 50
    places = re.compile(r"(?<![\w.$/])/(?:tmp|work|root|home|mnt|Users)/")
    assert [path.name for path in texts if places.search(path.read_text(encoding="utf-8"))] == []
