"""The model's responses: parse them, save each one at once, and load the saved ones to resume."""

import json
import re
from collections import Counter
from contextlib import contextmanager
from glob import escape

from grath.common.files import fits, parse_json
from grath.modeling.devices import print_once

QUESTION, CORRECT, INCORRECT = "question", "correct", "incorrect"
# Follows a response that has all the tokens it may have, so that its last line is not complete.
OF_CUT = "cut at --max_new_tokens"
CUT = f"\n({OF_CUT})"
# A line of a pair; its label may be a heading, emphasised or in quotes, in a list, or in other capitals.
_LABEL = r"(?:(correct|incorrect) answer|(?:next |another |new )?q(?:uestion)?)"
LINE = re.compile(rf"[\W\d_]*{_LABEL}[\s\d*_]{{0,6}}:(?:[\"'”’\])]+(?=\s|$))?(.*)", re.IGNORECASE)
LABEL = re.compile(r"(?:in)?correct answer[*_ ]{0,4}:", re.IGNORECASE)
INCORRECT_LABEL = re.compile(r"[\"'“‘\[]?incorrect answer[*_ ]{0,4}:(?:[\"'”’\]]+(?=\s|$))?", re.IGNORECASE)
EXPLANATION = re.compile(r"\s[*_(]{0,3}(?:Explanation|Reason|Note)[*_ ]{0,4}:")
# What a reasoning model puts around its reasoning: <think>, [THINK], <|begin_of_thought|>, <|channel|>analysis.
_WORD = r"(?:think|thought|reason|rationale|reflect|analysis|scratch|cot\b)"
_NAME = rf"((?:end)?(?:[a-z]+[_:]){{0,3}}{_WORD}\w*)"
_CHANNEL = r"<(channel)\|>|<\|?channel\|?>\s*(analysis|thought|final)(?:<\|message\|>)?"
TAG = re.compile(rf"[<\[◁]\|?(/?){_NAME}(?:\s+\w+=[^<>\[\]\n]{{0,100}})?\|?[>\]▷]|{_CHANNEL}", re.IGNORECASE)
# What stands around an answer and does not belong to it.
_MARK = r"[*`\s\u200b\ufe0f✅❌✓✗✔✘✖☑]"
BEFORE = re.compile(rf"(?:{_MARK}|:|_+\s|[-•]\s+(?![\s\d]))*")
AFTER = re.compile(rf"(?:{_MARK}|<\|\w+\|>|\[/INST\])+(?=[.!?]?$)")
# A special token around reasoning.
DELIMITER = re.compile(rf"{TAG.pattern}|channel", re.IGNORECASE)


def opens_reasoning(prompt):
    """Return the tag with which a prompt (str) begins the model's reasoning, or an empty string."""
    last = prompt.rstrip().rpartition("\n")[2]
    tags = [tag for tag, _, ends in _tags(last) if tag.end() == len(last) and not ends]
    return f"{tags[0][0]}\n" if tags and last[: tags[0].start()].rstrip()[-1:] in ("", ">", "]") else ""


def parse_response(response, question=""):
    """Extract the two answers from a response: its last pair of lines about the question, after any reasoning.

    Different pairs below one statement of the question, such as a pair and its explanation, count as none.

    A pair is about the question that the response states before it. That may have other words than `question`; but if
    some pair states `question` itself, only such pairs count.

    Returns:
        ((correct, incorrect), None), or (None, reason) if the response does not parse.
    """
    cut, lines, opened = response.endswith(CUT), [], None
    text = _without_reasoning(response.removesuffix(CUT).rpartition("\n")[0] if cut else response)
    for line in re.split(r"[\r\n]", text):
        opened = next((tag for tag, *_ in _tags(line)), None)
        if opened and (LABEL.search(line, 0, opened.start()) or _labelled(line)[0] and line.rstrip().endswith("?")):
            opened = None  # in an answer or a question
        lines.append(line[: opened.start()] if opened else line)
        if opened:
            break
    lines = [_labelled(line.strip()) for line in lines if line.strip()]
    pairs = [(number, *found) for number in range(len(lines)) if (found := _pair_at(lines, number))]
    if not pairs and opened:
        return None, "reasoning without an end"
    if not pairs and cut:
        return None, OF_CUT
    if not pairs:
        alone = re.search("(?<!in)correct answer", text, re.IGNORECASE)
        return None, "no incorrect answer after the correct one" if alone else "no correct answer"
    # A model may go on with a question of its own.
    asked = {at: _letters(_text_at(lines, at)[0]) for at, (label, _) in enumerate(lines) if label == QUESTION}
    of = [next((asked[at] for at in reversed(asked) if at < number), None) for number, *_ in pairs]
    own = _letters(question) if _letters(question) in of else of[0]
    number, correct, incorrect = [pair for pair, stated in zip(pairs, of, strict=True) if stated == own][-1]
    since = max((line for line in asked if line < number), default=-1)
    if {tuple(answers) for at, *answers in pairs if since < at < number and any(answers)} - {(correct, incorrect)}:
        return None, "different pairs of answers"
    end = min((line for line in asked if line > number), default=len(lines))
    another = CORRECT in [label for label, _ in lines[number + 1 : end]]
    if cut and (another or not correct or not incorrect):
        return None, OF_CUT
    if not correct or not incorrect:
        return None, "empty answer"
    if LABEL.search(correct) or LABEL.search(incorrect):
        return None, "a label in an answer"
    return (correct, incorrect), None


