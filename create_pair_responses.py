#!/usr/bin/env python
"""Stage 1 of GRATH: ask a chat model for a correct and an incorrect answer to each question.

    python create_pair_responses.py --model_name_or_path MODEL --save_prefix iter0_arcc --useFS
    python create_pair_responses.py --model_name_or_path MODEL --save_prefix iter0_arcc --useGT --useFS

Writes {save_dir}/{save_prefix}_num_{N}_useGT_{True|False}_useFS_{True|False}.json, JSON lines with question, correct
and incorrect, where N is the number of questions asked. Replies that do not parse are dropped and counted. Decoding is
greedy, so the same arguments give the same file.
"""

from collections import Counter
from pathlib import Path
from statistics import mean

from grath.chat import MODEL_TYPES, prompt_ids, template_for
from grath.cli import Parser, UserError, check_writable, positive_int, run
from grath.models import PRECISIONS, load_model, load_tokenizer, resolve_precision
from grath.pairs import is_complete, pair_file_name, parse_reply, write_pairs
from grath.questions import build_messages, load_demos, load_questions


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="hub name, model folder or LoRA adapter's folder")
    add("--save_prefix", required=True, help="how the file's name begins, as in iter0_arcc")
    add("--useFS", action="store_true", help="show the model six demonstrations first (the paper's choice)")
    add("--useGT", action="store_true", help="show the model a correct and an incorrect candidate from the choices")
    add("--data_name", default="allenai/ai2_arc", help="hub data set in ARC's schema, or a local folder of that name")
    add("--subdata_name", default="ARC-Challenge", help="its configuration")
    add("--split", default="train", help="its split")
    add("--data_path", help="a local JSON-lines file in ARC's schema, instead of --data_name")
    add("--num_query", type=positive_int, help="ask the first N questions only; if left out, all")
    add("--tokenizer_name", help="tokenizer's name or folder; if left out, the model's")
    add("--model_type", choices=MODEL_TYPES, default="auto", help="chat tags; auto: the tokenizer's chat template")
    add("--demos", default="truthfulqa", help="demonstrations for --useFS: truthfulqa, halueval or a JSON file")
    add("--seed", type=int, default=0, help="draws the incorrect candidate for --useGT")
    add("--save_dir", type=Path, default=Path("data/truthfulness"), help="folder of the pair file")
    add("--max_new_tokens", type=positive_int, default=100, help="length limit of a reply")
    add("--batch_size", type=positive_int, default=32, help="questions generated at once")
    add("--precision", choices=PRECISIONS, default="auto", help="auto: int8 on a CUDA GPU, bf16 on a CPU")
    return parser.parse_args()


def main():
    args = parse_args()
    if Path(args.save_prefix).name != args.save_prefix:
        raise UserError(f"--save_prefix {args.save_prefix!r} must be a plain file name: use --save_dir for the folder")
    check_writable(args.save_dir)
    demos = load_demos(args.demos) if args.useFS else []
    questions = load_questions(args.data_name, args.subdata_name, args.split, args.data_path)
    if args.num_query and args.num_query > len(questions):
        raise UserError(f"--num_query {args.num_query}: there are only {len(questions)} questions")
    questions = questions[: args.num_query]

    precision = resolve_precision(args.precision, "pairs")
    tokenizer = load_tokenizer(args.model_name_or_path, args.tokenizer_name)
    template = template_for(tokenizer, args.model_type)
    prompts = [
        prompt_ids(tokenizer, build_messages(question, args.seed, args.useGT, demos), template)
        for question in questions
    ]
    model = load_model(args.model_name_or_path, precision)
    replies = ask(model, tokenizer, prompts, args.max_new_tokens, args.batch_size, precision)

    rows, dropped = [], Counter()
    for question, reply in zip(questions, replies, strict=True):
        answers, reason = parse_reply(reply)
        if answers:
            rows.append({"question": question["question"], "correct": answers[0], "incorrect": answers[1]})
        else:
            dropped[reason] += 1
    report(rows, dropped, len(questions))
    path = args.save_dir / pair_file_name(args.save_prefix, len(questions), args.useGT, args.useFS)
    if not rows:
        raise UserError(f"not one of {len(questions)} replies could be parsed, so {path} was not written: try --useFS")
    write_pairs(path, rows)
    print(f"Wrote {path}; next: dpo.py --dataset_path {path}")


def ask(model, tokenizer, prompts, max_new_tokens, batch_size, precision):
    """The model's replies, with a progress bar that shows the share that parses."""
    from tqdm import tqdm

    from grath.models import stop_ids
    from grath.shared_prefix import generate

    print(f"Asking {len(prompts)} questions ({precision}, {model.device}, batches of {batch_size})")
    replies, parsed = [None] * len(prompts), 0
    with tqdm(total=len(prompts), unit="question") as bar:

        def keep(index, ids):
            nonlocal parsed
            replies[index] = tokenizer.decode(ids, skip_special_tokens=True)
            parsed += parse_reply(replies[index])[0] is not None
            bar.update()
            bar.set_postfix(parsed=f"{parsed / bar.n:.0%}", refresh=False)

        def complete(ids):
            return "\n" in tokenizer.decode(ids[-1:]) and is_complete(tokenizer.decode(ids, skip_special_tokens=True))

        generate(model, prompts, max_new_tokens, batch_size, stop_ids(model, tokenizer), keep, complete)
    return replies


def report(rows, dropped, asked):
    """Print what became of the questions."""
    identical = sum(row["correct"] == row["incorrect"] for row in rows)
    print(f"asked {asked}, written {len(rows)}, dropped {sum(dropped.values())}, identical answers {identical}")
    for reason, count in dropped.most_common():
        print(f"  dropped, {reason}: {count}")
    if rows:
        lengths = (mean(len(row[field].split()) for row in rows) for field in ("correct", "incorrect"))
        print("mean words: correct {:.1f}, incorrect {:.1f}".format(*lengths))


if __name__ == "__main__":
    run(main)
