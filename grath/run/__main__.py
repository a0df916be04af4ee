"""What the shell scripts ask of Python.

    python -m grath.run settings FOLDER       print the settings as lines for bash; FOLDER is the project that asks
    python -m grath.run check TITLE...        check the machine for the run and print its plan
    python -m grath.run unscored              print the newest run and its models as lines for bash
    python -m grath.run configuration         print docs/configuration.md

Settings come from the environment: see docs/configuration.md.
"""

from pathlib import Path

from grath.common.arguments import Parser
from grath.common.errors import PACKAGE, UserError, run_main
from grath.common.layout import PROJECT


def main():
    parser = Parser(__doc__)
    parser.add_argument("command", choices=("settings", "check", "unscored", "configuration"))
    parser.add_argument("arguments", nargs="*", help="settings: the project that asks; check: titles of the stages")
    args = parser.parse_args()
    # Each command imports what it needs.
    if args.command == "configuration":
        from grath.run.settings import configuration_page

        print(configuration_page(), end="")
    elif args.command == "settings":
        from grath.run.settings import check_start, read_settings, shell_lines

        if PROJECT not in [Path(folder).resolve() for folder in args.arguments]:
            raise UserError(f"python has the project in {PROJECT}: run `{PACKAGE}` here first")
        values = read_settings()
        print(shell_lines(values if values["DRY_RUN"] == "1" else check_start(values)), end="")
    elif args.command == "unscored":
        from grath.run.unscored import unscored_lines

        print(unscored_lines(), end="")
    else:
        from grath.run.check import check_run

        check_run(args.arguments)


if __name__ == "__main__":
    run_main(main)
