"""Copy what runs show to results/: no weights, no pair files (they quote ARC), and no places of this machine.

    python results/publish.py RUN_DIR [RUN_DIR ...] [--place PATH=TEXT ...]

Write the report of each run first (`python results/study.py RUN_DIR`). In every text, the folder of the runs becomes
`runs`, the project `.`, and DATASETS_ROOT `$folder`; --place replaces other paths.
"""

import shutil
from pathlib import Path

from grath.common.arguments import Parser
from grath.common.errors import UserError, run_main
from grath.common.files import sha256
from grath.common.layout import DATASETS_ROOT, PAIR_STATS, PROJECT, REPORT, SCORES_RECORD
from grath.common.record import read_record, write_record

SHOWN = (
    REPORT,
    PAIR_STATS,
    "iterations.png",
    "data/*.record.json",
    "data/*.distance.json",
    "models/*/grath.json",
    "models/*/training_log.jsonl",
    "models/*/training.png",
    "results/*/*.json",
    "results/*/samples.jsonl",
)


def publish(run_dir, places, folder):
    """Copy a run's shown files into a folder, with `places` (path -> text) replaced; return the new folder."""
    target = folder / run_dir.name
    if target.resolve() == run_dir:
        raise UserError(f"{run_dir} is the folder that the copy would replace: choose another --folder")
    partial = folder / f".{run_dir.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for pattern in SHOWN:
        for file in sorted(run_dir.glob(pattern)):
            copy = partial / file.relative_to(run_dir)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".png":
                shutil.copyfile(file, copy)
                continue
            text = file.read_text(encoding="utf-8")
            for path in sorted(places, key=len, reverse=True):  # a place inside another one first
                text = text.replace(path, places[path])
            copy.write_text(text, encoding="utf-8")
    for path in partial.glob(f"results/*/{SCORES_RECORD}"):
        record = read_record(path)
        record["files"] = {
            name: sha256(path.parent / name) for name in record.get("files", ()) if (path.parent / name).is_file()
        }  # of the copies
        write_record(path, record)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return target


def main():
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders with a report")
    parser.add_argument("--place", nargs="+", default=[], help="PATH=TEXT: replace a path in every text")
    parser.add_argument("--folder", type=Path, default=PROJECT / "results", help="where the copies go")
    args = parser.parse_args()
    if wrong := [place for place in args.place if "=" not in place]:
        parser.error(f"--place {wrong[0]} is not PATH=TEXT")
    given = dict(place.split("=", 1) for place in args.place)
    for run_dir in map(Path.resolve, args.runs):
        if not (run_dir / PAIR_STATS).is_file():
            raise UserError(f"{run_dir} has no {PAIR_STATS}: run `python results/study.py {run_dir}` first")
        own = {str(run_dir.parent): "runs", str(PROJECT): "."}
        if DATASETS_ROOT:
            own |= {str(path): "$folder" for path in (Path(DATASETS_ROOT).absolute(), Path(DATASETS_ROOT).resolve())}
        print(f"Wrote {publish(run_dir, given | own, args.folder)}")


if __name__ == "__main__":
    run_main(main)
