"""The command line: one module per group of verbs, each verb a thin typed function over the package."""

from __future__ import annotations

from tinylab.cli.command import main

__all__ = ["main"]
