"""Paths and file names that several stages share."""

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent.parent
# A folder with every model and data set under its hub name (prefetch.sh fills it). If set, the hub is not used.
DATASETS_ROOT = os.environ.get("DATASETS_ROOT")
if DATASETS_ROOT:
    os.environ["HF_HUB_OFFLINE"] = "1"
ADAPTER = "adapter_model.safetensors"
# The record of a training, next to its adapter.
RECORD = "grath.json"
# How the stages of a run compute matrix products on a CPU, and the environment variable that names this file.
CPU_PRODUCTS = "cpu_products.json"
CPU_PRODUCTS_VARIABLE = "GRATH_CPU_PRODUCTS"


def resolve_local(name):
    """Return the folder of a hub name in `DATASETS_ROOT`, or the name itself if there is none."""
    if not DATASETS_ROOT or Path(name).expanduser().exists():
        return name
    folder = Path(DATASETS_ROOT).resolve() / name
    return str(folder) if folder.is_dir() else name
