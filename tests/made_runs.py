"""Handmade run folders, with the records that the stages write."""

import json

from support import write_rows

from grath.common.files import sha256
from grath.common.layout import find_pairs, model_path, pairs_path, record_path, results_path

NAMES = (5, False, True)


def result(task, score, stderr=1.0, **content):
    """What the harness writes about a task."""
    values = {"acc,none": score, "acc_stderr,none": stderr / 100}
    return {"results": {task: values}, "versions": {task: 2.0}, "lm_eval_version": "0.4.13", **content}


def put_record(path, files=(), **content):
    """Write the record of a stage, with the hashes of the files next to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"inputs": {}, "starts": 1, "seconds": 2.5, "versions": {"torch": "2.0"}, "commit": "abc1234"}
    record["files"] = {file.name: sha256(file) for file in files}
    path.write_text(json.dumps(record | content))


def put_scores(run, number, task, of_questions, stderr=1.0):
    """Put the score of M_i: a list with that of every question, or one number."""
    folder = results_path(run, number)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(of_questions, list):
        negated = [at % 2 for at in range(len(of_questions))]
        questions = {"sha256": task, "scores": of_questions, "negated": negated}
        content = result(task, sum(of_questions) / len(of_questions), stderr, questions=questions)
    else:
        content = result(task, of_questions, stderr)
    (folder / f"{task}.json").write_text(json.dumps(content))
    put_record(folder / "settings.json", folder.glob("*mc*.json"), inputs={"precision": "fp32", "limit": None})


def put_model(run, number, seed=0, **content):
    """Put the record of M_i, as a published run has it."""
    dpo = {"seed": seed, "beta": 0.1, "reference": "rolling", "output_dir": str(run)} | content.pop("settings", {})
    content = {"base_model": "me/base", "pairs": {"kept": 2}, "warnings": [], "settings": dpo} | content
    put_record(model_path(run, number, *NAMES) / "grath.json", **content)


def put_pairs(run, number, content, **settings):
    """Put the pair file that M_i wrote, from (question, correct, incorrect), and its record."""
    path = pairs_path(run, number, *NAMES)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, [dict(zip(("question", "correct", "incorrect"), row, strict=True)) for row in content])
    put_record(record_path(path), [find_pairs(run, number)], settings=settings, counts={"asked": 5})
    return path


def put_run(run, scores, seed=0, **settings):
    """Put a run whose M_i has these MC1 scores of single questions (i -> list), trained with these settings."""
    for number, of_questions in scores.items():
        put_scores(run, number, "truthfulqa_mc1", of_questions)
        if number:
            put_model(run, number, seed, settings=settings)
    return run
