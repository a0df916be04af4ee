"""Pairs from inference servers at the command line, and what a server can do wrong."""

import asyncio
import base64
import json
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from threading import Thread

import pytest
from stand_in.inference_server import InferenceServer
from support import BUNDLED, PROJECT, RESPONSE, asking, call_here, change_weights, pair, rows, save_adapter, wait_for

from grath.common.errors import UserError
from grath.pairs.questions import draw_candidates, load_questions
from grath.serving import client, served
from grath.serving.client import server_urls
from grath.serving.completions import Served, request_completions

KEY = "sk-a-key-that-must-not-leak"


def own_answer(server, ids):
    """An answer for every question: a response that belongs to another prompt is another one."""
    question = server.tokenizer.decode(ids).split("Question: ")[-1].split(" [/INST]")[0]
    return f"Question: {question}\nCorrect answer: Yes, {question}\nIncorrect answer: No."


@pytest.fixture
def serve(tiny_llama, monkeypatch):
    """A function that starts a server of the tiny model, which gets a key; every server ends with the test."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ExitStack() as servers:

        def start(**options):
            server = InferenceServer(**{"model": tiny_llama, **options})
            server.answer = server.answer or partial(own_answer, server)
            return servers.enter_context(server)

        yield start


@pytest.fixture
def quick(monkeypatch):
    """Requests that fail are sent again at once."""
    monkeypatch.setattr(client, "FIRST_WAIT", 0.005)


def command(model, folder, *urls, questions=4, timeout=300):
    flags = ("--precision", "auto", "--engine", "server", "--server_url", *urls, "--server_timeout", timeout)
    return asking(model, folder, *flags, count=questions)


def ask(*arguments, flags=(), status=0, **options):
    return call_here(*command(*arguments, **options), *flags, status=status)


def check_pairs(folder, questions=4):
    """The pair file has each question's own answer."""
    (path,) = folder.glob("*_False.json")
    asked = [row["question"] for row in rows(BUNDLED)[:questions]]
    assert rows(path) == [pair(question, f"Yes, {question}", "No.") for question in asked]


def saved(folder):
    """The indices of the questions whose responses an interrupted run has saved."""
    lines = [line for path in folder.glob(".*.responses*") for line in path.read_text().split("\n")[:-1]]
    return [json.loads(line)[0] for line in lines]


def test_the_file_is_that_of_the_engine(server, tiny_llama, tmp_path):
    """The server gets the token ids of our own prompt, asks greedily, and is compared with the local model first.

    Special tokens of its answer are no text.
    """
    server.answer = lambda ids: f"<s>{RESPONSE}</s>assistant<s>"
    done = ask(tiny_llama, tmp_path / "server", f"{server.url}/v1/")
    call_here(*asking(tiny_llama, tmp_path / "here", count=4))
    (ours,), (theirs,) = ((tmp_path / name).glob("*_False.json") for name in ("server", "here"))
    assert ours.name == theirs.name and ours.read_bytes() == theirs.read_bytes() and len(rows(ours)) == 4
    assert "on the servers has the local weights (the log-probabilities of" in done.stdout
    probe, *asked = server.seen
    assert probe["echo"] and len(asked) == 4
    for body in asked:
        assert body["temperature"] == 0 and body["max_tokens"] == 100 and body["stop_token_ids"]
        assert body["skip_special_tokens"] is False  # those around reasoning are needed
        assert body["presence_penalty"] == 0 and body["repeat_penalty"] == 1  # llama.cpp has defaults of its own
        assert server.tokenizer.decode(body["prompt"]).startswith("<s>[INST] Answer the question below twice")


@pytest.mark.parametrize("flags", [[], ["--useFS"], ["--useGT"], ["--useGT", "--useFS"]], ids=" ".join)
def test_the_prompt_has_what_the_flags_ask_for(server, tiny_llama, tmp_path, flags):
    """Few-shot examples are turns before the question; ground-truth candidates stand in each of its turns."""
    ask(tiny_llama, tmp_path, server.url, questions=1, flags=flags)
    text = server.tokenizer.decode(server.seen[-1]["prompt"])
    turns = 1 + 6 * ("--useFS" in flags)
    assert text.count("Answer the question below twice") == turns
    assert text.count("Candidate correct answer: ") == turns * ("--useGT" in flags)
    right, wrong = draw_candidates(load_questions(data_path=BUNDLED)[0], 0)
    candidates = f"Candidate correct answer: {right}\nCandidate incorrect answer: {wrong}"
    assert (candidates in text) == ("--useGT" in flags)


