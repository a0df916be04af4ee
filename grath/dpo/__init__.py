"""Stage 3: direct preference optimization."""

from dataclasses import field


def option(default, help, **metadata):
    """Return a dataclass field for `HfArgumentParser`."""
    return field(default=default, metadata={"help": help, **metadata})
