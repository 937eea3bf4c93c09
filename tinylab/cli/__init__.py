"""The command line: one module per group of verbs, each verb a thin typed function over the package."""

from tinylab.cli.command import main

__all__ = ["main"]
