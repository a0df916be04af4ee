"""Every command of the READMEs is run by a test, on a small model, or as a dry run where it would take a GPU."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from support import HUB, PROJECT, call_here, cells_of

from grath.evaluation.results import read_scores

PRESETS = {path.name for path in PROJECT.glob("run_*.sh")}
# A command without a part of it is another command.
WHOLE = {"--useGT", "--useFS"}


def quoted_commands():
    text = "".join((PROJECT / page).read_text(encoding="utf-8") for page in ("README.md", "results/README.md"))
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [line for language, block in blocks if not language for line in block.splitlines()]


def parts_of(words):
    """What a command line says: its settings (NAME=VALUE), its programs, its flags, its values in words, its others."""
    settings, programs, flags, values, others = set(), [], set(), set(), 0
    words = [word for word in map(str, words) if not re.search(r"(^|/)python[\d.]*$", word)]
    while words and re.match(r"[A-Z_a-z]+=", words[0]):
        settings.add(words.pop(0))
    words = [word.removeprefix(f"{PROJECT}/").removeprefix("./") for word in words]
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        if word in ("launch", "-m") or before == "-m" or i == 0:
            programs.append(Path(word).name if word.endswith((".sh", "accelerate")) else word)
        elif word.endswith(".py") and not before.startswith("--"):
            programs.append(word)
        elif word.startswith("--"):
            flags.add(word)
        elif not before.startswith("--"):
            others += 1
        elif not word.startswith("$") and not re.fullmatch(r"[\d.e-]+", word):
            values.add(word)
    return settings, programs, flags, values, others


def runs(started, quoted):
    """Whether a command line that was started is one that is quoted, with other places, names and numbers."""
    (has, program, flags, values, others), (given, wanted, named, said, count) = started, quoted
    if program[:1] == ["make"] or program[:1] == ["sbatch"]:
        return wanted == program and others == count
    has = {setting for setting in has if not (setting == "DRY_RUN=1" and set(wanted) & PRESETS)}
    dry = {setting for setting in given if setting.startswith(("DRY_RUN", "CHECK", "FRESH"))}
    return (
        program == wanted
        and given - dry <= has
        and (not dry or dry <= started[0])
        and named <= flags
        and named & WHOLE == flags & WHOLE
        and said <= values
        and (others == count or program[-1].endswith(".py"))
    )


def test_a_command_is_known_by_what_it_says():
    def same(started, quoted):
        return runs(parts_of(shlex.split(started)), parts_of(shlex.split(quoted)))

    ask = "python create_pair_responses.py --model_name_or_path $m --save_prefix $p"
    assert same("/a/python3 create_pair_responses.py --model_name_or_path x --save_prefix y --num_query 3", ask)
    assert not same("python create_pair_responses.py --model_name_or_path x --save_prefix y --useFS", ask)
    assert not same("python create_pair_responses.py --save_prefix y", ask)
    assert same("python benchmarks/training.py --dtype bf16 --steps 2", "python benchmarks/training.py --dtype bf16")
    assert not same("python benchmarks/training.py --dtype fp32", "python benchmarks/training.py --dtype bf16")
    assert not same("python dpo.py --seed 0", "accelerate launch dpo.py --seed $seed")
    launch = f"accelerate launch --num_processes 1 {PROJECT}/dpo.py --seed 0"
    assert same(launch, "accelerate launch dpo.py --seed $seed")
    assert same("DRY_RUN=1 RUNS_DIR=x run_zephyr.sh", "./run_zephyr.sh")
    assert not same("RUNS_DIR=x run_llama2.sh", "CHECK=1 ./run_llama2.sh")
    assert not same("RUN_NAME=b ./run_smollm2.sh", "RUN_NAME=a ./run_smollm2.sh")
    assert not same("evaluation.sh", "./evaluation.sh $model $output")


def test_every_quoted_command_was_run(request):
    """By the tests before this one, which is the last: what they started was noted as it was started.

    If several processes share the tests, none of them knows when the others end: `make test` then runs this one alone
    with the file of the notes in RECORDED_COMMANDS.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("`make test` runs it after the other tests")
    recorded = os.environ.get("RECORDED_COMMANDS")
    modules = {item.path.name for item in request.session.items}
    everything = {
        path.name for path in (PROJECT / "tests").rglob("test_*.py") if path.parent.name != "faults"
    } <= modules
    selected = request.config.option.keyword or request.config.option.markexpr not in ("", "not faults")
    if not recorded and (selected or not everything):
        pytest.skip("only some of the tests were run")
    if not HUB.is_dir():
        pytest.skip(f"the real data, which some commands want, is not at {HUB}")
    lines = Path(recorded or os.environ["RECORD_COMMANDS"]).read_text(encoding="utf-8").splitlines()
    started = [parts_of(json.loads(line)) for line in dict.fromkeys(lines)]
    quoted = [command for command in quoted_commands() if not command.startswith("export ")]
    assert len(quoted) > 30
    # .ci/run itself calls the tests' own command.
    by_ci = (PROJECT / ".ci" / "run").read_text().splitlines()
    missing = [
        command
        for command in quoted
        if command not in by_ci and not any(runs(one, parts_of(shlex.split(command))) for one in started)
    ]
    assert missing == []


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
