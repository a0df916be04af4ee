#!/usr/bin/env python
"""Stage 1 of GRATH: ask a chat model for a correct and an incorrect answer to each question.

    python create_pair_responses.py --model_name_or_path MODEL --save_prefix iter0_arcc --useFS
    python create_pair_responses.py --model_name_or_path MODEL --save_prefix iter0_arcc --useGT --useFS
    accelerate launch --multi_gpu --num_processes 4 create_pair_responses.py ...     splits the questions over four GPUs

Writes {save_dir}/{save_prefix}_num_{N}_useGT_{True|False}_useFS_{True|False}.json: JSON lines with question, correct
and incorrect. N is the number of questions asked. Responses that do not parse are dropped and counted.

Decoding is greedy. In fp32, the same arguments give the same file, byte for byte, for every batch size and number of
processes. In 16 and 4 bits, a token may differ where two logits tie within rounding. In int8, a response depends on its
batch, because bitsandbytes picks outlier columns over all rows. Each response is saved at once: after an interruption,
the same command asks only the questions that are left. {file}.record.json says what the file was made from: the same
command then does nothing, and a different one that would write the same file is refused.

    python create_pair_responses.py --engine server --server_url http://host:8000 ...     see docs/scaling.md

asks inference servers with the OpenAI completions API instead. The key, if they need one, is OPENAI_API_KEY.
"""

import os
import time
from contextlib import ExitStack
from pathlib import Path

from grath.common import defaults
from grath.common.arguments import Parser, positive_int
from grath.common.errors import UserError, run_main
from grath.common.files import check_writable, sha256
from grath.common.layout import pair_file_name, record_path
from grath.common.progress import progress_bar
from grath.common.record import add_warnings, read_record, recording
from grath.modeling.chat import MODEL_TYPES, TODAY, prompt_ids, template_for
from grath.modeling.devices import check_shared, init_distributed
from grath.modeling.loading import check_vocabulary, load_for_inference, load_tokenizer
from grath.modeling.precision import PRECISIONS, SERVER
from grath.pairs.files import write_pairs
from grath.pairs.prompts import build_messages, load_demos
from grath.pairs.questions import load_questions
from grath.pairs.record import describe_pairs, is_finished, settings_of
from grath.pairs.responses import (
    CUT,
    OF_CUT,
    load_responses,
    opens_reasoning,
    parse_response,
    parse_responses,
    remove_responses,
    save_responses,
)
from grath.pairs.stats import count_identical
from grath.pairs.truth import format_signal, truth_signal


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="hub name, model folder or LoRA adapter's folder")
    add("--save_prefix", required=True, help="beginning of the file name, for example iter0_arcc")
    add("--useFS", action="store_true", help="put six few-shot examples before the question (the paper's choice)")
    add("--useGT", action="store_true", help="show the model a correct and an incorrect candidate from the choices")
    add("--data_name", default=defaults.DATA_NAME, help="data set in the ARC schema, on the hub or in a local folder")
    add("--subdata_name", default=defaults.SUBDATA_NAME, help="its configuration")
    add("--split", default=defaults.SPLIT, help="its split")
    add("--data_path", help="local JSON-lines file in the ARC schema, instead of --data_name")
    add("--num_query", type=positive_int, help="ask only the first N questions; if left out, all")
    add("--tokenizer_name", help="tokenizer's name or folder; if left out, the model's")
    add("--model_type", choices=MODEL_TYPES, default="auto", help="chat template; auto: the tokenizer's own")
    add("--demos", default=defaults.DEMOS, help="few-shot examples for --useFS: a name in demos/ or a JSON file")
    add("--seed", type=int, default=0, help="draws the incorrect candidate for --useGT")
    add("--save_dir", type=Path, default=Path("data/truthfulness"), help="folder of the pair file")
    add("--max_new_tokens", type=positive_int, default=defaults.MAX_NEW_TOKENS, help="maximum tokens of a response")
    rows = "questions at once, in each process (64; the engine on a GPU: 256, if they fit), or at a server (512)"
    add("--batch_size", type=positive_int, help=rows)
    engines = "shared_prefix: compute the common prefix once; generate: transformers' generate; server: --server_url"
    add("--engine", choices=("shared_prefix", "generate", SERVER), default="shared_prefix", help=engines)
    add("--server_url", nargs="+", help="servers of --engine server, which share the questions")
    add("--server_timeout", type=positive_int, default=defaults.SERVER_TIMEOUT, help="seconds to wait for lost servers")
    add("--precision", choices=PRECISIONS, default="auto", help="auto: int8 on a CUDA GPU, bf16 on a CPU")
    add("--overwrite", action="store_true", help="write the pair file again, whatever it was made from")
    args = parser.parse_args()
    if Path(args.save_prefix).name != args.save_prefix:
        raise UserError(f"--save_prefix {args.save_prefix!r} must be a plain file name: use --save_dir for the folder")
    if bool(args.server_url) != (args.engine == SERVER):
        raise UserError("--engine server needs --server_url http://host:port, and --server_url needs --engine server")
    if args.engine == SERVER and args.precision != "auto":
        raise UserError("--precision: with --engine server, the server decides it")
    if args.engine == SERVER and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("--engine server runs in one process: the servers share the questions")
    return args


