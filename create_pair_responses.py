#!/usr/bin/env python
"""Stage 1 of GRATH: ask a chat model for a correct and an incorrect answer to each question.

    python create_pair_responses.py --model_name_or_path MODEL --save_prefix iter0_arcc --useFS
    python create_pair_responses.py --model_name_or_path MODEL --save_prefix iter0_arcc --useGT --useFS
    accelerate launch --num_processes 4 create_pair_responses.py ...     splits the questions over four GPUs

Writes {save_dir}/{save_prefix}_num_{N}_useGT_{True|False}_useFS_{True|False}.json, JSON lines with question, correct
and incorrect, where N is the number of questions asked. Replies that do not parse are dropped and counted. Decoding is
greedy: in fp32 the same arguments give the same file, byte for byte, whatever the batch size and the number of
processes; in 16 and 4 bit a token may differ where two logits tie within rounding; in int8 a reply depends on the batch
that it is in, since bitsandbytes picks outlier columns over all rows. Replies are kept as they come: after an
interruption the same command asks only what is left.
"""

import time
from collections import Counter
from pathlib import Path
from statistics import mean

from grath.chat import MODEL_TYPES, prompt_ids, template_for
from grath.cli import Parser, UserError, check_writable, positive_int, run
from grath.models import (
    PRECISIONS,
    fingerprint,
    join_processes,
    load_model,
    load_tokenizer,
    resolve_precision,
    stop_ids,
)
from grath.pairs import (
    keep_replies,
    open_replies,
    pair_file_name,
    parse_reply,
    remove_replies,
    write_pairs,
)
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
    add("--batch_size", type=positive_int, default=64, help="questions generated at once, in each process")
    add("--engine", choices=("shared_prefix", "generate"), default="shared_prefix", help="generate: the library's own")
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
    path = args.save_dir / pair_file_name(args.save_prefix, len(questions), args.useGT, args.useFS)

    precision = resolve_precision(args.precision, "pairs")
    tokenizer = load_tokenizer(args.model_name_or_path, args.tokenizer_name)
    template = template_for(tokenizer, args.model_type)
    prompts = [
        prompt_ids(tokenizer, build_messages(question, args.seed, args.useGT, demos), template)
        for question in questions
    ]

    from accelerate.utils import gather_object

    state = join_processes()
    model = load_model(args.model_name_or_path, precision)
    longest, window = max(map(len, prompts)), getattr(model.config, "max_position_embeddings", None)
    if window and longest + args.max_new_tokens > window:
        raise UserError(
            f"--max_new_tokens {args.max_new_tokens}: with a prompt of {longest} tokens that is more than the model's "
            f"window of {window}"
        )
    settings = fingerprint(args.model_name_or_path, prompts, precision, args.max_new_tokens)
    with state.main_process_first():
        replies = open_replies(path, settings, state.is_main_process)
    state.wait_for_everyone()
    if replies:
        state.print(f"{len(replies)} of {len(questions)} questions were answered before the interruption")
    start, asked = time.monotonic(), len(questions) - len(replies)
    left = [i for i in range(len(questions)) if i not in replies]
    with state.split_between_processes(left) as mine:
        new = ask(model, tokenizer, prompts, mine, args, path, settings, len(replies)) if mine else {}
    replies.update(gather_object(list(new.items())))
    seconds = time.monotonic() - start
    if not state.is_main_process:
        return

    rows, dropped = [], Counter()
    for i, question in enumerate(questions):
        answers, reason = parse_reply(replies[i])
        if answers:
            rows.append({"question": question["question"], "correct": answers[0], "incorrect": answers[1]})
        else:
            dropped[reason] += 1
    report(rows, dropped, asked, seconds)
    if not rows:
        remove_replies(path)
        raise UserError(f"not one of {len(questions)} replies could be parsed, so {path} was not written: try --useFS")
    write_pairs(path, rows)
    remove_replies(path)
    print(f"Wrote {path}; next: dpo.py --dataset_path {path}")


def ask(model, tokenizer, prompts, indices, args, path, settings, done_before):
    """Ask this process's share of the prompts (`indices`), with a progress bar; keep each reply as it comes.

    Returns:
        dict: index -> reply.
    """
    from accelerate import PartialState
    from tqdm import tqdm

    from grath.generation import generate, generate_plainly, way_to_generate

    state = PartialState()
    own = [prompts[i] for i in indices]
    way, reason = generate_plainly, None
    if args.engine == "shared_prefix":
        way, reason = way_to_generate(model, own, args.max_new_tokens)
    engine = "shared_prefix" if way is generate else "generate"
    if reason:
        state.print(f"This model goes through plain batched generation: {reason}")
    state.print(f"Asking {len(own)} questions ({engine}, {model.device}, batches of {args.batch_size})")
    replies, parsed, tokens = {}, 0, 0
    bar = tqdm(total=len(own) + done_before, initial=done_before, unit="question", disable=not state.is_main_process)
    with bar, keep_replies(path, settings, state.process_index) as keep:

        def done(position, ids):
            nonlocal parsed, tokens
            reply = tokenizer.decode(ids, skip_special_tokens=True)
            replies[indices[position]] = reply
            keep(indices[position], reply)
            parsed += parse_reply(reply)[0] is not None
            tokens += len(ids)
            rate = tokens / (time.monotonic() - start)
            bar.set_postfix({"tokens/s": f"{rate:.0f}", "parsed": f"{parsed / len(replies):.0%}"}, refresh=False)
            bar.update()

        start = time.monotonic()
        way(model, own, args.max_new_tokens, args.batch_size, stop_ids(model, tokenizer), done)
    return replies


def report(rows, dropped, asked, seconds):
    """Print what became of the questions."""
    lines = [("asked now", asked), ("written", len(rows))]
    lines += [(f"dropped, {reason}", count) for reason, count in dropped.most_common()]
    lines.append(("identical answers", sum(row["correct"] == row["incorrect"] for row in rows)))
    for field in ("correct", "incorrect") if rows else ():
        lines.append((f"mean words of the {field} answers", f"{mean(len(row[field].split()) for row in rows):.1f}"))
    lines += [("seconds", f"{seconds:.0f}"), ("questions/s", f"{asked / seconds:.2f}" if seconds else "-")]
    for name, value in lines:
        print(f"  {name:45}{value:>8}")


if __name__ == "__main__":
    run(main)
