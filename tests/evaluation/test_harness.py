"""`hf-shared` gives what `hf` gives, and computes less."""

import sys

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from support import BUNDLED, FAMILIES, PROJECT, VLLM_ENV, call, save_adapter, tiny

from grath.common.errors import UserError
from grath.evaluation import harness
from grath.evaluation.harness import SharedContextLM, SplitLM
from grath.evaluation.loglikelihood import truncate_window, window_loglikelihoods
from grath.modeling.loading import load_model
from grath.pairs.questions import load_questions


def both_ways(model, tokenizer, asked, window=None):
    """What `hf-shared` and `hf` return for (context, answer) pairs of token ids."""
    shared = SharedContextLM(model, tokenizer, 4, max_length=window)
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=window)
    ours = shared.score([truncate_window(*pair, shared.max_length) for pair in asked], disable_tqdm=True)
    return ours, plain._loglikelihood_tokens([(None, *pair) for pair in asked], disable_tqdm=True)


def requests(window):
    """(context, answer) requests: shared blocks and beginnings, lone contexts, one token, duplicates, too long ones."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(1, 60, (n,), generator=generator).tolist()  # noqa: E731
    block, other = draw(40), draw(50)
    found = [(block + draw(n), draw(m)) for n in (1, 5, 9) for m in (1, 1, 4)]
    questions = [block + draw(6) for _ in range(4)] + [other + draw(7) for _ in range(3)]
    found += [(question, draw(m)) for question in questions for m in (1, 2, 5)]
    # Equal beginnings of answers in three depths, and an answer that begins another one.
    found += [(q, answer) for q in questions[:2] for answer in ([7, 8, 9, 1], [7], [7, 3], [7, 8, 9, 2, 4], [7, 8])]
    lengths = [(1, 3), (1, 1), (20, 2), (window - 3, 8), (window + 9, 5), (window, 1), (3, window)]
    return [*found, *((draw(n), draw(m)) for n, m in lengths), *found[3:6], *found[:1]]


def same(ours, theirs):
    """Equal scores, to the rounding of float32. A token that saw what it should not changes a score by far more."""
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], rel=1e-5, abs=1e-4)
    # Two best logits that tie within the rounding may change places: no more than one request may hang on that.
    assert sum(a != b for (_, a), (_, b) in zip(ours, theirs, strict=True)) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_hf(llama_tokenizer, family):
    model = tiny(family, max_position_embeddings=300)
    same(*both_ways(model, llama_tokenizer, requests(300), 300))


def test_scores_with_an_adapter_and_in_4_bit(tiny_llama, llama_tokenizer):
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    asked = requests(200)
    base, _ = both_ways(tiny("llama"), llama_tokenizer, asked, 200)
    ours, theirs = both_ways(get_peft_model(tiny("llama"), config).eval(), llama_tokenizer, asked, 200)
    same(ours, theirs)
    assert max(abs(a - b) for (a, _), (b, _) in zip(ours, base, strict=True)) > 0.1
    ours, theirs = both_ways(load_model(str(tiny_llama), "nf4").eval(), llama_tokenizer, asked, 200)
    # 4-bit weights are multiplied in bfloat16, whose rounding depends on the shapes.
    for (score, _), (other, _), (_, answer) in zip(ours, theirs, asked, strict=True):
        assert score == pytest.approx(other, abs=0.1 * len(answer) ** 0.5 + 0.02 * abs(other))


def counted():
    """A tiny model, and the list of the numbers of tokens in its forward passes."""
    model, seen = tiny("llama", max_position_embeddings=2000), []
    model.model.embed_tokens.register_forward_hook(lambda _, args, __: seen.append(args[0].numel()))
    return model, seen


def score_all(*arguments):
    """The results of `window_loglikelihoods`, in order."""
    found = {place: result for places, result in window_loglikelihoods(*arguments) for place in places}
    return [found[i] for i in range(len(arguments[1]))]


def test_every_token_is_computed_once():
    model, seen = counted()
    block = torch.arange(500).remainder(50).tolist()
    windows = [(tuple(block + [55, i]), (i, 3, j)) for i in range(10) for j in range(4)]
    # Sharing 40 tokens with the block, these two would shorten its group's prefix: it costs more than it saves.
    windows += [(tuple(block[:40] + [56, i]), (3,)) for i in range(2)]
    score_all(model, windows, 300)
    # The block once; of every context the last token; of every answer all but the last, and equal beginnings once.
    assert sum(seen) == 501 + 10 * (1 + 2) + 41 + 2


def test_batches_have_at_most_so_many_tokens():
    model, seen = counted()
    windows = [((i, *range(1, 10 + i)), (3, 4)) for i in range(20)]
    results = score_all(model, windows, 100)
    # The longest rows first; a batch has as many as would fit with padding, which is not computed.
    assert seen == [30 + 29 + 28, 27 + 26 + 25, sum(range(21, 25)), sum(range(16, 21)), sum(range(11, 16))]
    seen.clear()
    limited = score_all(model, windows, 44, 2)
    assert max(seen) <= 44 and 10 < len(seen) < 20
    same(limited, results)


def test_out_of_memory_halves_the_tokens_of_a_batch(llama_tokenizer, monkeypatch, capsys):
    """What was yielded is not computed again. A memory that is too small for the smallest batch is an error."""
    calls, room = [], 1024

    def limited(model, windows, batch_tokens, max_rows):
        calls.append((batch_tokens, windows, done := []))
        for count, (places, result) in enumerate(window_loglikelihoods(model, windows, batch_tokens, max_rows)):
            if count == 5 and batch_tokens > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            done.extend(windows[place] for place in places)
            yield places, result

    monkeypatch.setattr(harness, "window_loglikelihoods", limited)
    model = tiny("llama", max_position_embeddings=300)
    windows = [truncate_window(*pair, 300) for pair in requests(300)]
    lm = SharedContextLM(model, llama_tokenizer, max_length=300)
    found = lm.score(windows, disable_tqdm=True)
    assert [tokens for tokens, *_ in calls] == [4096, 2048, 1024] and lm.batch_tokens == 1024
    for (_, asked, done), (_, left, _) in zip(calls, calls[1:], strict=False):
        assert done and set(left) == set(asked) - set(done)
    assert "The memory is full: going on with 1024 tokens in a batch" in capsys.readouterr().out
    same(found, score_all(model, windows, 1024))
    room = 100
    with pytest.raises(torch.OutOfMemoryError):
        lm.score(windows, disable_tqdm=True)
    assert lm.batch_tokens == 512


@pytest.mark.parametrize("add_bos", [None, True, False])
def test_requests_are_tokenized_as_hf_does(llama_tokenizer, monkeypatch, add_bos):
    """Questions with each of their choices, after examples; and spaces, line breaks and BOS where they are hard."""
    monkeypatch.setattr(harness, "TOKENIZER_BATCH", 100)
    lm = SharedContextLM(tiny("llama"), llama_tokenizer, add_bos_token=add_bos)
    questions = load_questions(data_path=BUNDLED)
    examples = "\n\n".join(f"Question: {row['question']}\nAnswer: {row['choices'][0]}" for row in questions[:9])
    asked = [
        (f"{shots}Question: {row['question']}\nAnswer:", f" {choice}")
        for shots in ("", f"{examples}\n\n")
        for row in questions[:40]
        for choice in row["choices"]
    ]
    asked += [("<s> It is", " so"), ("It is  ", "so"), ("a", ""), ("It\nis", "\nso"), ("<s>", "so")]
    assert len(asked) > 200 and lm.tokenize(asked) == [lm._encode_pair(*pair) for pair in asked]


@pytest.mark.parametrize(("family", "context"), [("gemma2", "Ice is"), ("llama", "")])
def test_what_cannot_be_shared_is_scored_like_hf(llama_tokenizer, family, context, capsys):
    model = tiny(family, vocab_size=len(llama_tokenizer), sliding_window=64)
    asked = [Instance("loglikelihood", {}, pair, 0) for pair in (("What is cold?", " Ice."), (context, " cold."))]
    ours = SharedContextLM(model, llama_tokenizer).loglikelihood(asked)
    assert "hf-shared uses the method of hf: " in capsys.readouterr().err
    plain = HFLM(pretrained=model, tokenizer=llama_tokenizer)
    same(ours, plain.loglikelihood(asked, disable_tqdm=True))


def test_an_answer_longer_than_the_window_is_refused(llama_tokenizer):
    model = tiny("llama", vocab_size=len(llama_tokenizer), max_position_embeddings=20)
    for lm in (SharedContextLM(model, llama_tokenizer), SplitLM(pretrained=model, tokenizer=llama_tokenizer)):
        with pytest.raises(UserError, match="an answer has [0-9]+ tokens, and the model's context window 20"):
            lm.loglikelihood([Instance("loglikelihood", {}, ("Ice is", " cold" * 30), 0)])


def test_the_evaluation_benchmark(tiny_llama, tmp_path):
    script = (sys.executable, PROJECT / "benchmarks" / "evaluation.py", "--limit", "3", "--tasks", "letters", "--ways")
    ways = ("hf", "vllm", "hf-shared")
    done = call(*script, *ways, "--model", tiny_llama, env=VLLM_ENV)
    table = [line.split() for line in done.stdout.splitlines() if line.startswith("letters")]
    assert [line[1] for line in table] == list(ways)
    assert all(0 <= float(line[7]) < 2e-4 for line in table)
    assert done.stdout.count("scores equal") == len(table)
    adapter = save_adapter(tiny_llama, tmp_path / "a", target_modules=["q_proj"])
    done = call(*script, *ways, "--model", adapter, env=VLLM_ENV, status=2)
    assert done.stderr.endswith("the way vllm needs a model, not an adapter\n") and done.stderr.count("\n") == 1
