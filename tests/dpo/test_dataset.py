"""The sources of pairs, the pairs that are dropped, and the order of the others."""

import pytest
from support import HUB, needs_hub, pair, write_rows
from trainings import train

from grath.common.errors import UserError
from grath.dpo.dataset import drop_special, training_order
from grath.pairs.questions import load_preferences


def test_preferences_of_the_hub_without_identical_and_long_pairs(tiny_llama, tmp_path):
    def turn(role, text):
        return [{"role": role, "content": text}]

    question, no = turn("user", "Is ice cold?"), turn("assistant", "No")
    chosen = [turn("assistant", text) for text in ("No", "long " * 300, "Yes", "It is")]
    data = [{"prompt": question, "chosen": one, "rejected": no} for one in chosen]
    (tmp_path / "me" / "prefs").mkdir(parents=True)
    write_rows(tmp_path / "me" / "prefs" / "train.jsonl", data)
    flags = ("--max_length", "128", "--max_steps", "1")
    done, record = train(tiny_llama, tmp_path / "m", *flags, source=("--dataset_name", "me/prefs"), cwd=tmp_path)
    assert "4 pairs, 1 with identical answers and 1 over 128 tokens dropped" in done.stdout
    assert record["pairs"] == {"read": 4, "identical": 1, "too_long": 1, "kept": 2}
    # Texts and messages in one row, and in two rows; another name of a role.
    texts, named = {"prompt": "Is ice cold?", "chosen": "No", "rejected": "Yes"}, {"prompt": turn("human", "Ice?")}
    for rows in ([texts | {"chosen": no}], [data[0], texts], [data[0] | named]):
        write_rows(tmp_path / "me" / "prefs" / "train.jsonl", rows)
        done, _ = train(tiny_llama, tmp_path / "n", source=("--dataset_name", "me/prefs"), cwd=tmp_path, status=2)
        expected = f"me/prefs, row {len(rows)}: prompt, chosen and rejected must be all texts, or all messages"
        assert expected in done.stderr


def test_pairs_with_the_text_of_a_special_token_are_dropped(llama_tokenizer):
    """The tokenizer would cut the answer there."""
    good, bad = pair("How is text struck?", "With <del>.", "With <b>."), pair("q", "With <s>.", "With </s>.")
    read = [good, bad]
    warning = "pairs dropped because they contain </s> or <s>, special tokens: 1"
    assert drop_special(read, llama_tokenizer) == warning and read == [good]
    assert drop_special(read, llama_tokenizer) is None
    with pytest.raises(UserError, match="no pair is left to train on: all contain </s> or <s>"):
        drop_special([bad], llama_tokenizer)


@pytest.mark.parametrize("strategy", ["sequential", "random", "group_by_length"])
@pytest.mark.parametrize("pairs", [1, 15, 16, 17, 40, 1119])
def test_every_epoch_uses_every_pair_once(strategy, pairs):
    lengths = [(37 * i) % 100 for i in range(pairs)]
    order = training_order(lengths, 5 * pairs, 16, strategy, 3)
    for at in range(0, len(order), pairs):
        assert sorted(order[at : at + pairs]) == list(range(pairs))
    # A longer training begins with the same steps; another seed gives other steps.
    assert training_order(lengths, 7 * pairs, 16, strategy, 3)[: len(order)] == order
    if pairs > 16:
        assert (training_order(lengths, len(order), 16, strategy, 4) == order) == (strategy == "sequential")


def test_each_step_has_pairs_of_similar_length():
    lengths = [(37 * i) % 100 for i in range(1605)]
    order = [lengths[i] for i in training_order(lengths, 3 * 1600, 16, "group_by_length", 3)]
    steps = [order[at : at + 16] for at in range(0, len(order), 16)]
    assert sum(max(step) - min(step) for step in steps) / len(steps) < 10
    # The steps are in random order.
    assert 30 < sum(sum(one) < sum(following) for one, following in zip(steps, steps[1:], strict=False)) < 270


@needs_hub
def test_labeled_datasets(tiny_llama, tmp_path, monkeypatch):
    source = ("--dataset_name", "truthful_qa[1:4]")
    done, record = train(tiny_llama, tmp_path / "m", "--max_steps", "1", source=source, cwd=HUB)
    assert record["pairs"]["kept"] == 3 and "is the TruthfulQA test set" in done.stderr
    # The others: their rows.
    monkeypatch.chdir(HUB)
    questions = load_preferences("truthful_qa", 0)
    for rows, expected in (("[:3]", questions[:3]), ("[5:]", questions[5:]), ("[:]", questions)):
        assert load_preferences(f"truthful_qa{rows}", 0) == expected
    assert load_preferences("ai2_arc/ARC-Challenge[:2]", 0)[0].keys() == {"question", "correct", "incorrect"}
