"""Models and tokenizers that would give wrong scores: refused, or named in the record and in the report."""

import copy
import json
import math
import re
import shutil

import pytest
from safetensors.torch import load_file
from support import (
    BUNDLED,
    PROJECT,
    asking,
    call_here,
    change_json,
    change_weights,
    check_here,
    rows,
    stages,
    write_rows,
)
from transformers import AutoTokenizer

from grath.common.errors import UserError
from grath.evaluation.results import mend_underflow
from grath.evaluation.run import _apply_chat_template
from grath.evaluation.tasks import task_manager
from grath.modeling.identity import model_identity, tokenizer_identity
from grath.modeling.loading import resolve_base_and_adapter


def score(model, folder, *flags, **options):
    return call_here("grath.evaluation", model, folder, "--limit", 2, *flags, **options)


@pytest.mark.parametrize("backend", ["hf", "hf-shared"])
def test_contexts_that_are_cut_are_counted(model, hub, tmp_path, backend):
    change_json(model / "config.json", max_position_embeddings=300)
    done = score(model, tmp_path / "s", "--tasks", "arc_challenge", "grath_mc1", "--backend", backend, cwd=hub)
    # Two questions, each with 25 examples before it.
    assert "Warning: arc_challenge: 2 contexts exceed the model's window, and are cut on the left" in done.stdout
    assert "Warning: grath_mc1" not in done.stdout
    assert call_here("grath.report", tmp_path / "s").stdout.count("2 contexts cut") == 1


def test_mc2_of_very_unlikely_answers_is_a_number(model, hub, tmp_path):
    change_weights(model, lambda weights: {**weights, "lm_head.weight": 2000 * weights["lm_head.weight"]})
    score(model, tmp_path / "s", "--tasks", "truthfulqa_mc1", "truthfulqa_mc2", "--log_samples", cwd=hub)
    expected = []
    for row in rows(tmp_path / "s" / "samples_truthfulqa_mc2.jsonl"):
        yes, no = (float(answer[0]) for answer in row["filtered_resps"])
        assert max(yes, no) < -800
        expected.append(1 / (1 + math.exp(min(700, no - yes))))
    found = json.loads((tmp_path / "s" / "truthfulqa_mc2.json").read_text())
    assert found["results"]["truthfulqa_mc2"]["acc,none"] == pytest.approx(sum(expected) / 2)
    assert found["questions"]["scores"] == pytest.approx(expected, abs=1e-6)


def test_a_tokenizer_that_adds_a_token_after_every_text_is_refused(model, tmp_path):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    ids = [token["id"] for token in tokenizer["added_tokens"] if token["content"] == "</s>"]
    tokenizer["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": ids, "tokens": ["</s>"]}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = score(model, tmp_path / "s", "--tasks", "grath_mc1", status=2)
    assert "the tokenizer adds '</s>' after every text" in done.stderr and not (tmp_path / "s").exists()
    # TRL would put a second EOS after the answers of such a set.
    (tmp_path / "prefs").mkdir()
    write_rows(tmp_path / "prefs" / "train.jsonl", [{"prompt": "Ice is", "chosen": " cold.", "rejected": " hot."}])
    flags = ("--dataset_name", "prefs", "--model_name_or_path", model, "--output_dir", tmp_path / "d")
    done = call_here("dpo.py", *flags, "--precision", "fp32", status=2, cwd=tmp_path)
    assert "the tokenizer adds '</s>' after every text" in done.stderr and not (tmp_path / "d").exists()


def commands(model, pair_file, folder):
    found = stages(model, pair_file, folder)
    return [*found.values(), (*found["s"], "--backend", "hf")]


def test_tokens_without_an_embedding_and_missing_weights_are_refused(model, pair_file, tmp_path):
    whole = load_file(model / "model.safetensors")
    heads = ("model.embed_tokens.weight", "lm_head.weight")
    change_json(model / "config.json", vocab_size=100)
    change_weights(model, lambda weights: weights | {name: weights[name][:100].clone() for name in heads})
    env = {"MODEL_NAME_OR_PATH": str(model), "DATA_PATH": str(BUNDLED), "TASKS": "", "NUM_QUERY": "2"}
    assert "FAIL  chat template: " in check_here(env, status=2).stdout
    for command in commands(model, pair_file, tmp_path):
        assert "has 100 embeddings and none for the token" in call_here(*command, status=2).stderr
    change_json(model / "config.json", vocab_size=len(whole["lm_head.weight"]))
    change_weights(model, lambda _: {name: weight for name, weight in whole.items() if "layers.1.mlp" not in name})
    for command in commands(model, pair_file, tmp_path):
        done = call_here(*command, status=2)
        assert "lacks 3 weights, starting with model.layers.1.mlp.down_proj.weight" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"model", "s"}  # neither pairs nor an adapter


