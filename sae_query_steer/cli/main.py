"""The command line: the tutor's demo, and the chain on a model of your own."""

import logging
import warnings

import typer

from sae_query_steer.cli import chain, dashboard, publish, sweep, train, tutor

app = typer.Typer(
    help="Steer language models by gradient descent on sparse features of attention queries.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    tutor.demo,
    train.train,
    chain.targets,
    chain.sites,
    chain.steer,
    dashboard.dashboard,
    sweep.sweep,
    publish.bundle,
    publish.push,
    publish.registry_entry,
):
    app.command()(command)


def main() -> None:
    """Run the command line; bad input ends it with one line and exit status 2."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", DeprecationWarning)
    try:
        app()
    except (ValueError, TypeError, OSError) as error:
        said = str(error).strip()
        if isinstance(error, OSError):  # the first line says it; what follows is about the hub
            said = said.partition("\n")[0]
        typer.echo(f"sae-query-steer: {said}", err=True)
        raise SystemExit(2) from None
