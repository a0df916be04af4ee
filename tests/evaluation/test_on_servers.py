"""Scores from inference servers: they are what `hf-shared` gives; what would give chance is refused."""

import json
import shutil

import pytest
from stand_in.inference_server import InferenceServer
from support import call_here, change_json, score_values

MC = ("--tasks", "grath_mc1", "grath_mc2")


def score(server, model, folder, *flags, status=0):
    servers = ("--server_url", server.url, "--server_timeout", 300)
    return call_here("grath.evaluation", model, folder, *MC, *servers, "--limit", 3, *flags, status=status)


def check_bos(server):
    """Every request after the probe has one BOS, at its beginning."""
    scored, bos = [body["prompt"][0] for body in server.seen if body.get("echo")][1:], server.tokenizer.bos_token_id
    assert scored and all(ids[0] == bos and bos not in ids[1:] for ids in scored)


def test_scores_are_those_of_hf_shared(server, tiny_llama, scored_once, tmp_path):
    """Also with a server that fails now and then. The files are the same ones, samples included."""
    server.faults = lambda number: ("drop", 500, 429, "cut")[number % 4] if number % 7 == 0 else None
    done = score(server, tiny_llama, tmp_path, "--samples", "--log_samples")
    assert "on the servers has the local weights" in done.stdout
    assert score_values(tmp_path) == pytest.approx(score_values(scored_once), abs=1e-2)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in scored_once.iterdir()}
    inputs = json.loads((tmp_path / "settings.json").read_text())["inputs"]
    assert inputs["backend"] == inputs["precision"] == "server"
    check_bos(server)


def test_the_chat_template_has_one_bos(server, tiny_llama, tmp_path):
    score(server, tiny_llama, tmp_path, "--chat_template")
    check_bos(server)
    assert json.loads((tmp_path / "grath_mc1.json").read_text())["chat_template"]


def test_an_adapter_is_scored_by_its_own_name(llama_run, tmp_path):
    run, of_run, _ = llama_run
    (adapter,) = run.glob("models/iter_2_*")
    with InferenceServer(of_run["MODEL_NAME_OR_PATH"]) as server:
        score(server, adapter, tmp_path)
        assert {body["model"][:6] for body in server.seen} == {"grath-"} and server.adapters == {}
    assert score_values(tmp_path) == pytest.approx(score_values(run / "results" / "iter_2"), abs=1e-2)


def of_logprobs(change):
    """A fault that changes the log-probabilities of a response."""
    return lambda response: change(response["choices"][0]["logprobs"])


def constant(value):
    """A fault that gives every token this log-probability."""
    return of_logprobs(lambda found: found.update(token_logprobs=[None, *(value for _ in found["tokens"][1:])]))


def test_a_server_without_log_probabilities_of_prompts_is_refused(tiny_llama, tmp_path):
    """Such as llama.cpp's: the harness would silently score chance."""
    for options, said in (
        ({"prompt_logprobs": False}, "Only no echo is supported; scores need the log-probabilities of a prompt"),
        ({"faults": lambda number: constant(0.0)}, "returns no log-probabilities for the tokens of a prompt"),
    ):
        with InferenceServer(tiny_llama, **options) as server:
            done = score(server, tiny_llama, tmp_path, status=2)
        assert server.url in done.stderr and said in done.stderr
        assert "Traceback" not in done.stderr and not score_values(tmp_path)


def cut(logprobs):
    for values in logprobs.values():
        del values[1:3]


def replace(name, value):
    return of_logprobs(lambda logprobs: logprobs[name].__setitem__(2, value))


WRONG = {
    "cut": (of_logprobs(cut), "for as many tokens"),
    "none": (lambda response: response["choices"][0].update(logprobs=None), "for as many tokens"),
    "null": (replace("token_logprobs", None), "missing, or no number"),
    "text": (replace("token_logprobs", "-1.5"), "missing, or no number"),
    "nan": (replace("token_logprobs", float("nan")), "missing, or no number"),
    "positive": (replace("token_logprobs", 0.5), "missing, or no number"),
    "huge": (replace("token_logprobs", -(10**400)), "missing, or no number"),
    "constant": (constant(-9999.0), "as the log-probability of every token"),
    "no best": (replace("top_logprobs", {}), "missing, or no number"),
    "best is a list": (replace("top_logprobs", [-1.0]), "missing, or no number"),
    "token": (replace("tokens", "another"), "tokens other than those"),
    "truncated": (lambda response: response["usage"].update(prompt_tokens=30), "tokens of a prompt (30)"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_response_after_the_probe_is_no_score(server, tiny_llama, tmp_path, kind):
    fault, said = WRONG[kind]
    server.faults = lambda number: fault if number > 2 else None
    done = score(server, tiny_llama, tmp_path, status=2)
    assert said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr and not score_values(tmp_path)


@pytest.mark.parametrize(("said", "own"), [(20, 4096), (4096, 20), (None, 20)])
def test_a_context_that_would_be_cut_is_refused(tiny_llama, model, tmp_path, said, own):
    change_json(model / "config.json", max_position_embeddings=own)
    with InferenceServer(tiny_llama, name=str(model)) as server:
        server.window = said
        done = score(server, model, tmp_path / "s", status=2)
    assert "tokens, and the server takes 19: score this task with" in done.stderr and not score_values(tmp_path / "s")


def test_a_model_whose_weights_only_the_server_has(tiny_llama, scored_once, tmp_path):
    """With no more requests in flight than --batch_size."""
    bare = shutil.copytree(tiny_llama, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with InferenceServer(tiny_llama, name=str(bare)) as server:
        in_flight = []

        def watch(number):
            in_flight.append(number - server.served)
            server.hold = 4 if number > 1 else 0  # after the probe, three requests wait for each other

        server.faults = watch
        score(server, bare, tmp_path / "s", "--batch_size", 3)
        assert max(in_flight) == 3
    assert score_values(tmp_path / "s") == pytest.approx(score_values(scored_once), abs=1e-2)