def test_weights_that_are_not_used_are_a_warning_in_the_record(model, pair_file, tmp_path):
    change_weights(model, lambda weights: {**weights, "model.old.weight": weights["lm_head.weight"][:2].clone()})
    warning = f"{model} has 1 unused weights, starting with model.old.weight"
    for command in stages(model, pair_file, tmp_path).values():
        assert f"Warning: {warning}" in call_here(*command).stdout
    for record in ("p_num_2_useGT_False_useFS_False.json.record.json", "d/grath.json", "s/settings.json"):
        assert warning in json.loads((tmp_path / record).read_text())["warnings"]


def test_a_token_that_only_the_chat_template_has(model, pair_file, tmp_path):
    """Its id is one after the last embedding. Scores without the template are possible, sample answers are not."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|ask|>"]})
    tokenizer.chat_template = "<|ask|>{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(model)
    shutil.copy(pair_file, tmp_path / "pairs.json")
    scores = stages(model, None, tmp_path)["s"]
    for command in [
        (*scores, "--chat_template"),
        ("grath.distance", tmp_path / "pairs.json", "--model_name_or_path", model),
    ]:
        assert "none for the token '<|ask|>'" in call_here(*command, status=2).stderr
    assert "no sample answers: " in call_here(*scores, "--samples").stdout
    assert (tmp_path / "s" / "grath_mc1.json").is_file() and not (tmp_path / "s" / "samples.jsonl").exists()


def test_files_of_a_model_with_other_types(model, tmp_path):
    for content, said in {
        '{"eos_token_id": "x"}': "eos_token_id is ['x']",
        '{"eos_token_id": [[1]]}': "eos_token_id is [[1]]",
        '{"eos_token_id": ': "generation_config.json is damaged",
    }.items():
        (model / "generation_config.json").write_text(content)
        assert said in call_here(*asking(model, tmp_path / "p"), status=2).stderr
    (model / "chat_template.jinja").unlink()
    change_json(model / "tokenizer_config.json", chat_template=5)
    assert "no chat template" in call_here(*asking(model, tmp_path / "p"), status=2).stderr


def test_what_belongs_to_a_model(model, tmp_path):
    """Results in its folder do not; a broken link is named; a separate tokenizer needs no model."""
    tokenizer = shutil.copytree(model, tmp_path / "tokenizer")
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        (tokenizer / file).unlink()
    ask = asking(model, tmp_path, "--useFS", "--tokenizer_name", tokenizer)
    call_here(*ask)
    (model / "grath_mc1.json").write_text("{}")
    (model / "logs.json").mkdir()
    assert "finished" in call_here(*ask).stdout
    (model / "merges.txt").symlink_to("nowhere")
    assert "merges.txt is a link to a file that does not exist" in call_here(*ask, status=2).stderr


def test_weights_that_are_quantized_already_are_refused(model, pair_file, tmp_path):
    """They would be computed in other precisions than the record says."""
    change_json(model / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    for command in commands(model, pair_file, tmp_path):
        assert "is quantized already" in call_here(*command, status=2).stderr, command
    done = check_here({"MODEL_NAME_OR_PATH": str(model), "DATA_PATH": str(BUNDLED), "TASKS": ""}, status=2)
    assert "FAIL  model: " in done.stdout and "is quantized already" in done.stdout


def test_an_adapter_on_the_hub_is_not_taken_for_a_model(model, monkeypatch):
    """Its repository may contain a model's configuration and tokenizer too."""
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: str(model / "config.json"))
    with pytest.raises(UserError, match="me/lora is a LoRA adapter: run `hf download me/lora"):
        resolve_base_and_adapter("me/lora")


def test_what_else_belongs_to_a_model(model, tmp_path):
    """A tokenizer of Mistral's, weights in a folder that the index names; an adapter's own tokenizer."""
    before = model_identity(str(model))["base"]
    (model / "tekken.json").write_text("{}")
    (model / "parts").mkdir()
    (model / "model.safetensors").rename(model / "parts" / "model.safetensors")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "parts/model.safetensors"}}')
    after = model_identity(str(model))["base"]
    assert after["parts/model.safetensors"] == before["model.safetensors"] and "tekken.json" in after
    (model / "adapter_config.json").write_text("{}")  # a tokenizer can come from an adapter's folder
    assert tokenizer_identity(model) == after


def test_a_model_that_computes_nan_writes_no_pairs_and_no_distance(model, pair_file, tmp_path):
    change_weights(model, lambda weights: {**weights, "model.norm.weight": weights["model.norm.weight"] * math.nan})
    for engine in ("shared_prefix", "generate"):
        done = call_here(*asking(model, tmp_path / "p", "--engine", engine), status=2)
        assert "the model computes NaN" in done.stderr and not list((tmp_path / "p").glob("*_False.json"))
    shutil.copy(pair_file, tmp_path / "pairs.json")
    done = call_here("grath.distance", tmp_path / "pairs.json", "--model_name_or_path", model, status=2)
    assert "computes NaN: its weights are broken" in done.stderr