def test_a_completion_that_was_cut_is_no_pair(serve, tiny_llama, tmp_path):
    server = serve(faults=lambda number: change(finish_reason="length", usage=None) if number > 3 else None)
    done = ask(tiny_llama, tmp_path, server.url)
    assert "2 pairs, 0 with identical answers, of 4 responses; dropped, cut at --max_new_tokens: 2" in done.stdout


def test_several_servers_share_the_questions(serve, tiny_llama, tmp_path):
    servers = [serve(), serve()]
    ask(tiny_llama, tmp_path, *(server.url for server in servers), questions=20)
    asked = [[json.dumps(body["prompt"]) for body in server.seen[1:]] for server in servers]
    assert min(map(len, asked)) > 4 and len({*asked[0], *asked[1]}) == len(asked[0] + asked[1]) == 20
    check_pairs(tmp_path, 20)


@pytest.mark.parametrize("fault", ["drop", 503, "silent", "drip"])
def test_a_lost_server_is_one_line_and_responses_are_kept(serve, tiny_llama, tmp_path, quick, fault):
    asked = lambda: sum(not body.get("echo") for body in server.seen)  # noqa: E731
    server = serve(faults=lambda number: fault if asked() > 3 else None)
    done = ask(tiny_llama, tmp_path, server.url, questions=6, timeout=2, status=1)
    assert f"no response from {server.url} for 2 s" in done.stderr and "asks only what is left" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("create_pair_responses.py: error: ")
    assert len(saved(tmp_path)) == 3
    server.faults = lambda number: None
    before = len(server.seen)
    ask(tiny_llama, tmp_path, server.url, questions=6)
    assert len(server.seen) - before == 1 + 3
    check_pairs(tmp_path, 6)


@pytest.mark.parametrize("response", ['"Correct \\udc80"', "5", "[" * 100_000])
def test_saved_responses_that_cannot_be_written_are_asked_again(serve, tiny_llama, tmp_path, quick, response):
    server = serve(faults=lambda number: 400 if number > 3 else None)
    ask(tiny_llama, tmp_path, server.url, status=2)
    (path,) = tmp_path.glob(".*.responses*")
    path.write_text(f"{path.read_text()}[3, {response}]\n")
    server.faults = lambda number: None
    assert "Discarding saved responses that are damaged" in ask(tiny_llama, tmp_path, server.url).stdout
    check_pairs(tmp_path)


