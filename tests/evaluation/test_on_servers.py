"""Scores from inference servers: `BACKEND=server` gives what `hf-shared` gives, and refuses what would give chance."""

import json
import shutil

import pytest
from stand_in.inference_server import InferenceServer
from support import RESPONSE, call, call_here, evaluate_here

TASKS = ("grath_mc1", "grath_mc2")


@pytest.fixture
def server(tiny_llama):
    with InferenceServer(tiny_llama, answer=lambda ids: RESPONSE) as server:
        yield server


def settings(server, **more):
    return {"SERVER_URL": server.url, "TASKS": " ".join(TASKS), "LIMIT": "6", "SERVER_TIMEOUT": "20", **more}


def results(folder):
    return {task: json.loads((folder / f"{task}.json").read_text()) for task in TASKS}


def test_scores_are_those_of_hf_shared(server, tiny_llama, tmp_path):
    """Also with a server that fails now and then. The files are the same ones, samples included."""
    server.faults = lambda number: ("drop", 500, 429, "cut")[number % 4] if number % 7 == 0 else None
    done = call("evaluation.sh", tiny_llama, tmp_path / "server", env=settings(server, BACKEND="server"))
    assert "on the servers has the local weights" in done.stdout
    call_here(
        "grath.evaluation", tiny_llama, tmp_path / "here", "--tasks", *TASKS, "--limit", 6, "--precision", "fp32",
        "--samples",
    )  # fmt: skip
    ours, theirs = results(tmp_path / "server"), results(tmp_path / "here")
    for task in TASKS:
        assert ours[task]["results"][task]["acc,none"] == pytest.approx(
            theirs[task]["results"][task]["acc,none"], abs=1e-4
        )
        assert ours[task]["config"]["model"] == "server"
    names = [{path.name for path in (tmp_path / folder).iterdir()} for folder in ("server", "here")]
    assert names[0] == names[1]
    assert "backend=server" in (tmp_path / "server" / "settings.txt").read_text()
    # The token ids are ours, with one BOS.
    scored = [body["prompt"][0] for body in server.seen if body.get("echo")][1:]
    bos = server.tokenizer.bos_token_id
    assert scored and all(ids[0] == bos and bos not in ids[1:] for ids in scored)


def test_the_chat_template_has_one_bos(server, tiny_llama, tmp_path):
    evaluate_here(tiny_llama, tmp_path, env=settings(server, CHAT_TEMPLATE="1", SAMPLES="0", LIMIT="2"))
    scored = [body["prompt"][0] for body in server.seen][1:]
    bos = server.tokenizer.bos_token_id
    assert scored and all(ids[0] == bos and ids[1] != bos for ids in scored)
    assert json.loads((tmp_path / "grath_mc1.json").read_text())["chat_template"]


def test_an_adapter_is_scored_by_its_own_name(llama_run, tmp_path):
    run, of_run, _ = llama_run
    (adapter,) = run.glob("models/iter_2_*")
    with InferenceServer(of_run["MODEL_NAME_OR_PATH"]) as server:
        evaluate_here(adapter, tmp_path, env=settings(server, LIMIT="3", SAMPLES="0"))
        assert {body["model"][:6] for body in server.seen} == {"grath-"} and server.adapters == {}
    for task in TASKS:
        expected = json.loads((run / "results" / "iter_2" / f"{task}.json").read_text())["results"][task]["acc,none"]
        assert results(tmp_path)[task]["results"][task]["acc,none"] == pytest.approx(expected, abs=1e-4)


def test_a_server_without_log_probabilities_of_prompts_is_refused(tiny_llama, tmp_path):
    """As llama.cpp's: the harness would score chance without a word."""
    for prompt_logprobs in (False, "constant"):
        with InferenceServer(tiny_llama, prompt_logprobs=prompt_logprobs) as server:
            done = evaluate_here(tiny_llama, tmp_path, env=settings(server), status=2)
        assert f"{server.url} returns no log-probabilities for the tokens of a prompt" in done.stderr
        assert "Traceback" not in done.stderr and not list(tmp_path.glob("*.json"))


def test_a_context_that_the_server_would_cut_is_refused(server, tiny_llama, tmp_path):
    server.window = 20
    done = evaluate_here(tiny_llama, tmp_path, env=settings(server), status=2)
    assert "tokens, and the server takes 19: start it with a larger maximum length" in done.stderr
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("said", [20, None])
def test_a_context_that_the_model_itself_would_cut_is_refused(tiny_llama, tmp_path, said):
    """Servers take no more than the model's own window, so a larger one would be no help."""
    short = shutil.copytree(tiny_llama, tmp_path / "short")
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 20}
    (short / "config.json").write_text(json.dumps(config))
    with InferenceServer(tiny_llama, name=str(short)) as server:
        server.window = said
        done = evaluate_here(short, tmp_path / "s", env=settings(server), status=2)
    assert "the server takes 19: score this task with BACKEND=hf-shared" in done.stderr


def test_a_model_whose_weights_only_the_server_has(tiny_llama, tmp_path):
    """With no more requests in flight than EVAL_BATCH_SIZE."""
    bare = shutil.copytree(tiny_llama, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with InferenceServer(tiny_llama, name=str(bare)) as server:
        env = settings(server, EVAL_BATCH_SIZE="3", SAMPLES="0")
        # After the probe, three requests wait for each other.
        server.faults = lambda number: setattr(server, "hold", 4 if number > 1 else 0)
        evaluate_here(bare, tmp_path / "server", env=env)
        assert server.most_at_once == 3
    call_here("grath.evaluation", tiny_llama, tmp_path / "here", "--tasks", *TASKS, "--limit", 6, "--precision", "fp32")
    for task in TASKS:
        ours, theirs = (results(tmp_path / name)[task]["results"][task]["acc,none"] for name in ("server", "here"))
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_bad_settings(server, tiny_llama, tmp_path):
    for env, said in (
        ({"BACKEND": "server"}, "BACKEND=server needs SERVER_URL=http://host:port"),
        ({"SERVER_URL": "localhost:8000"}, "no address of a server"),
    ):
        done = evaluate_here(tiny_llama, tmp_path, env={"TASKS": "grath_mc1", **env}, status=2)
        assert said in done.stderr and not list(tmp_path.iterdir())


def test_a_lost_server_is_one_line(server, tiny_llama, tmp_path):
    server.faults = lambda number: 503 if number > 3 else None
    env = settings(server, SERVER_TIMEOUT="2", SAMPLES="0")
    done = evaluate_here(tiny_llama, tmp_path, env=env, status=1)
    assert f"no response from {server.url} for 2 s (HTTP 503" in done.stderr and "Traceback" not in done.stderr
