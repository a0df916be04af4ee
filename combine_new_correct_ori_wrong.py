#!/usr/bin/env python
"""Stage 2 of GRATH: combine new correct answers with the original incorrect ones.

    python combine_new_correct_ori_wrong.py --new_data_path iter1_....json --ori_data_path iter0_....json

Writes {new_data_path without .json}_combined.json: one row for each original row, in the same order, with its question,
the new correct answer to it (the original one if the new file has none) and its own incorrect answer.
"""

from pathlib import Path

from grath.common.arguments import Parser
from grath.common.errors import UserError, run_main
from grath.common.files import check_writable
from grath.common.layout import COMBINED, combined_path
from grath.pairs.files import combine, read_pairs, write_pairs


def main():
    parser = Parser(__doc__)
    parser.add_argument("--new_data_path", type=Path, required=True, help="pairs that the improved model wrote")
    parser.add_argument("--ori_data_path", type=Path, required=True, help="pairs of the first iteration")
    args = parser.parse_args()
    if args.new_data_path.suffix != ".json":
        raise UserError(f"--new_data_path {args.new_data_path} must end with .json")
    for path in (args.new_data_path, args.ori_data_path):
        if path.stem.endswith(COMBINED):
            raise UserError(f"{path} is already a combined file: pass the files that the models wrote")
    if args.new_data_path.resolve() == args.ori_data_path.resolve():
        raise UserError(f"--new_data_path and --ori_data_path are the same file, {args.new_data_path}")
    new_rows = read_pairs(args.new_data_path, "the new pair file")
    ori_rows = read_pairs(args.ori_data_path, "the original pair file")
    check_writable(args.new_data_path.parent)

    rows, missing = combine(new_rows, ori_rows)
    if missing == len(ori_rows):
        raise UserError("the two pair files have no question in common: were they written for the same data set?")
    path = combined_path(args.new_data_path)
    write_pairs(path, rows)
    changed = sum(new["correct"] != old["correct"] for new, old in zip(rows, ori_rows, strict=True))
    print(f"{len(rows)} rows: {changed} correct answers changed, {missing} kept because the new file has none")
    print(f"Wrote {path}; next: dpo.py --dataset_path {path}")


if __name__ == "__main__":
    run_main(main)