def test_a_server_dies_in_the_middle_and_comes_back(serve, tiny_llama, tmp_path):
    first, again = serve(faults=lambda number: "silent" if number > 11 else None), []

    def restart():
        wait_for(lambda: len(first.seen) >= 21)
        first.stop()
        again.append(serve(port=first.port))

    thread = Thread(target=restart)
    thread.start()
    ask(tiny_llama, tmp_path, first.url, questions=20)
    thread.join()
    assert first.served - 1 == 10 and again[0].served == 10
    check_pairs(tmp_path, 20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle(serve, tiny_llama, tmp_path, number):
    server = serve(faults=lambda number: "silent" if number > 4 else None)
    script, *flags = map(str, command(tiny_llama, tmp_path, server.url, questions=6))
    started = [sys.executable, PROJECT / script, *flags]
    with subprocess.Popen(started, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: len(saved(tmp_path)) == 3)
        process.send_signal(number)
        error = process.communicate(timeout=120)[1]
    said = "interrupted" if number == signal.SIGINT else "ended by SIGTERM"
    assert (process.returncode, error.splitlines()[-1]) == (128 + number, f"create_pair_responses.py: {said}"), error
    assert len(saved(tmp_path)) == 3
    ask(tiny_llama, tmp_path, serve().url, questions=6)
    check_pairs(tmp_path, 6)


def test_a_refused_request_names_the_reason(serve, tiny_llama, tmp_path, monkeypatch):
    server = serve(faults=lambda number: 400 if number > 2 else None)
    done = ask(tiny_llama, tmp_path, server.url, status=2)
    assert "refuses the request (HTTP 400): (a text with the API key)" in done.stderr
    monkeypatch.setenv("OPENAI_API_KEY", "a\nb")
    assert "a line break" in ask(tiny_llama, tmp_path, server.url, status=2).stderr
    assert server.keys == {f"Bearer {KEY}"}
    said = done.stdout + done.stderr + "".join(path.read_text() for path in tmp_path.iterdir())
    assert KEY not in said


def change(**parts):
    """Change parts of a response, those of its choice too."""

    def fault(response):
        (choice,) = response["choices"]
        for name, value in parts.items():
            (choice if name in ("text", "finish_reason", "index") else response)[name] = value

    return fault


WRONG = {
    b'{"error": {"message": "the engine\\u001b[2J is dead", "code": 500}}': "the engine\\x1b[2J is dead",
    b'{"object": "error", "message": "out of order"}': "(HTTP 200): out of order",
    b" " * 2**19: "bytes, too many for a response",
    change(model="mistral-7b"): "answers with another model, mistral-7b",
    change(model=["mistral"]): "answers with another model, list",
    change(usage={"prompt_tokens": 7}): "tokens of a prompt (7)",
    change(usage={"prompt_tokens": "all"}): "tokens of a prompt (all)",
    change(text=["a"]): "not text",
    change(finish_reason="length", usage={"completion_tokens": 3}): "ends completions at another length than",
    change(usage={"completion_tokens": 10**400}): "ends completions at another length than",
    change(finish_reason="content_filter"): "filters completions",
    change(text=f"my key is {KEY.upper()}"): "the API key",
    change(index=1): "completions other than",
    change(choices=[{"text": "a"}, {"text": "b"}]): "completions other than",
}


@pytest.mark.parametrize("fault", WRONG, ids=WRONG.values())
def test_a_wrong_response_is_one_line(serve, tiny_llama, tmp_path, fault):
    server = serve(faults=lambda number: fault if number == 3 else None)
    done = ask(tiny_llama, tmp_path, server.url, status=2)
    last = done.stderr.strip().splitlines()[-1]
    assert WRONG[fault] in last and server.url in last and "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr and KEY not in last and len(last) < 700 and len(saved(tmp_path)) < 4


PASSING = (
    *("drop", 429, 500, 503, "cut"),  # lost, busy, broken, starting, half of the JSON
    change(finish_reason="abort"),
    change(finish_reason={"type": "error"}),
    change(text="Correct answer: \udc00\nIncorrect answer: b"),
    change(choices=[]),
    change(choices=None),
    b'{"choices": [{"text": "' + b"\xff" + b'"}]}',
    *(529, 522),  # overloaded, and lost behind a proxy
    b'{"error": {"message": "overloaded", "code": 503}}',
    b'{"error": {"message": "too many", "code": "429"}}',
    b'{"object": "error", "message": "starting", "code": 502}',
    b'{"choices": [{"text": "Correct answer: \xed\xa0\x80\nIncorrect answer: b"}]}',
    json.dumps({"choices": [{"text": "yes"}]}).encode("utf-16"),
    b"[" * 100_000,
    b"null",
    b"",
)


def test_what_passes_is_waited_for_and_asked_again(serve, tiny_llama, tmp_path, quick):
    """Every second request fails, the probe too. The other responses leave out something, or name it otherwise."""
    fine = (
        change(index=None, usage=None, finish_reason="stop"),
        change(usage={"prompt_tokens": None, "completion_tokens": "x"}, finish_reason=None),
        change(model=tiny_llama.name, finish_reason="stop"),  # the last part of the model's name
    )
    kinds = (cycle(fine), cycle(PASSING))
    server = serve(faults=lambda number: next(kinds[number % 2]))
    ask(tiny_llama, tmp_path, server.url, questions=30)
    check_pairs(tmp_path, 30)


def test_a_redirect_is_not_followed(serve, tiny_llama, tmp_path):
    other, server = serve(), serve(faults=lambda number: b"" if number == 2 else None)
    server.headers, server.status = {"Location": f"{other.url}/v1/completions?key={KEY}"}, 308
    done = ask(tiny_llama, tmp_path, server.url, status=2)
    assert "redirects to (a text with the API key), which is not" in done.stderr and not other.seen


def test_a_long_queue_is_no_failure():
    """Each response comes after 0.3 s, so that the last request waits longer than the time-out."""
    turn, asked, answers = asyncio.Lock(), [], []

    async def answer(index):
        asked.append(index)
        async with turn:
            await asyncio.sleep(0.3)
        return index

    asyncio.run(client.send_all([("a", answer)] * 5, 5, 0.8, lambda *found: answers.append(found)))
    assert sorted(answers) == [(i, i) for i in range(5)] and len(asked) == 5


ESCAPED = {
    "json": lambda key: "".join(f"\\u{ord(c):04x}" for c in key),
    "url": lambda key: "".join(f"%{ord(c):02X}" for c in key),
    "base64": lambda key: base64.b64encode(f"Bearer {key}".encode()).decode(),
    "upper": str.upper,
    "hex": lambda key: key.encode().hex(),
    "twice in a URL": lambda key: "".join(f"%25{ord(c):02X}" for c in key),
    "HTML": lambda key: "".join(f"&#{ord(c)};" for c in key),
    "apart": "\u200b".join,
    "lines": lambda key: base64.encodebytes(f"Bearer user:{key} {key}".encode()).decode(),
}


@pytest.mark.parametrize("form", ESCAPED)
def test_the_key_is_hidden_in_every_form(serve, tiny_llama, tmp_path, form):
    """In the names of models, and in an error that is not JSON."""
    hidden, server = ESCAPED[form](KEY), serve()
    server.listed = lambda header: json.dumps({"data": [{"id": f"\x1b]0;{header} {hidden}"}]})
    done = ask(tiny_llama, tmp_path, server.url, status=2)
    server.listed = None
    server.faults, server.status = lambda number: f"<p>{hidden}</p>".encode(), 400
    done = done.stderr + ask(tiny_llama, tmp_path, server.url, status=2).stderr
    assert done.count("(a text with the API key)") == 2
    assert KEY not in done and hidden not in done and base64.b64encode(KEY.encode()).decode()[4:-4] not in done


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b" " * 2**22, "too many for a response"),
        (b'{"data": ' + b"[" * 100_000, "lists no models"),
        (b'{"data": [{"id": 1}]}', "lists no models"),
        (b'{"error": "' + b"a" * 2**12 + b'"}', "refuses the request"),
    ],
    ids=("large", "deep", "number", "error"),
)
def test_a_wrong_list_of_models_is_one_line(serve, tiny_llama, tmp_path, body, said):
    server = serve()
    server.listed = lambda header: body
    last = ask(tiny_llama, tmp_path, server.url, status=2).stderr.strip().splitlines()[-1]
    assert said in last and len(last) < 600


