"""What the shell scripts call.

    python -m grath.pipeline settings                            print every setting as a shell's `export` line
    python -m grath.pipeline configuration                       print docs/configuration.md
    python -m grath.pipeline loop SCRIPT                         run the loop's script under the lock of its run
    python -m grath.pipeline start                               prepare the run's folder
    python -m grath.pipeline stage RUN --stage NAME ... -- COMMAND   run a stage, unless its outputs are up to date
    python -m grath.pipeline check -- STAGE=TITLE ...            check the machine for the run and print the plan
    python -m grath.pipeline evaluate [MODEL [OUTPUT]]           score a model, or what the newest run has not scored

Settings come from the environment: see docs/configuration.md.
"""

from pathlib import Path

from grath.common.arguments import Parser
from grath.common.errors import run_main


def parse_args():
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=type(parser))
    for name, text in (
        ("settings", "print the settings for a shell"),
        ("configuration", "print docs/configuration.md"),
        ("start", "prepare the run's folder"),
        ("check", "check the machine for the run"),
    ):
        commands.add_parser(name, description=text)
    commands.add_parser("loop", description="run the loop's script").add_argument("script", help="run_grath.sh")
    score = commands.add_parser("evaluate", description="score a model, or what the newest run has not scored")
    score.add_argument("model", nargs="?", help="hub name, model folder or LoRA adapter folder")
    score.add_argument("output", nargs="?", help="folder of the results; if left out, scores/ and the model's name")
    stage = commands.add_parser("stage", description="run a stage")
    stage.add_argument("run", type=Path, help="the run's folder")
    stage.add_argument("--stage", required=True, help="its name")
    stage.add_argument("--iteration", type=int, required=True, help="its iteration, 0 for the base's scores")
    stage.add_argument("--title", required=True, help="what is printed")
    stage.add_argument("--input", nargs="+", default=[], help="files, model folders or hub names that it reads")
    stage.add_argument("--output", nargs="+", required=True, help="files that it writes")
    stage.add_argument(
        "--questions", action="store_true", help="it also reads the questions and few-shot examples, or GOLD_PAIRS"
    )
    return parser.parse_with_rest()


def main():
    args = parse_args()
    # Each command imports what it needs: the first two run in a fraction of a second.
    if args.command == "configuration":
        from grath.pipeline.configuration import configuration_page

        print(configuration_page(), end="")
        return 0
    if args.command == "loop":
        from grath.pipeline.loop import run_loop

        return run_loop(args.script)
    if args.command == "stage":
        from grath.pipeline.stage import run_stage

        return run_stage(args)
    if args.command == "evaluate":
        from grath.pipeline.evaluate import evaluate

        return evaluate(args.model, args.output)
    from grath.pipeline.settings import read_settings

    values = read_settings()
    if args.command == "settings":
        from grath.pipeline.shell import shell_lines

        print(shell_lines(values), end="")
    elif args.command == "start":
        from grath.pipeline.start import start

        start(values)
    else:
        from grath.pipeline.preflight import check_run

        check_run(values, [stage.split("=", 1) for stage in args.rest])
    return 0


if __name__ == "__main__":
    run_main(main)
