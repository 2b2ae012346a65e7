"""The entry point of the command line."""

import logging
import sys
import warnings
from collections.abc import Sequence

import tyro

from sae_query_steer.cli.compare import demo, sweep
from sae_query_steer.cli.publish import bundle, dashboard, push, registry_entry
from sae_query_steer.cli.steer import sites, steer, targets
from sae_query_steer.cli.train import train

COMMANDS = (
    *(demo, train, targets, sites, steer, dashboard),
    *(sweep, bundle, push, registry_entry),
)


def run(arguments: Sequence[str]) -> None:
    """Run one command.

    Raises:
        OSError, TypeError, ValueError: bad input.
        SystemExit: help was asked for, or an option is wrong.
    """
    tyro.extras.subcommand_cli_from_dict(
        {command.__name__.replace("_", "-"): command for command in COMMANDS},
        prog="sae-query-steer",
        description="Steer language models by gradient descent on sparse features of queries.",
        args=list(arguments),
        config=(tyro.conf.CascadeSubcommandArgs,),
    )


def main() -> None:
    """Run the command line; bad input ends it with one line and exit status 2."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", DeprecationWarning)
    try:
        run(sys.argv[1:])
    except (ValueError, TypeError, OSError) as error:
        text = str(error).strip()
        if isinstance(error, OSError):  # the lines after the first are about the hub
            text = text.partition("\n")[0]
        sys.stderr.write(f"sae-query-steer: {text}\n")
        raise SystemExit(2) from None