def test_another_model_is_refused(serve, tiny_llama, tmp_path):
    def changed(name, change):
        folder = shutil.copytree(tiny_llama, tmp_path / name)
        change_weights(folder, lambda weights: weights | {"lm_head.weight": change(weights["lm_head.weight"])})
        return folder

    # The second one would generate the same tokens, with less confidence.
    other, similar = changed("other", lambda weight: weight.flip(0)), changed("similar", lambda weight: 0.3 * weight)
    other_weights, similar_weights = (serve(model=folder, name=str(tiny_llama)) for folder in (other, similar))
    other_tokens, unknown = serve(), serve(prompt_logprobs=False)
    other_tokens._text = lambda token: other_tokens.tokenizer.decode([token + 1])
    unknown._text = lambda token: "never a token"
    for server, said in (
        (other_weights, "has different weights from"),
        (similar_weights, "has different weights from"),
        (unknown, "has different weights from"),
        (other_tokens, "has a different vocabulary from"),
        (serve(model=other, name="other"), f"serves other, not {tiny_llama}"),
    ):
        done = ask(tiny_llama, tmp_path / "out", server.url, status=2)
        assert said in done.stderr and len(server.seen) <= 2 and not (tmp_path / "out").exists()


def test_another_folder_of_the_same_name_is_refused_if_the_weights_cannot_be_compared(
    serve, tiny_llama, tmp_path, monkeypatch
):
    elsewhere = serve(model=shutil.copytree(tiny_llama, tmp_path / "elsewhere" / tiny_llama.name))
    ask(tiny_llama, tmp_path / "a", elsewhere.url)
    monkeypatch.setattr(served, "has_local_weights", lambda name: False)
    done = ask(tiny_llama, tmp_path / "b", elsewhere.url, status=2)
    assert f"serves {elsewhere.folder}, not {tiny_llama}" in done.stderr


