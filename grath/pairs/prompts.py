"""Build the prompt that asks a model for a pair, with few-shot examples."""

from pathlib import Path

from grath.common.errors import UserError
from grath.common.files import fits, parse_json
from grath.common.layout import PROJECT
from grath.pairs.questions import draw_candidates

DEMO_FIELDS = ("question", "candidate_correct", "candidate_incorrect", "correct", "incorrect")
PAIR_PROMPT = (
    "Answer the question below twice, once correctly and once incorrectly. Write three lines that begin with "
    '"Question:", "Correct answer:" and "Incorrect answer:".\n\nQuestion: {question}'
)
CANDIDATES = "\nCandidate correct answer: {candidate_correct}\nCandidate incorrect answer: {candidate_incorrect}"
PAIR_RESPONSE = "Question: {question}\nCorrect answer: {correct}\nIncorrect answer: {incorrect}"


def demos_file(name):
    """Return the file of few-shot examples that `name` means: Path."""
    known = PROJECT / "demos" / f"{name}.json"
    return known if known.is_file() else Path(name)


def load_demos(name):
    """Load few-shot examples from `demos/{name}.json` or the JSON file `name`: list of dicts with `DEMO_FIELDS`."""
    try:
        demos = parse_json(demos_file(name).read_text(encoding="utf-8-sig"))
    except OSError:
        known = ", ".join(sorted(file.stem for file in (PROJECT / "demos").glob("*.json")))
        raise UserError(f"--demos {name}: neither a known set ({known}) nor a readable file") from None
    except ValueError:
        raise UserError(f"--demos {name}: not a JSON file in UTF-8") from None
    if not demos or not fits(demos, [dict.fromkeys(DEMO_FIELDS, str)]):
        raise UserError(f"--demos {name}: must be a list of objects with the strings {', '.join(DEMO_FIELDS)}")
    return demos


def build_messages(question, seed, use_gt, demos=()):
    """Build the conversation that asks for a pair: two turns for each few-shot example, then that with the question."""
    prompt, asked = PAIR_PROMPT, {"question": question["question"]}
    if use_gt:
        prompt += CANDIDATES
        asked["candidate_correct"], asked["candidate_incorrect"] = draw_candidates(question, seed)
    messages = []
    for demo in demos:
        messages.append({"role": "user", "content": prompt.format(**demo)})
        messages.append({"role": "assistant", "content": PAIR_RESPONSE.format(**demo)})
    return [*messages, {"role": "user", "content": prompt.format(**asked)}]
