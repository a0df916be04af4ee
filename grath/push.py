"""Push an adapter, or the model that it was merged into, to the Hugging Face hub, with a model card.

    python -m grath.push ADAPTER NAMESPACE/NAME
    python -m grath.push ADAPTER NAMESPACE/NAME --merged MODEL     MODEL is what `python -m grath.export` wrote

Log in first (`hf auth login`). The card, README.md in the pushed folder, names the base, the data, the settings and the
versions; for an adapter of a run, also the scores of the run. A card that is there already is kept, apart from TRL's;
remove it to get a new one. Checkpoints and records stay on this machine.
"""

import json
import os
from pathlib import Path

from grath.common.arguments import Parser
from grath.common.errors import UserError, first_line, run_main
from grath.common.files import atomic_write_text, read_json
from grath.common.layout import ADAPTER, ADAPTER_CONFIG, MERGE_RECORD, TRAINING_LOG, TRAINING_PLOT, TRAINING_RECORD
from grath.common.record import OF_TRAINING, check_files, read_record
from grath.report.card import CARD, hub_name, model_card

OF_ADAPTER = [CARD, ADAPTER, TRAINING_LOG, TRAINING_PLOT]
OF_MODEL = ["*.md", "*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
# What TRL's own card contains, which is written with every checkpoint and knows neither base nor data.
OF_TRL = "generated_from_trainer"


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
    base = hub_name(record["base_model"])
    if not args.merged and not base:
        raise UserError(
            f"{record['base_model']}, the base of {args.adapter}, is not on the hub: merge the adapter into it "
            "(python -m grath.export) and push the merged model (--merged)"
        )
    folder = args.merged or args.adapter
    if args.merged:
        merge = args.merged / MERGE_RECORD
        shape = {"adapter_sha256": str, "files?": {str: str}}
        known = read_json(merge, "record of a merge", shape) if merge.is_file() else {}
        merged = known.get("adapter_sha256") == record["files"][ADAPTER]
        if not (merged and check_files(known, args.merged, "merge the adapter again")):
            command = f"python -m grath.export {args.adapter} {args.merged}"
            raise UserError(f"{args.merged} is not {args.adapter} merged: write it with `{command}`")
    card = folder / CARD
    if not card.is_file() or OF_TRL in card.read_text(encoding="utf-8", errors="replace"):
        atomic_write_text(card, model_card(args.adapter, record, args.name, bool(args.merged)))

    from huggingface_hub import HfApi

    try:
        api = HfApi(library_name="grath")
        url = api.create_repo(args.name, private=args.private, exist_ok=True)
        patterns = OF_MODEL if args.merged else OF_ADAPTER
        if not args.merged:  # the base's name on the hub, not a folder of this machine
            config = read_json(args.adapter / ADAPTER_CONFIG, "adapter configuration")
            text = json.dumps(config | {"base_model_name_or_path": base}, indent=2)
            api.upload_file(path_or_fileobj=text.encode(), path_in_repo=ADAPTER_CONFIG, repo_id=url.repo_id)
        api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, allow_patterns=patterns, ignore_patterns=["*/*", MERGE_RECORD]
        )
    except Exception as error:  # the hub client raises many kinds of errors
        raise UserError(f"cannot push to {args.name}: {first_line(error)} (the card is {card})") from error
    print(f"Pushed {folder} to {url}; next: add the base's licence to {card}, and push again")


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "")  # the hub client's bars show the upload
    run_main(main)
