"""`hf-shared` gives what `hf` gives, and computes less."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import FAMILIES, HUB, PROJECT, VLLM_ENV, call, call_here, evaluate_here, rows, tiny

from grath.common.errors import UserError
from grath.evaluation.harness import register_shared_context_model
from grath.evaluation.loglikelihood import group_by_prefix, window_loglikelihoods


@pytest.fixture(scope="session")
def harness():
    """A function that makes the harness's `hf` and our `hf-shared` of a model object."""
    from lm_eval.models.huggingface import HFLM

    kinds = {"hf": HFLM, "hf-shared": register_shared_context_model()}

    def make(kind, model, tokenizer, **options):
        return kinds[kind](pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu", **options)

    return make


def task_manager(*folders):
    """The harness's `TaskManager` for the tasks of some folders: to read them all takes 14 seconds."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    return lm_eval.tasks.TaskManager(include_path=[str(root / name) for name in folders], include_defaults=False)


def requests(window, seed=0):
    """(None, context, answer) requests: shared blocks, lone contexts, one token, duplicates, longer than the window."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(1, 60, (n,), generator=generator).tolist()  # noqa: E731
    block, other = draw(40), draw(50)
    found = [(block + draw(n), draw(m)) for n in (1, 5, 9) for m in (1, 1, 4)]
    questions = [block + draw(6) for _ in range(4)] + [other + draw(7) for _ in range(3)]
    found += [(question, draw(m)) for question in questions for m in (1, 2, 5)]
    found += [(draw(1), draw(3)), (draw(1), draw(1)), (draw(20), draw(2))]
    found += [
        (draw(window - 3), draw(8)),
        (draw(window + 9), draw(5)),
        (draw(window), draw(1)),
        (draw(3), draw(window)),
    ]
    found += found[3:6] + found[:1]
    return [(None, context, answer) for context, answer in found]


def same(ours, theirs):
    """Equal scores, to the rounding of float32.

    A score is a sum over tokens, as large as the score itself; each term is rounded some dozen times on its way through
    the model, at 1.2e-7 of its size. A token that saw what it should not, or was left out, changes a score by far more.
    """
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], rel=1e-5, abs=1e-4)
    # Two best logits that tie within the rounding may change places: no more than one request may hang on that.
    assert sum(a != b for (_, a), (_, b) in zip(ours, theirs, strict=True)) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_hf(harness, llama_tokenizer, family):
    model = tiny(family, max_position_embeddings=300)
    asked = requests(300)
    ours, theirs = (
        harness(kind, model, llama_tokenizer, max_length=300)._loglikelihood_tokens(asked, disable_tqdm=True)
        for kind in ("hf-shared", "hf")
    )
    same(ours, theirs)


def test_scores_are_those_of_hf_on_smollm2(harness, smollm2):
    from grath.modeling.loading import load_model, load_tokenizer

    model, tokenizer = load_model(str(smollm2), "fp32").eval(), load_tokenizer(str(smollm2))
    shots = "Q: Is ice cold?\nA: Yes, ice is frozen water.\n\nQ: Is fire cold?\nA: No, fire is hot.\n\nQ: "
    asked = [
        (None, tokenizer(shots + question + "\nA:").input_ids, tokenizer(answer).input_ids)
        for question in ("Do plants eat?", "Is iron a metal?", "Can fish fly?")
        for answer in (" Yes", " No, they make their own food from light.", " It is a metal, and it rusts.")
    ]
    ours, theirs = (
        harness(kind, model, tokenizer)._loglikelihood_tokens(asked, disable_tqdm=True) for kind in ("hf-shared", "hf")
    )
    same(ours, theirs)