def test_the_same_model_is_recognized(serve, tiny_llama, tmp_path):
    """By the folder that it was loaded from; and without log-probabilities of prompts, by one token."""
    done = ask(tiny_llama, tmp_path, serve(name="other", prompt_logprobs=False).url)
    assert "other on the servers has the local weights (the log-probabilities of 1 tokens" in done.stdout
    check_pairs(tmp_path)


def test_a_server_that_does_not_answer_is_left_out(serve, tiny_llama, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(served, "FIRST_TIMEOUT", 0.5)
    dead = "http://127.0.0.1:9"
    done = ask(tiny_llama, tmp_path, dead, serve().url)
    assert f"Going on without {dead}: no response" in done.stderr
    check_pairs(tmp_path)
    done = ask(tiny_llama, tmp_path / "none", dead, timeout=1, status=1)
    assert f"no response from {dead}" in done.stderr


def test_an_adapter_is_loaded_and_unloaded(serve, tiny_llama, tmp_path):
    adapter, server = save_adapter(tiny_llama, tmp_path / "adapter", target_modules=["q_proj"]), serve()
    ask(adapter, tmp_path / "a", server.url)
    (name,) = {body["model"] for body in server.seen}
    assert name.startswith("grath-") and server.adapters == {}
    # A server that was restarted in the middle has lost the adapter.
    forget = serve(faults=lambda number: forget.adapters.clear() or 500 if number == 3 else None)
    ask(adapter, tmp_path / "b", forget.url, questions=6, flags=("--batch_size", 2))
    check_pairs(tmp_path / "b", 6)
    plain, broken = serve(loras=False), serve()
    broken.load_status = 500
    for server in (plain, broken):
        done = ask(adapter, tmp_path / "c", server.url, status=2)
        assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in done.stderr and "grath.export" in done.stderr
    # One that can, next to one that cannot: nothing is left on the first. One that was loaded before is left alone.
    ask(adapter, tmp_path / "c", forget.url, broken.url, status=2)
    assert forget.adapters == {}
    forget.adapters = {name: str(adapter)}
    ask(adapter, tmp_path / "d", forget.url)
    assert forget.adapters


@pytest.mark.parametrize(
    ("url", "said"),
    [
        *((url, "is not a server's address") for url in ("http://", "http://host:port", "http://a..b")),
        *((url, "is not a server's address") for url in (f"http://{'a' * 70}", "http://a b", "http://a:0")),
        (f"http://host:8000/{KEY}", "may contain no password"),
        *((url, "may contain no password") for url in ("http://name:secret@host:80OO/?x=1", "name:secret@host")),
    ],
)
def test_addresses(url, said, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(UserError, match=said) as raised:
        server_urls([url])
    assert "secret" not in str(raised.value) and KEY not in str(raised.value)


@pytest.mark.parametrize("key", ["EMPTY", "not-needed", "12345678", ""])
def test_a_placeholder_is_no_key(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert not client.contains_key("It is not needed: 1, 2, 3, 4, 5, 6, 7, 8, empty.")


def test_text_of_a_server_is_searched_in_linear_time(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for text in ("\\", "%25", "&#", "%", "s", "sk-"):
        assert len(client.show(text * 2**20)) == client.MOST_SHOWN


def test_three_hundred_requests_at_once(serve):
    """The server answers none before it has all of them."""
    server = serve(answer=lambda ids: str(ids[0]))
    server.hold = 300
    found = request_completions(Served((server.url,), server.name, timeout=60), [{"prompt": [i]} for i in range(300)])
    assert sorted((i, response["choices"][0]["text"]) for i, response in found) == [(i, str(i)) for i in range(300)]
