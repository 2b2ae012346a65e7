"""The entry point of the command line."""

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from sae_query_steer.cli.compare import demo, sweep, trial
from sae_query_steer.cli.lm_eval import lm_eval
from sae_query_steer.cli.publish import bundle, dashboard, push, registry_entry
from sae_query_steer.cli.steer import sites, steer, targets
from sae_query_steer.cli.train import train
from sae_query_steer.storage.folders import locked

COMMANDS = (
    *(demo, trial, train, targets, sites, steer, dashboard),
    *(sweep, lm_eval, bundle, push, registry_entry),
)


def run(arguments: Sequence[str]) -> None:
    """Run one command.

    Raises:
        ImportError: an extra is missing.
        OSError, TypeError, ValueError: bad input.
        SystemExit: help was asked for, or an option is wrong.
    """
    tyro.extras.subcommand_cli_from_dict(
        {command.__name__.replace("_", "-"): _locking(command) for command in COMMANDS},
        prog="sae-query-steer",
        description="Steer language models by gradient descent on sparse features of queries.",
        args=list(arguments),
        config=(tyro.conf.CascadeSubcommandArgs,),
    )


def _locking(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that locks its output folder until it ends."""

    @functools.wraps(command)
    def run_locked(**options: Any) -> None:
        out = getattr(options.get("output"), "out", None)
        # The first process of a launch locks for all.
        if out is None or options.get("dry_run") or os.environ.get("RANK", "0") != "0":
            return command(**options)
        with locked(out):
            return command(**options)

    return run_locked


def main() -> None:
    """Run the command line; bad input ends it with one line and exit status 2."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", DeprecationWarning)
    try:
        run(sys.argv[1:])
    except (ValueError, TypeError, OSError, ImportError) as error:
        text = str(error).strip()
        if isinstance(error, OSError):  # the lines after the first are about the hub
            text = text.partition("\n")[0]
        sys.stderr.write(f"sae-query-steer: {text}\n")
        raise SystemExit(2) from None
