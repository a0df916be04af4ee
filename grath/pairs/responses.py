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


def _saved_file(path, fingerprint, process=None):
    """Return the file of the responses to a pair file: of one process, or the merged one. A line: [index, response].

    Settings with another fingerprint have files of their own, so a command with a wrong flag loses nothing.
    """
    return path.with_name(f".{path.name}.{fingerprint[:16]}.responses" + ("" if process is None else f".{process}"))


def pair_file_name(saved):
    """Return the name of the pair file that a file of saved responses belongs to."""
    return saved.name[1:].partition(".responses")[0].rpartition(".")[0]


def load_responses(path, fingerprint, merge):
    """Load the responses that an interrupted run with the same settings saved.

    Args:
        path: the pair file.
        fingerprint: what `responses_fingerprint` returned.
        merge: whether to merge the saved files into one; True in the first process, before the others load them.

    Returns:
        dict: index of the question -> response.
    """
    responses, merged = {}, _saved_file(path, fingerprint)
    files = [file for file in path.parent.glob(".*") if file.name.startswith(merged.name)]
    for file in files:
        try:
            # An interruption can cut the last line short: it has no line end then.
            lines = file.read_text(encoding="utf-8").split("\n")[:-1]
            responses |= dict(json.loads(line) for line in lines)
        except (ValueError, TypeError):
            if merge:
                print("Discarding saved responses that are damaged; asking those questions again")
    if merge:
        lines = [json.dumps(item) for item in sorted(responses.items())]
        atomic_write_text(merged, "".join(f"{line}\n" for line in lines))
        for file in files:
            if file != merged:
                file.unlink()
    return responses


@contextmanager
def save_responses(path, fingerprint, process):
    """Open this process's file of saved responses; yield a function (index, response) that saves one at once."""
    with _saved_file(path, fingerprint, process).open("w", encoding="utf-8") as file:

        def save(index, response):
            file.write(json.dumps([index, response]) + "\n")
            file.flush()

        yield save


def remove_responses(path):
    """Remove the saved responses that belong to the pair file `path`, of all settings."""
    for file in path.parent.glob(".*.responses*"):
        if pair_file_name(file) == path.name:
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
