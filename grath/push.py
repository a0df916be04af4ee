"""Push an adapter, or the model that it was merged into, to the Hugging Face hub, with a model card.

    python -m grath.push ADAPTER NAMESPACE/NAME
    python -m grath.push ADAPTER NAMESPACE/NAME --merged MODEL     MODEL is what `python -m grath.export` wrote

Log in first (`hf auth login`). The card, README.md in the pushed folder, names the base, the data, the settings and the
versions; for an adapter of a run, also the scores of the run. Checkpoints and records stay on this machine.
"""

from pathlib import Path

from grath.common.arguments import Parser
from grath.common.errors import UserError, first_line, run_main
from grath.common.files import atomic_write_text
from grath.common.layout import ADAPTER, ADAPTER_CONFIG, TRAINING_LOG, TRAINING_PLOT, TRAINING_RECORD
from grath.common.record import OF_TRAINING, check_files, read_record
from grath.report.card import CARD, model_card

PUSHED = (CARD, ADAPTER, ADAPTER_CONFIG, TRAINING_LOG, TRAINING_PLOT)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("adapter", type=Path, help="the adapter folder, written by dpo.py")
    add("name", help="repository on the hub: NAMESPACE/NAME")
    add("--merged", type=Path, help="push this model instead, into which the adapter was merged")
    add("--private", action="store_true", help="make a new repository private")
    args = parser.parse_args()
    record = read_record(args.adapter / TRAINING_RECORD, OF_TRAINING)
    if not (record and check_files(record, args.adapter, "only what dpo.py wrote has a card")):
        raise UserError(f"{args.adapter} contains no finished training of dpo.py")
    if not args.merged and Path(record["base_model"]).exists():
        raise UserError(
            f"{record['base_model']}, the base of {args.adapter}, is a folder of this machine: merge the adapter into "
            "it (python -m grath.export) and push the merged model (--merged)"
        )
    folder = args.merged or args.adapter
    if args.merged and not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no model folder: write it with `python -m grath.export {args.adapter} {folder}`")
    atomic_write_text(folder / CARD, model_card(args.adapter, record, args.name, bool(args.merged)))

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        api = HfApi(library_name="grath")
        url = api.create_repo(args.name, private=args.private, exist_ok=True)
        api.upload_folder(repo_id=args.name, folder_path=folder, allow_patterns=None if args.merged else list(PUSHED))
    except (HfHubHTTPError, HFValidationError, ConnectionError) as error:
        raise UserError(f"cannot push to {args.name}: {first_line(error)} (the card is {folder / CARD})") from error
    print(f"Pushed {folder} to {url}; next: look at its card there, and add the licence of the base to it")


if __name__ == "__main__":
    run_main(main)
