"""GRATH: what the stages' scripts share. Nothing here imports a script."""

__version__ = "0.1.0"
