"""The model's responses: parse them, save each one at once, and load the saved ones to resume."""

import json
import re
from contextlib import contextmanager
from pathlib import Path

from grath.common.files import atomic_write_text, hash_of, sha256
from grath.common.paths import ADAPTER
from grath.modeling.loading import resolve_base_and_adapter, weights_identity

CORRECT, INCORRECT = "Correct answer:", "Incorrect answer:"
LINE_END = re.compile(r"[\r\n]")


def parse_response(response):
    """Extract the two answers from a response.

    The correct answer is the text between the two labels, the incorrect answer the text after the second label. Each is
    one line.

    Returns:
        ((correct, incorrect), None), or (None, reason) if the response does not parse.
    """
    _, label, rest = response.partition(CORRECT)
    if not label:
        return None, "no correct answer"
    correct, label, incorrect = rest.partition(INCORRECT)
    correct, incorrect = correct.strip(), LINE_END.split(incorrect.strip(" \t"), maxsplit=1)[0].strip()
    if LINE_END.search(correct) or (correct and not label):
        return None, "no incorrect answer after the correct one"
    if not correct or not incorrect:
        return None, "empty answer"
    return (correct, incorrect), None


def _saved_files(path):
    """List the files of saved responses that belong to the pair file `path`.

    They are `.{pair file}.responses` (merged) and `.{pair file}.responses.{process}` (one for each process). The first
    line of each is the fingerprint of the run's settings. Every further line is `[index, response]`.
    """
    return [file for file in path.parent.iterdir() if file.name.startswith(f".{path.name}.responses")]


def load_responses(path, fingerprint, merge):
    """Load the responses that an interrupted run with the same settings saved.

    Args:
        path: the pair file.
        fingerprint: what `responses_fingerprint` returned.
        merge: whether to merge the saved files into one; True in the first process, before the others load them.

    Returns:
        dict: index of the question -> response.
    """
    responses, discarded = {}, False
    for file in _saved_files(path) if path.parent.is_dir() else []:
        try:
            # An interruption can cut the last line short: it has no line end then.
            first, *lines = file.read_text(encoding="utf-8").split("\n")[:-1] or [""]
            found = dict(json.loads(line) for line in lines) if first == fingerprint else None
        except (ValueError, TypeError):  # a damaged file
            found = None
        if found is None:
            discarded = True
        else:
            responses |= found
    if merge:
        if discarded:
            print("Discarding saved responses that have other settings or are damaged; asking those questions again")
        lines = [fingerprint, *(json.dumps(item) for item in sorted(responses.items()))]
        merged = path.with_name(f".{path.name}.responses")
        atomic_write_text(merged, "".join(f"{line}\n" for line in lines))
        for file in _saved_files(path):
            if file != merged:
                file.unlink()
    return responses


@contextmanager
def save_responses(path, fingerprint, process):
    """Open this process's file of saved responses; yield a function (index, response) that saves one at once."""
    with path.with_name(f".{path.name}.responses.{process}").open("w", encoding="utf-8") as file:
        file.write(f"{fingerprint}\n")

        def save(index, response):
            file.write(json.dumps([index, response]) + "\n")
            file.flush()

        yield save


def remove_responses(path):
    """Remove the saved responses that belong to the pair file `path`."""
    for file in _saved_files(path):
        file.unlink()


def responses_fingerprint(name, prompts, precision, max_new_tokens):
    """Hash what saved responses must have in common: the weights, the prompts' token ids, the precision and the length.

    In fp32, greedy completions depend on nothing else. In int8 they also depend on the batch, whose size may change.
    """
    base, adapter = resolve_base_and_adapter(name)
    parts = [weights_identity(base), precision, str(max_new_tokens), json.dumps(prompts)]
    if adapter:
        parts.append(sha256(Path(adapter) / ADAPTER))
    return hash_of(parts)
