"""The sources of pairs, the pairs that are dropped, and the order of the others."""

import json

import pytest
from support import HUB, PROJECT, call, call_here, needs_hub, pair, write_rows
from training import LAUNCH, SMALL, train


def test_identical_and_long_pairs_are_dropped_and_counted(tiny_llama, tmp_path):
    data = [pair("q1", "same", "same"), pair("q2", "long " * 300, "no"), pair("q3", "yes", "no"), pair("q4", "a", "b")]
    source = ("--dataset_path", write_rows(tmp_path / "pairs.json", data))
    done, record = train(tiny_llama, tmp_path / "m", "--max_length", "128", "--max_steps", "1", source=source)
    assert "4 pairs, 1 with identical answers and 1 over 128 tokens dropped" in done.stdout
    assert record["pairs"] == {"read": 4, "identical": 1, "too_long": 1, "kept": 2}
    done, _ = train(tiny_llama, tmp_path / "n", "--max_length", "8", source=source, status=2)
    assert "no pair is left to train on" in done.stderr
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize("strategy", ["sequential", "random", "group_by_length"])
@pytest.mark.parametrize("pairs", [1, 15, 16, 17, 40, 1119])
def test_every_epoch_uses_every_pair_once(strategy, pairs):
    from grath.dpo.dataset import training_order

    lengths = [(37 * i) % 100 for i in range(pairs)]
    order = training_order(lengths, 5 * pairs, 16, strategy, 3)
    for at in range(0, len(order), pairs):
        assert sorted(order[at : at + pairs]) == list(range(pairs))
    # A longer training begins with the same steps; another seed gives other steps.
    assert training_order(lengths, 7 * pairs, 16, strategy, 3)[: len(order)] == order
    if pairs > 16:
        assert (training_order(lengths, len(order), 16, strategy, 4) == order) == (strategy == "sequential")


def test_each_step_has_pairs_of_similar_length():
    from grath.dpo.dataset import training_order

    lengths = [(37 * i) % 100 for i in range(1605)]
    order = [lengths[i] for i in training_order(lengths, 3 * 1600, 16, "group_by_length", 3)]
    steps = [order[at : at + 16] for at in range(0, len(order), 16)]
    assert sum(max(step) - min(step) for step in steps) / len(steps) < 10
    # The steps are in random order.
    assert 30 < sum(sum(one) < sum(following) for one, following in zip(steps, steps[1:], strict=False)) < 270


@needs_hub
@pytest.mark.parametrize("name", ["ai2_arc/ARC-Challenge", "truthful_qa", "truthful_qa[1:4]"])
def test_labeled_datasets(tiny_llama, tmp_path, name):
    flags = [
        "--dataset_name", name, "--model_name_or_path", tiny_llama, "--output_dir", tmp_path / "m", "--seed", "0",
        *SMALL, "--num_sample", "5", "--max_steps", "1",
    ]  # fmt: skip
    if name.startswith("truthful_qa"):
        done = call_here("dpo.py", *flags, cwd=HUB)
    else:
        done = call(*LAUNCH, PROJECT / "dpo.py", *flags, cwd=HUB)
    record = json.loads((tmp_path / "m" / "grath.json").read_text())
    assert record["pairs"]["kept"] == (3 if "[" in name else 5)
    assert ("is the TruthfulQA test set" in done.stderr) == name.startswith("truthful_qa")


@needs_hub
def test_rows_of_a_labeled_dataset():
    from grath.pairs.questions import gold_pairs, labeled_rows

    name = str(HUB / "truthfulqa" / "truthful_qa")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "grath.pairs.questions.LABELED_DATASETS", {"truthful_qa": (name, "multiple_choice", "validation")}
        )
        every = gold_pairs("truthful_qa", 0)
        for rows in ("[:3]", "[5:]", "[2:4]", "[:]"):
            assert gold_pairs(f"truthful_qa{rows}", 0) == every[labeled_rows(f"truthful_qa{rows}")]


def test_dataset_in_trls_preference_format(tiny_llama, tmp_path):
    turn = [{"role": "user", "content": "Is ice cold?"}]
    data = [
        {
            "prompt": turn,
            "chosen": [{"role": "assistant", "content": f"Yes {i}"}],
            "rejected": [{"role": "assistant", "content": "No"}],
        }
        for i in range(4)
    ]
    (tmp_path / "me" / "prefs").mkdir(parents=True)
    write_rows(tmp_path / "me" / "prefs" / "train.jsonl", data)
    source = ("--dataset_name", "me/prefs")
    done, _ = train(tiny_llama, tmp_path / "m", "--max_steps", "1", source=source, cwd=tmp_path)
    assert "4 pairs, 0 with identical answers" in done.stdout
