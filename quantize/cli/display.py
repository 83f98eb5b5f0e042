"""Where results go: tables for people on stderr, or one JSON document on stdout."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from quantize.errors import ParityRefused, QuantizeError, described
from quantize.serialization import to_json

if TYPE_CHECKING:
    from quantize.progress import Progress


class Display:
    """What `--json` and `--quiet` ask for."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self.as_json, self.quiet = as_json, quiet
        if quiet:
            logging.getLogger("quantize").setLevel(logging.ERROR)
        if quiet or not sys.stderr.isatty():
            os.environ["TQDM_DISABLE"] = "1"  # the libraries' own bars, which would fill a log with fragments

    @functools.cached_property
    def progress(self) -> Progress:
        from quantize.cli.console import Terminal
        from quantize.progress import Silent

        return Silent() if self.quiet else Terminal()

    def show(self, record: object, *tables: Callable[[Any], None]) -> None:
        """Print a record as JSON, or as the tables that were made of it."""
        if self.as_json:
            from model_card import visible_json

            click.echo(visible_json(to_json(record)), nl=False)
        elif not self.quiet:
            from quantize.cli.console import Terminal

            console = Terminal().console
            for table in tables:
                table(console)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """With `--json`, known errors are printed as JSON too; a refusal comes after its evidence was printed."""
        try:
            yield
        except QuantizeError as error:
            if self.as_json and not isinstance(error, ParityRefused):
                click.echo(json.dumps({"error": described(error), "kind": type(error).__name__}))
            raise
