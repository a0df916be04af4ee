"""Made data sets in the hub's own folder layout."""

import pandas


def put(root, name, split, content, configs, splits, config=None):
    """Write a split of a made data set in the hub's own folder layout; its page names `configs` and `splits`."""
    folder = root / name / (config or configs[0])
    folder.mkdir(parents=True, exist_ok=True)
    pandas.DataFrame(content).to_parquet(folder / f"{split}-0.parquet")
    page = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {name}/{split}-*\n" for split in splits)
        for name in configs
    )
    (root / name / "README.md").write_text(f"---\nconfigs:\n{page}---\n")


def put_arc(root, numbers):
    """A made ARC with the questions of these numbers in every split."""
    choices = {"text": ["ice", "fire", "sand", "iron"], "label": ["A", "B", "C", "D"]}
    rows = [{"id": str(i), "question": f"What is cold? {i}", "choices": choices, "answerKey": "A"} for i in numbers]
    splits = ("train", "validation", "test")
    for split in splits:
        put(root, "allenai/ai2_arc", split, rows, ["ARC-Challenge"], splits)


def put_truthful(root, numbers):
    """A made TruthfulQA with the questions of these numbers."""
    targets = {"choices": ["Yes.", "No."], "labels": [1, 0]}
    rows = [{"question": f"Is ice cold? {i}", "mc1_targets": targets, "mc2_targets": targets} for i in numbers]
    put(root, "truthfulqa/truthful_qa", "validation", rows, ["multiple_choice"], ["validation"])
