"""Every path and name: of the project, of local copies of the hub, of a run's folder, of an adapter's folder."""

import os
from pathlib import Path

from grath.common.errors import UserError

PROJECT = Path(__file__).resolve().parent.parent.parent
# A folder with every model and data set under its hub name (prefetch.sh fills it). If set, the hub is not used.
DATASETS_ROOT = os.environ.get("DATASETS_ROOT")
if DATASETS_ROOT:
    os.environ["HF_HUB_OFFLINE"] = "1"

# In the folder of an adapter: its weights, its configuration, the record, log and plot of its training.
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
TRAINING_RECORD = "grath.json"
TRAINING_LOG = "training_log.jsonl"
TRAINING_PLOT = "training.png"
# In the folder of a merged model: which adapter was merged into it.
MERGE_RECORD = "grath_merge.json"
# In a folder of scores: the record of what they depend on, and the model's own answers.
SCORES_RECORD = "settings.json"
SAMPLES = "samples.jsonl"
# In the folder of a run.
REPORT = "report.md"
PAIR_STATS = "pairs.json"
COMBINED = "_combined"


def resolve_local(name):
    """Return the folder of a hub name in `DATASETS_ROOT`, or the name itself, a local path with its `~` expanded.

    Raises:
        UserError: the file system does not accept the name.
    """
    try:
        name = str(Path(name).expanduser())
        is_local = Path(name).exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, `~` of a user who does not exist
        raise UserError(f"there is no model or data set {name[:100]!r}: {error}"[:300]) from None
    if is_local or not DATASETS_ROOT:
        return name
    folder = Path(DATASETS_ROOT).resolve() / name
    return str(folder) if folder.is_dir() else name


def run_folder(runs_dir, name, seed):
    """Return the folder of a run: Path."""
    return Path(runs_dir) / f"{name}_seed_{seed}"


def pair_file_name(save_prefix, num_query, use_gt, use_fs):
    """Return the name of the pair file for `num_query` questions."""
    return f"{save_prefix}_num_{num_query}_useGT_{use_gt}_useFS_{use_fs}.json"


def save_prefix(iteration):
    """Return the beginning of the names of the pair files that M_i writes; `iteration` is i."""
    return f"iter{iteration}_arcc"


def pairs_path(run, iteration, num_query, use_gt, use_fs):
    """Return the pair file that M_i writes in a run's folder: Path."""
    return Path(run) / "data" / pair_file_name(save_prefix(iteration), num_query, use_gt, use_fs)


def combined_path(path):
    """Return the path of the combined file that belongs to the new pair file `path`."""
    return path.with_name(f"{path.stem}{COMBINED}.json")


def written_path(path):
    """Return the pair file that a model wrote: `path`, or the one with new answers if `path` is a combined file."""
    return path.with_name(f"{path.stem.removesuffix(COMBINED)}.json")


def record_path(path):
    """Return the path of the record of the pair file `path`."""
    return path.with_name(f"{path.name}.record.json")


def model_path(run, iteration, num_query, use_gt, use_fs):
    """Return the folder of M_i, an adapter, in a run's folder: Path."""
    return Path(run) / "models" / Path(pair_file_name(f"iter_{iteration}_arcc", num_query, use_gt, use_fs)).stem


def results_path(run, iteration):
    """Return the folder of the scores of M_i in a run's folder: Path."""
    return Path(run) / "results" / f"iter_{iteration}"


def find_pairs(run, iteration):
    """Return the pair file that M_i wrote in a run's folder, whatever its settings: Path, or None."""
    files = sorted(Path(run).glob(f"data/{save_prefix(iteration)}_num_*_useFS_*.json"))
    return next((file for file in files if file.stem.endswith(("_True", "_False"))), None)


def find_model(run, iteration):
    """Return the folder of M_i in a run's folder, whatever its settings: Path, or None."""
    return next(iter(sorted(Path(run).glob(f"models/iter_{iteration}_*"))), None)


def is_run(folder):
    """Return whether a folder (Path) is the folder of a run."""
    return any(any(folder.glob(path)) for path in ("models/iter_*", "data/iter*_arcc_*", "results/iter_0"))
