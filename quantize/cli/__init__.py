"""The command line."""

from quantize.cli.commands import main

__all__ = ["main"]
