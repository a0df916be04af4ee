"""The loop with `SERVER_URL`: pairs and scores on a server, DPO here."""

import re

import pytest
from fault_injection import records
from stand_in.inference_server import InferenceServer
from support import call, check_here, rows, score_values

KEY = "sk-a-key-that-must-not-leak"


@pytest.mark.slow
def test_two_iterations(server, llama_run, tmp_path):
    """The run equals one without a server: its pairs byte for byte, its scores to rounding; then nothing is left."""
    run, settings, _ = llama_run
    env = {**settings, "RUNS_DIR": str(tmp_path), "SERVER_URL": server.url, "OPENAI_API_KEY": KEY}
    ready = check_here(env, status=None)
    assert f"ok    servers: {server.url} has {settings['MODEL_NAME_OR_PATH']}, at most 4096 tokens" in ready.stdout
    done = call("run_llama2.sh", env=env)
    ours = tmp_path / "llama2_seed_0"
    for path in [*run.glob("data/*True.json"), *run.glob("data/*_combined.json")]:
        assert (ours / "data" / path.name).read_bytes() == path.read_bytes()
    for number in range(3):
        found, expected = (score_values(one / "results" / f"iter_{number}") for one in (ours, run))
        assert found == pytest.approx(expected, abs=0.1)
        assert len(rows(ours / "results" / f"iter_{number}" / "samples.jsonl")) == 5
    assert server.keys == {f"Bearer {KEY}"}
    written = [path.read_bytes() for path in ours.rglob("*") if path.is_file()]
    assert KEY not in done.stdout + done.stderr and not any(KEY.encode() in content for content in written)
    # M_0 by its name, M_1 and M_2 as adapters; none is left on the server.
    assert len({body["model"] for body in server.seen}) == 3 and server.adapters == {}
    made = {path.relative_to(ours).parts[0]: record for path, record in records(ours).items()}
    assert made["data"]["inputs"]["precision"] == made["results"]["inputs"]["precision"] == "server"
    other = call("run_llama2.sh", env={**env, "SERVER_URL": ""}, status=2)
    assert "precision server, not fp32" in other.stderr and f"{ours}/results/iter_0" in other.stderr


def test_scores_on_this_machine_and_pairs_on_a_server(tiny_llama, tmp_path):
    env = {"SERVER_URL": "http://127.0.0.1:9", "BACKEND": "hf-shared", "TASKS": "grath_mc1", "DRY_RUN": "1"}
    assert "grath_mc1, 0-shot, fp32, hf-shared" in call("evaluation.sh", tiny_llama, tmp_path / "s", env=env).stdout


def test_a_server_that_is_not_there_or_cannot_load_adapters_fails_the_check(tiny_llama, tmp_path):
    dead = "http://127.0.0.1:9"
    with InferenceServer(tiny_llama, loras=False) as server:
        for url, said in ((dead, f"[Errno 110] no response from {dead}"), (server.url, "cannot load adapters")):
            env = {"MODEL_NAME_OR_PATH": str(tiny_llama), "RUNS_DIR": str(tmp_path), "SERVER_URL": url}
            done = check_here(env, status=2)
            assert re.search(f"FAIL  servers: .*{re.escape(said)}", done.stdout)
        # A run that has no adapter for servers does not need it.
        assert "ok    servers: " in check_here({**env, "BACKEND": "hf", "ITERATIONS": "1"}, status=None).stdout
    assert not list(tmp_path.iterdir())
