"""Handmade run folders, with the records that the stages write."""

import json

from support import write_rows

from grath.common.files import sha256
from grath.common.layout import find_pairs, model_path, pairs_path, record_path, results_path
from grath.pairs.record import hash_rows

NAMES = (5, False, True)


def result(task, score, **content):
    """What the harness writes about a task."""
    values = {"acc,none": score, "acc_stderr,none": 0.01}
    return {"results": {task: values}, "versions": {task: 2.0}, "lm_eval_version": "0.4.13"} | content


def put_record(path, files=(), **content):
    """Write the record of a stage, with the hashes of the files next to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"inputs": {}, "starts": 1, "seconds": 2.5, "versions": {"torch": "2.0"}, "commit": "abc1234"}
    record["files"] = {file.name: sha256(file) for file in files}
    path.write_text(json.dumps(record | content))


def put_scores(run, number, task, score):
    """Put the score of M_i: a list with that of every question, or one number."""
    folder, content = results_path(run, number), {}
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(score, list):
        content["questions"] = {"sha256": task, "scores": score, "negated": [at % 2 for at in range(len(score))]}
        score = sum(score) / len(score)
    (folder / f"{task}.json").write_text(json.dumps(result(task, score, **content)))
    put_record(folder / "settings.json", folder.glob("*mc*.json"), inputs={"precision": "fp32", "limit": None})


def put_model(run, number, adapter=None, **settings):
    """Put the record and the log of M_i, trained with these settings, as a published run has them."""
    settings = {"beta": 0.1, "reference": "rolling", "dataset_name": None, "output_dir": str(run)} | settings
    content = {"base_model": "me/Llama-2-7b-chat-hf", "incoming_adapter": adapter, "pairs": {"read": 2, "kept": 2}}
    path = model_path(run, number, *NAMES) / "grath.json"
    put_record(path, commit="def5678+", warnings=["too many steps"], settings=settings, **content)
    log = [{"step": 9, "loss": 0.5, "rewards/margins": 0.125 * number}, {"train_runtime": 5}]
    write_rows(path.with_name("training_log.jsonl"), log)


def put_pairs(run, number, content, asked=(), **settings):
    """Put the pair file that M_i wrote about questions (`asked`), of (question, correct, incorrect)."""
    path = pairs_path(run, number, *NAMES)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, [dict(zip(("question", "correct", "incorrect"), row, strict=True)) for row in content])
    settings = {"data_path": "gone.jsonl", "data_name": "x", "subdata_name": "x", "split": "train"} | settings
    about = {"inputs": {"questions": hash_rows(asked)}, "counts": {"asked": len(asked) or 5}}
    put_record(record_path(path), [find_pairs(run, number)], settings=settings, **about)
    return path


def put_run(run, scores, seed=0, **settings):
    """Put a run whose M_i has these scores of MC1 (i -> as in `put_scores`), trained with these settings."""
    for number, score in scores.items():
        put_scores(run, number, "truthfulqa_mc1", score)
        if number:
            put_model(run, number, seed=seed, **settings)
    return run