def test_subnormal_probabilities_are_no_score():
    targets = {"mc2_targets": {"labels": [1, 0]}}
    rows = [{"filtered_resps": [(-744.4, 0), (-745.2, 0)], "acc": 1.0, "doc": targets}]
    samples = {task: copy.deepcopy(rows) for task in ("truthfulqa_mc2", "truthfulqa_es_mc2", "truthfulqa_mc1")}
    results = {task: {} for task in samples}
    mend_underflow(samples, results)
    expected = {"acc,none": pytest.approx(1 / (1 + math.exp(-0.8))), "acc_stderr,none": "N/A"}
    assert [*results.values()] == [expected, expected, {}]


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A function that makes the task `texts`, which generates so many tokens."""
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setattr("grath.evaluation.tasks.OWN_TASKS", own)
    write_rows(own / "q.jsonl", [{"question": "What is ice, and what is it not?"}] * 2)

    def put(tokens):
        (own / "texts.yaml").write_text(
            f"task: texts\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {own}/q.jsonl\n"
            "test_split: test\noutput_type: generate_until\ndoc_to_text: question\ndoc_to_target: question\n"
            f"generation_kwargs:\n  until: []\n  max_new_tokens: {tokens}\nmetric_list:\n  - metric: exact_match\n"
        )

    return put


def test_a_task_that_generates(texts, model, server, tmp_path):
    """Contexts that are cut are counted; without room for a context, the harness refuses the task, as servers do."""
    change_json(model / "config.json", max_position_embeddings=40)
    texts(35)
    done = score(model, tmp_path / "s", "--tasks", "texts")
    assert "Warning: texts: 2 contexts exceed the model's window" in done.stdout
    texts(40)
    done = score(model, tmp_path / "t", "--tasks", "texts", status=2)
    assert "error: texts: the harness cannot score this: " in done.stderr and done.stderr.count("error") == 1
    of_server = ("--tasks", "texts", "--server_url", server.url)
    texts(4096)
    done = score(server.folder, tmp_path / "u", *of_server, status=2)
    tokens = int(re.search(r"has (\d+) tokens, and the server takes 4095", done.stderr)[1])
    for most, status in ((8192 - tokens, 2), (8191 - tokens, 0)):
        texts(most)
        score(server.folder, tmp_path / "u", *of_server, status=status)
    assert server.seen[-1]["max_tokens"] == most


def test_a_group_without_an_average_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("grath.evaluation.tasks.OWN_TASKS", tmp_path)
    shutil.copy(PROJECT / "tasks" / "grath_mc1.yaml", tmp_path)
    group = "group: mine\ntask:\n  - grath_mc1\n"
    (tmp_path / "mine.yaml").write_text(group)
    with pytest.raises(UserError, match="mine is not a task with a score of its own"):
        task_manager(["mine"])
    (tmp_path / "mine.yaml").write_text(f"{group}aggregate_metric_list:\n  - metric: acc\n")
    assert task_manager(["mine"])


def test_samples_may_follow_with_another_template(model, tmp_path):
    """As the message says, where the tokenizer has none."""
    (model / "chat_template.jinja").unlink()
    assert "no sample answers: " in score(model, tmp_path / "s", "--tasks", "grath_mc1", "--samples").stdout
    score(model, tmp_path / "s", "--tasks", "grath_mc1", "--samples", "--model_type", "llama2")
    assert (tmp_path / "s" / "samples.jsonl").is_file()


def test_a_template_without_system_turns_scores_a_task_with_one(tiny_llama):
    template = "{{ raise_exception('no') if messages[0].role == 'system' else messages[0].content }}"
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama, chat_template=template)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is ice?"}]
    assert _apply_chat_template(tokenizer, turns) == "What is ice?"


def test_scores_depend_on_the_bundled_questions_and_samples_on_the_template(model, tmp_path, monkeypatch):
    score(model, tmp_path / "s", "--tasks", "grath_mc1", "--samples")
    done = score(model, tmp_path / "s", "--tasks", "grath_mc1", "--samples", "--model_type", "zephyr", status=2)
    assert "was made with samples auto, not zephyr" in done.stderr
    assert "up to date" in score(model, tmp_path / "s", "--tasks", "grath_mc1", "--model_type", "zephyr").stdout
    other = tmp_path / "truthfulness_mc.jsonl"
    other.write_text("{}")
    monkeypatch.setattr("grath.evaluation.run.BUNDLED", other)
    done = score(model, tmp_path / "s", "--tasks", "grath_mc1", "--samples", status=2)
    assert "was made with data truthfulness_mc.jsonl" in done.stderr


def test_a_tokenizer_without_bos_and_eos_is_refused_for_scores(model, tmp_path):
    changes = {"bos_token": None, "eos_token": None, "tokenizer_class": "PreTrainedTokenizerFast"}
    change_json(model / "tokenizer_config.json", **changes)
    assert "neither BOS nor EOS" in score(model, tmp_path / "s", "--tasks", "grath_mc1", status=2).stderr


def test_data_that_is_not_there_is_one_line(model, tmp_path):
    done = score(model, tmp_path / "s", "--tasks", "arc_challenge", cwd=tmp_path, status=2)
    last = done.stderr.strip().splitlines()[-1]
    assert "cannot load allenai/ai2_arc ARC-Challenge: " in last and "Traceback" not in done.stderr