def main():
    args = parse_args()
    check_writable(args.save_dir)
    demos = load_demos(args.demos) if args.useFS else []
    questions = load_questions(args.data_name, args.subdata_name, args.split, args.data_path)
    if args.num_query and args.num_query > len(questions):
        raise UserError(f"--num_query {args.num_query}: there are only {len(questions)} questions")
    questions = questions[: args.num_query]
    path = args.save_dir / pair_file_name(args.save_prefix, len(questions), args.useGT, args.useFS)
    messages = [build_messages(question, args.seed, args.useGT, demos) for question in questions]
    earlier = recorded = None if args.overwrite else read_record(record_path(path))
    inputs = describe_pairs(args, questions, messages, earlier)
    if earlier and earlier["inputs"] != inputs and earlier.get("counts", {}).get("written") == 0:
        earlier = None  # no response could be parsed, so other settings may follow
    finished = not args.overwrite and is_finished(path, earlier, inputs)
    check_shared((finished, earlier is None), args.save_dir)
    if finished:
        remove_responses(path)
        if os.environ.get("RANK", "0") == "0":
            print(f"{path} contains these pairs, finished; --overwrite writes them again")
        return
    tokenizer = load_tokenizer(args.model_name_or_path, args.tokenizer_name)
    template = template_for(tokenizer, args.model_type)
    prompts = [prompt_ids(tokenizer, turns, template) for turns in messages]
    check_vocabulary(args.model_name_or_path, tokenizer, prompts)
    opened = opens_reasoning(tokenizer.decode(prompts[0]))

    from accelerate.utils import gather_object

    from grath.generation.select import LocalGenerator, ServerGenerator
    from grath.serving.served import compare_with_local, serve

    state = init_distributed()
    responses = load_responses(path) if earlier else {}
    if responses:
        state.print(f"{len(responses)} of {len(questions)} questions were answered before the interruption")
    left = [i for i in range(len(questions)) if i not in responses]
    with ExitStack() as stack:
        generator = None
        if left:
            model, limits = args.model_name_or_path, (args.max_new_tokens, args.batch_size)
            if args.engine == SERVER:
                served = stack.enter_context(serve(model, args.server_url, args.server_timeout))
                print(compare_with_local(served, model, tokenizer), flush=True)
                generator = ServerGenerator(served, model, tokenizer, *limits)
            else:
                loaded = load_for_inference(model, inputs["precision"])
                generator = LocalGenerator(loaded, tokenizer, *limits, args.engine)
            longest = max(map(len, prompts))
            if generator.window and longest + args.max_new_tokens > generator.window:
                raise UserError(
                    f"--max_new_tokens {args.max_new_tokens}: a prompt has {longest} tokens, and both together exceed "
                    f"the model's context window of {generator.window}"
                )

        def start_over():
            remove_responses(path)
            path.unlink(missing_ok=True)

        seen, clear = None if args.overwrite else recorded or {}, None if earlier else start_over
        lock = recording(record_path(path), inputs, earlier, seen, state.is_main_process, clear=clear)
        record = stack.enter_context(lock)
        add_warnings(record, getattr(getattr(generator, "model", None), "load_warnings", []))
        state.wait_for_everyone()  # until the main process has the lock
        start, saved = time.monotonic(), f"{record['starts']}.{state.process_index}"
        with state.split_between_processes(left) as mine:
            answers = ask(state, generator, prompts, mine, path, saved, opened) if mine else {}
            responses |= gather_object(list(answers.items()))
        seconds = time.monotonic() - start
        if not state.is_main_process:
            return
        rows, dropped = parse_responses(questions, responses)
        print_counts(rows, questions, dropped, len(left), seconds)
        record |= {"model": args.model_name_or_path, "settings": settings_of(args), "chat_date": str(TODAY)}
        if generator:
            record["rows"] = generator.rows
        record["counts"] = {"asked": len(questions), "written": len(rows), "identical": count_identical(rows)}
        if rows:
            write_pairs(path, rows)
            record["files"] = {path.name: sha256(path)}
    if not rows:
        advice = "another --model_type" if args.useFS else "--useFS"
        advice = "a larger --max_new_tokens" if [*dropped] == [OF_CUT] else advice
        raise UserError(
            f"none of {len(questions)} responses could be parsed, so {path} was not written: try {advice}. The first "
            f"response is {responses[0][:200]!r}"
        )
    remove_responses(path)
    print(f"Wrote {path}; next: dpo.py --dataset_path {path}")