def test_scores_with_an_adapter_and_in_4_bit(harness, tiny_llama, llama_tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model

    from grath.modeling.loading import load_model

    adapted = get_peft_model(
        tiny("llama"), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    asked = requests(200)
    ours, theirs, base = (
        harness(kind, model, llama_tokenizer, max_length=200)._loglikelihood_tokens(asked, disable_tqdm=True)
        for kind, model in (("hf-shared", adapted), ("hf", adapted), ("hf", tiny("llama")))
    )
    same(ours, theirs)
    assert max(abs(a - b) for (a, _), (b, _) in zip(ours, base, strict=True)) > 0.1
    quantized = load_model(str(tiny_llama), "nf4").eval()
    ours, theirs = (
        harness(kind, quantized, llama_tokenizer, max_length=200)._loglikelihood_tokens(asked, disable_tqdm=True)
        for kind in ("hf-shared", "hf")
    )
    # 4-bit weights are multiplied in bfloat16, whose rounding depends on the shapes.
    for (score, _), (other, _), (_, _, answer) in zip(ours, theirs, asked, strict=True):
        assert score == pytest.approx(other, abs=0.1 * len(answer) ** 0.5 + 0.02 * abs(other))


def test_every_token_is_computed_once(monkeypatch):
    model, seen = tiny("llama", max_position_embeddings=2000), []
    model.model.embed_tokens.register_forward_hook(lambda _, args, __: seen.append(args[0].numel()))
    block = torch.arange(500).remainder(50).tolist()
    windows = [(tuple(block + [55, i]), (i, 3, j)) for i in range(10) for j in range(4)]
    done = dict(place_and_score for places, score in window_loglikelihoods(model, windows, 300) for place_and_score in
                ((place, score) for place in places))  # fmt: skip
    assert sorted(done) == list(range(40))
    # The block once; of every context the last token; of every answer all but the last, and equal beginnings once.
    assert sum(seen) == 501 + 10 * (1 + 2)


def test_contexts_are_grouped_where_that_saves():
    block, long = tuple(range(100)), tuple(range(200, 600))
    contexts = [(*block, 7, i) for i in range(5)] + [(*block, 8, 1)] + [(*long, 1)] + [(1, 2), (3,)]
    # These share 40 tokens with the block, but to shorten its group's prefix to 40 would cost more than that saves.
    contexts += [(*block[:40], 150, i) for i in range(2)]
    # A prefix of 50 that saves 50 of 260 tokens is not worth a forward pass; of 240 tokens it is.
    contexts += [(*range(700, 750), 9, *range(79)), (*range(700, 750), 8, *range(79))]
    contexts += [(*range(800, 850), 9, *range(69)), (*range(800, 850), 8, *range(69))]
    groups = {length: sorted(members) for length, members in group_by_prefix({c: len(c) for c in contexts})}
    alone = sorted([contexts[6], *contexts[7:9], *contexts[11:13]])
    assert groups == {100: contexts[:6], 41: contexts[9:11], 50: sorted(contexts[13:]), 0: alone}


def test_batches_have_at_most_so_many_tokens(monkeypatch):
    model, seen = tiny("llama", max_position_embeddings=2000), []
    model.model.embed_tokens.register_forward_hook(lambda _, args, __: seen.append(args[0].numel()))
    windows = [((i, *range(1, 10 + i)), (3, 4)) for i in range(20)]
    results = {place: score for places, score in window_loglikelihoods(model, windows, 100) for place in places}
    assert sorted(results) == list(range(20))
    # The longest rows first; a batch has as many as would fit with padding, which is not computed.
    assert seen == [30 + 29 + 28, 27 + 26 + 25, sum(range(21, 25)), sum(range(16, 21)), sum(range(11, 16))]
    seen.clear()
    limited = {place: score for places, score in window_loglikelihoods(model, windows, 44, 2) for place in places}
    assert max(seen) <= 44 and 10 < len(seen) < 20
    same([limited[i] for i in range(20)], [results[i] for i in range(20)])


@pytest.mark.parametrize("add_bos", [None, True, False])
def test_requests_are_tokenized_as_hf_does(harness, llama_tokenizer, hub, monkeypatch, add_bos):
    """All requests of five tasks of a made hub; and the first of the real ARC and TruthfulQA where they are at hand."""
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from grath.common.local_data import load_dataset

    monkeypatch.setattr("grath.common.paths.DATASETS_ROOT", str(HUB if HUB.is_dir() and add_bos is None else hub))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    lm = harness("hf-shared", tiny("llama"), llama_tokenizer, add_bos_token=add_bos)
    seen = []
    lm._loglikelihood_tokens = lambda found, **_: seen.append(found) or [(0.0, False)] * len(found)

    def both(requests, **_):
        ours = type(lm).loglikelihood(lm, requests, disable_tqdm=True)
        HFLM.loglikelihood(lm, requests, disable_tqdm=True)
        assert seen[-2] == seen[-1]
        return ours

    lm.loglikelihood = both
    manager = task_manager("truthfulqa", "arc", "hellaswag", "mmlu/default")
    for task, shots, root in (
        ("truthfulqa_mc1", 0, None), ("truthfulqa_mc2", 0, None), ("arc_challenge", 25, None), ("hellaswag", 10, hub),
        ("mmlu_anatomy", 5, hub),
    ):  # fmt: skip
        if root:
            monkeypatch.setattr("grath.common.paths.DATASETS_ROOT", str(root))
        simple_evaluate(
            lm, tasks=[task], num_fewshot=shots, limit=None if add_bos is not None else 40, task_manager=manager,
            bootstrap_iters=0, log_samples=False,
        )  # fmt: skip
        assert len(seen[-1]) >= 4 and len(seen) % 2 == 0
    odd = [("<s> It is", " so"), ("It is  ", "so"), ("  ", "so"), ("a", ""), ("It\nis", "\nso"), ("<s>", "so")]
    both([Instance("loglikelihood", {}, pair, 0) for pair in odd])


def test_what_cannot_be_shared_is_scored_like_hf(harness, llama_tokenizer, capsys):
    model = tiny("gemma2", max_position_embeddings=300, sliding_window=64)
    asked = requests(100)
    shared, plain = (harness(kind, model, llama_tokenizer, max_length=100) for kind in ("hf-shared", "hf"))
    ours = shared._loglikelihood_tokens(asked)
    assert "hf-shared uses the method of hf: " in capsys.readouterr().err
    same(ours, plain._loglikelihood_tokens(asked, disable_tqdm=True))


def scores(folder, task):
    values = json.loads((folder / f"{task}.json").read_text())["results"][task]
    return {name: value for name, value in values.items() if isinstance(value, float)}


@pytest.mark.slow
def test_two_processes_and_both_backends_give_the_same_scores(llama_run, tiny_llama, tmp_path):
    run, settings, _ = llama_run
    env = {name: settings[name] for name in ("TASKS", "LIMIT")}
    done = call("evaluation.sh", tiny_llama, tmp_path / "two", env={**env, "NUM_PROCESSES": "2"})
    # The first of two processes scores its own share, the first and the third of three questions, and no more.
    docs = [row for i, row in enumerate(rows(PROJECT / "data" / "truthfulness_mc.jsonl")[:3]) if i != 1]
    share = sum(len(row[f"mc{kind}_targets"]["choices"]) for row in docs for kind in (1, 2))
    assert re.findall(r"Scoring requests: 100%.* (\d+)/\1 ", done.stderr)[-1] == str(share)
    evaluate_here(tiny_llama, tmp_path / "hf", env={**env, "BACKEND": "hf"})
    for task in ("grath_mc1", "grath_mc2"):
        expected = scores(run / "results" / "iter_0", task)
        assert scores(tmp_path / "two", task) == pytest.approx(expected, abs=1e-5)
        assert scores(tmp_path / "hf", task) == pytest.approx(expected, abs=1e-5)


def test_the_examples_do_not_depend_on_the_number_of_processes(hub, monkeypatch):
    import datasets
    from lm_eval.api.task import Task

    from grath.common.local_data import load_dataset
    from grath.evaluation.harness import patch_fewshot_sampling

    monkeypatch.setattr(Task, "build_all_requests", Task.build_all_requests)
    patch_fewshot_sampling()
    monkeypatch.setattr("grath.common.paths.DATASETS_ROOT", str(hub))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    def contexts(rank, processes):
        task = task_manager("arc").load(["arc_challenge"])["tasks"]["arc_challenge"]
        task.set_config("num_fewshot", 3)
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=7, rank=rank, world_size=processes)
        return {request.doc_id: request.args[0] for request in task.instances}

    alone = contexts(0, 1)
    assert sorted(alone) == list(range(7)) and len({text.rpartition("Question:")[0] for text in alone.values()}) > 1
    shares = [contexts(rank, 2) for rank in range(2)]
    assert [sorted(share) for share in shares] == [[0, 2, 4, 6], [1, 3, 5]]
    assert shares[0] | shares[1] == alone


def test_all_tasks_of_the_leaderboard_offline(hub, tiny_llama, tmp_path):
    """With the real ARC and TruthfulQA where they are at hand."""
    root = tmp_path / "root"
    for name in ("Rowan", "cais", "allenai", "truthfulqa"):
        root.mkdir(exist_ok=True)
        (root / name).symlink_to((HUB if (HUB / name).is_dir() else hub) / name)
    env = {"LIMIT": "1", "DATASETS_ROOT": str(root)}
    done = call("evaluation.sh", tiny_llama, tmp_path / "scores", env=env, cwd=tmp_path)
    for task, shots in {"arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc1": 0, "truthfulqa_mc2": 0}.items():
        content = json.loads((tmp_path / "scores" / f"{task}.json").read_text())
        assert content["n-shot"][task] == shots and list(content["results"]) == [task]
    mmlu = json.loads((tmp_path / "scores" / "mmlu.json").read_text())
    assert len(mmlu["results"]) > 57 and mmlu["n-shot"]["mmlu_anatomy"] == 5
    assert len(mmlu["questions"]["scores"]) == 57
    header = next(line for line in done.stdout.splitlines() if line.startswith("model"))
    assert header.split() == ["model", "MC1", "MC2", "ARC", "HellaSwag", "MMLU"]
    assert "chat template off" in done.stdout and "truthfulqa_mc2 3.0" in done.stdout


def test_a_killed_evaluation_resumes_with_the_next_task(hub, tiny_llama, tmp_path):
    env = {
        **os.environ, "TASKS": "truthfulqa_mc1 truthfulqa_mc2 hellaswag", "LIMIT": "4", "DATASETS_ROOT": str(hub),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix,
    }  # fmt: skip
    command = [PROJECT / "evaluation.sh", tiny_llama, tmp_path / "scores"]
    with subprocess.Popen(command, env=env, start_new_session=True, stdout=-3, stderr=-3) as process:
        while not (tmp_path / "scores" / "truthfulqa_mc2.json").exists():
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    assert not (tmp_path / "scores" / "hellaswag.json").exists()
    done = call(*command, env=env)
    assert done.stdout.count("is up to date") == 2
    assert scores(tmp_path / "scores", "hellaswag")


def test_missing_sample_answers_are_written_alone(tiny_llama, tmp_path):
    env = {"TASKS": "grath_mc1", "LIMIT": "2"}
    score = (tiny_llama, tmp_path / "s", "--tasks", "grath_mc1", "--limit", 2)
    call_here("grath.evaluation", *score)
    result = tmp_path / "s" / "grath_mc1.json"
    before = result.stat().st_mtime_ns
    assert not (tmp_path / "s" / "samples.jsonl").exists()
    done = call("evaluation.sh", tiny_llama, tmp_path / "s", env={**env, "NUM_PROCESSES": "2"})
    assert "is up to date" in done.stdout and result.stat().st_mtime_ns == before
    assert [set(row) for row in rows(tmp_path / "s" / "samples.jsonl")] == [{"question", "answer"}] * 5
    # Without its scores, the folder's answers are still those of its settings.
    result.unlink()
    done = call_here("grath.evaluation", *score, "--precision", "bf16", status=2)
    assert "dtype=float32, not bfloat16" in done.stderr


def test_a_copy_of_the_model_is_the_same_model(tiny_llama, tmp_path):
    """Its scores and saved responses count; those of edited weights of the same size do not."""
    from grath.modeling.loading import SAMPLE_BYTES, weights_identity
    from grath.pairs.responses import responses_fingerprint

    copy = shutil.copytree(tiny_llama, tmp_path / "copy", copy_function=shutil.copy)  # with another modification time
    fingerprints = [responses_fingerprint(str(model), [[1, 2]], "fp32", 10) for model in (tiny_llama, copy)]
    assert fingerprints[0] == fingerprints[1]
    env = {"TASKS": "grath_mc1", "LIMIT": "2", "SAMPLES": "0"}
    evaluate_here(tiny_llama, tmp_path / "s", env=env)
    assert "is up to date" in evaluate_here(copy, tmp_path / "s", env=env).stdout
    weights = (copy / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(weights[:8], "little")
    tensors = {name: entry for name, entry in json.loads(weights[8:start]).items() if name != "__metadata__"}
    assert any(end - first > 2 * SAMPLE_BYTES for first, end in (one["data_offsets"] for one in tensors.values()))
    identities = {weights_identity(str(copy))}
    for entry in tensors.values():
        for place in (entry["data_offsets"][0], entry["data_offsets"][1] - 1):
            edited = bytearray(weights)
            edited[start + place] ^= 1
            (copy / "model.safetensors").write_bytes(edited)
            identities.add(weights_identity(str(copy)))
    assert len(identities) == 1 + 2 * len(tensors)
    assert weights_identity(str(tmp_path)) == str(tmp_path)  # without weights, a folder is no other's twin
    assert responses_fingerprint(str(copy), [[1, 2]], "fp32", 10) != fingerprints[0]
    assert "contains scores with weights_sample=" in evaluate_here(copy, tmp_path / "s", env=env, status=2).stderr


def test_a_tag_is_refused_before_anything_is_scored(tiny_llama, tmp_path):
    """A tag is a task of the harness, but has no score."""
    flags = ("--tasks", "grath_mc1", "grath_mc", "--limit", 2)
    done = call_here("grath.evaluation", tiny_llama, tmp_path / "s", *flags, status=2)
    assert done.stderr.endswith("grath_mc is not a task with a score of its own: name its members in TASKS\n")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("backend", ["hf", "hf-shared"])
def test_log_likelihoods_that_are_no_numbers_are_no_score(tiny_llama, tmp_path, backend):
    """The harness would count the first choice of every question, the right one: MC1 100."""
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(tiny_llama, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    flags = ("--tasks", "grath_mc1", "grath_mc2", "--limit", 2, "--backend", backend)
    done = call_here("grath.evaluation", broken, tmp_path / "s", *flags, status=2)
    assert "computes NaN instead of log-likelihoods" in done.stderr and not list((tmp_path / "s").glob("*.json"))


def test_other_metrics_may_be_no_numbers():
    """Some tasks of the harness give NaN for the questions that a metric does not apply to."""
    from grath.evaluation.results import check_numbers

    row = {"filtered_resps": [(-1.5, False), (-2.0, False)], "acc": 1.0, "bias": (1, torch.nan)}
    check_numbers({"a": [row], "text": [{"filtered_resps": ["yes"], "exact_match": 1.0}]})
    with pytest.raises(UserError, match="a: the model computes NaN"):
        check_numbers({"a": [row | {"acc": torch.nan}]})


def test_questions_are_logged_of_a_task_that_has_its_score(tiny_llama, tmp_path):
    score = (tiny_llama, tmp_path, "--tasks", "grath_mc1", "--limit", 2)
    call_here("grath.evaluation", *score)
    assert not (tmp_path / "samples_grath_mc1.jsonl").exists()
    call_here("grath.evaluation", *score, "--log_samples")
    assert len(rows(tmp_path / "samples_grath_mc1.jsonl")) == 2
    assert "is up to date" in call_here("grath.evaluation", *score, "--log_samples").stdout
    # A group has a file for each member; that of another task with such a name is none of them.
    from grath.evaluation.results import sample_files

    groups = {"mmlu": ["stem"], "stem": ["physics", "algebra"], "physics": []}
    (tmp_path / "mmlu.json").write_text(json.dumps({"group_subtasks": groups}))
    names = {file.name for file in sample_files(tmp_path, "mmlu")}
    assert names == {"samples_physics.jsonl", "samples_algebra.jsonl"}
    assert [file.name for file in sample_files(tmp_path, "grath_mc1")] == ["samples_grath_mc1.jsonl"]


def test_processes_share_the_processors(tmp_path):
    """What evaluation.sh launches, where its check in one process, of a `python` that does nothing, has passed."""
    (tmp_path / "python").write_text("#!/bin/sh\n")
    (tmp_path / "python").chmod(0o755)
    env = {"NUM_PROCESSES": "2", "DRY_RUN": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    launch = ["accelerate", "launch", "--quiet", "--config_file", f"{PROJECT}/accelerate_configs/data_parallel.yaml"]
    for threads, share in (("6", "3"), ("1", "1")):
        done = call("evaluation.sh", "m", env={**env, "OMP_NUM_THREADS": threads})
        launch[5:] = ["--num_processes", "2", "--num_cpu_threads_per_process", share]
        assert shlex.split(done.stdout) == [*launch, "-m", "grath.pipeline", "evaluate", "m"]


def test_the_chat_template_is_recorded_and_shown(tiny_llama, tmp_path):
    """It is that of MODEL_TYPE, as in pairs and DPO."""
    from grath.modeling.chat import TEMPLATES

    env = {"TASKS": "grath_mc1", "LIMIT": "2", "CHAT_TEMPLATE": "1", "MODEL_TYPE": "zephyr"}
    done = evaluate_here(tiny_llama, tmp_path / "s", env=env)
    assert "chat template ON" in done.stdout
    assert json.loads((tmp_path / "s" / "grath_mc1.json").read_text())["chat_template"] == TEMPLATES["zephyr"]
    bare = shutil.copytree(tiny_llama, tmp_path / "bare", ignore=shutil.ignore_patterns("chat_template.jinja"))
    dry = {**env, "MODEL_TYPE": "auto", "DRY_RUN": "1"}
    done = evaluate_here(bare, tmp_path / "bare scores", env=dry, status=2)
    assert "the tokenizer has no chat template" in done.stderr
    for changed, shown in (({"CHAT_TEMPLATE": "0"}, "zephyr, not 0"), ({"MODEL_TYPE": "auto"}, "zephyr, not 1")):
        done = evaluate_here(tiny_llama, tmp_path / "s", env={**env, **changed}, status=2)
        assert f"chat_template={shown}: choose another folder" in done.stderr


def test_bad_input_is_refused_before_processes_are_launched(tiny_llama, tmp_path):
    env = {"TASKS": "grath_mc1", "NUM_PROCESSES": "2", "BACKEND": "hf", "DEVICE": "cpu"}
    done = call("evaluation.sh", tiny_llama, tmp_path / "s", env=env, status=2)
    assert len(done.stderr.splitlines()) == 1 and "set NUM_PROCESSES=1" in done.stderr
    done = call_here("grath.evaluation", tiny_llama, tmp_path / "s", "--tasks", "grath_mc1", "--limit", "0", status=2)
    assert "--limit" in done.stderr and not (tmp_path / "s").exists()
    servers = ("--tasks", "grath_mc1", "--server_url", "http://127.0.0.1:9")
    done = call_here("grath.evaluation", tiny_llama, tmp_path / "s", *servers, status=2)
    assert "--server_url needs --backend server" in done.stderr and not (tmp_path / "s").exists()


def test_prefetch_names_what_it_fetches(tmp_path):
    log = tmp_path / "log"
    (tmp_path / "hf").write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >>"{log}"\n')
    (tmp_path / "hf").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    folder = tmp_path / "the hub"
    call("prefetch.sh", folder, "me/model", env=env)
    fetched = log.read_text().splitlines()
    assert len(fetched) == 5
    assert fetched[0] == f"download allenai/ai2_arc --repo-type dataset --local-dir {folder}/allenai/ai2_arc"
    assert fetched[4].startswith(f"download me/model --repo-type model --local-dir {folder}/me/model --include")
    done = call("prefetch.sh", status=2)
    assert done.stderr.startswith("prefetch.sh: error: name a folder")


@pytest.mark.parametrize("ways", [(), ("--ways", "hf", "vllm", "hf-shared")])
def test_the_evaluation_benchmark(ways, tiny_llama):
    done = call(
        sys.executable, PROJECT / "benchmarks" / "evaluation.py", "--model", tiny_llama, "--limit", "3",
        "--tasks", "letters", *ways, env=VLLM_ENV,
    )  # fmt: skip
    table = [line.split() for line in done.stdout.splitlines() if line.startswith("letters")]
    assert [line[1] for line in table] == list(ways[1:] or ("hf", "hf-shared"))
    assert all(0 <= float(line[7]) < 2e-4 for line in table)
    assert done.stdout.count("scores equal") == len(table)


def test_the_evaluation_benchmark_refuses_an_adapter_for_vllm(tiny_llama, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_llama)}))
    (tmp_path / "adapter_model.safetensors").touch()
    script = [sys.executable, PROJECT / "benchmarks" / "evaluation.py", "--ways", "vllm", "--model", tmp_path]
    done = call(*script, env=VLLM_ENV, status=2)
    assert done.stderr.endswith("the way vllm needs a model, not an adapter\n") and done.stderr.count("\n") == 1