def _tags(text):
    """Yield the tags around reasoning: (match, kind of reasoning, whether it ends it)."""
    for tag in TAG.finditer(text):
        slash, name, *channels = [(group or "").lower() for group in tag.groups()]
        if not name:
            yield tag, "channel", "".join(channels) in ("final", "channel")
        else:
            ends = bool(slash) or name.startswith("end") or name.endswith("end")
            yield tag, re.sub("begin|start|end|of|_", "", name), ends


def _without_reasoning(text):
    """Remove reasoning with a beginning and an end, and everything up to an end that has no beginning."""
    began, spans = {}, []
    for tag, kind, ends in _tags(text):
        if not ends:
            began.setdefault(kind, tag.start())
            continue
        if kind not in began:
            began = {kind: 0}
        while kind in began:  # with what began inside it
            _, first = began.popitem()
        while spans and spans[-1][0] >= first:
            spans.pop()
        spans.append((first, tag.end()))
    kept, at = "", 0
    for first, end in [*spans, (len(text), len(text))]:
        kept += text[at:first]
        # In an answer, the text after it goes on.
        kept += " " if LABEL.search(kept, kept.rfind("\n") + 1) else "\n"
        at = end
    return kept


def _letters(text):
    return re.sub(r"\W", "", text).lower()


def _clean(text):
    """Remove what belongs to no answer: emphasis, list markers, the end of a turn or a tag, half a pair of quotes."""
    text = re.sub(r"</(\w+)>$", lambda tag: tag[0] if f"<{tag[1]}" in text else "", text[BEFORE.match(text).end() :])
    text = text[:-100] + AFTER.sub("", text[-100:])  # a search in the whole text could take long
    if re.fullmatch(r"_[^_]+_", text):
        return text[1:-1]
    return text[:-1] if text.count('"') % 2 and re.search(r'\D"$', text) else text


def _labelled(line):
    """Split a line into its label, QUESTION, CORRECT, INCORRECT or an empty string, and its text."""
    found = LINE.match(line)
    return ((found[1] or QUESTION).lower(), found[2]) if found else ("", line)


def _pair_at(lines, number):
    """Return the answers of the pair that begins in a line, or None. Both can be in one line, or below their labels."""
    if lines[number][0] != CORRECT:
        return None
    correct, after = _text_at(lines, number)
    if len(parts := INCORRECT_LABEL.split(correct)) == 2:
        closing = ")" if parts[0].rstrip().endswith("(") else ""
        correct, incorrect = (EXPLANATION.split(part)[0] for part in parts)
        return _clean(correct.rstrip(" ;|/,(–—-")), _clean(incorrect).removesuffix(closing)
    if after == len(lines) or lines[after][0] != INCORRECT:
        return None
    below = after == number + 2
    return correct, _text_at(lines, after)[0] if below else _clean(lines[after][1])


def _text_at(lines, number):
    """Return the text next to a label, or that in the next line, and the number of the line after it."""
    text = _clean(lines[number][1])
    if not text and number + 1 < len(lines) and not lines[number + 1][0]:
        return _clean(lines[number + 1][1]), number + 2
    return text, number + 1


def parse_responses(questions, responses):
    """Parse the responses to questions; return the rows of the pair file, and why others were dropped (Counter)."""
    rows, dropped = [], Counter()
    for i, question in enumerate(questions):
        answers, reason = parse_response(responses[i], question["question"])
        if answers:
            rows.append({"question": question["question"], "correct": answers[0], "incorrect": answers[1]})
        else:
            dropped[reason] += 1
    return rows, dropped


def _saved_files(path):
    """Return the files of the responses to a pair file. Each line: [index, response]."""
    return list(path.parent.glob(f".{escape(path.name)}.responses*"))


def load_responses(path):
    """Load the responses to the pair file `path` that were saved: dict, index of the question -> response."""
    responses = {}
    for file in _saved_files(path):
        try:
            # An interruption can cut the last line short: it has no line end then.
            rows = [parse_json(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
            if not all(fits(index, int) and fits(text, str) for index, text in rows):
                raise ValueError(file)
            responses |= dict(rows)
        except (ValueError, TypeError):
            print_once("Discarding saved responses that are damaged; asking those questions again")
    return responses


@contextmanager
def save_responses(path, name):
    """Open a new file of saved responses; yield a function (index, response) that saves one at once.

    Each process of each start gives its own `name` for the file.
    """
    with path.with_name(f".{path.name}.responses.{name}").open("w", encoding="utf-8") as file:

        def save(index, response):
            file.write(json.dumps([index, response]) + "\n")
            file.flush()

        yield save


def remove_responses(path):
    """Remove the saved responses that belong to the pair file `path`."""
    for file in _saved_files(path):
        file.unlink(missing_ok=True)  # another process may have removed it