def ask(state, generator, prompts, indices, path, saved, opened):
    """Generate responses to this process's prompts (`indices`), with a progress bar; save each response at once.

    Its file of saved responses is called `saved`; a response begins with what the prompt has `opened` for it.

    Returns:
        dict: index of the question -> response.
    """
    responses, parsed = {}, 0
    process = f", process 1 of {state.num_processes}" if state.num_processes > 1 else ""
    bar = progress_bar(desc=f"Pairs{process}", total=len(indices), unit=" questions", shown=state.is_main_process)
    with bar, save_responses(path, saved) as save:
        for position, response, cut in generator.generate([prompts[i] for i in indices]):
            index, response = indices[position], opened + response
            response += CUT if cut else ""
            save(index, response)
            responses[index] = response
            parsed += parse_response(response)[0] is not None
            bar.set_postfix(parsed=f"{parsed / len(responses):.0%}", refresh=False)
            bar.update()
    return responses


def print_counts(rows, questions, dropped, asked, seconds):
    """Print the numbers of questions, pairs and dropped responses, the speed, and the truth signal (docs/method.md)."""
    reasons = "".join(f"; dropped, {reason}: {count}" for reason, count in dropped.most_common())
    rate = f"{asked / seconds:.2f}" if seconds else "-"
    print(f"{asked} questions in {seconds:.0f} s, {rate} per second")
    print(f"{len(rows)} pairs, {count_identical(rows)} with identical answers, of {len(questions)} responses{reasons}")
    if found := truth_signal(rows, questions):
        correct, incorrect = found["decided"]
        print(
            f"truth signal {format_signal(found)}: {found['correct']:.3f} of {correct} correct answers and "
            f"{found['incorrect']:.3f} of {incorrect} incorrect answers mean the gold one, "
            f"{sum(found['undecided'])} are undecided"
        )


if __name__ == "__main__":
    run_main(main)
