"""What `train --dry-run` says."""

from collections.abc import Sequence

import typer

from sae_query_steer.models.shapes import ModelShape
from sae_query_steer.sites import QuerySite
from sae_query_steer.training.estimate import FORWARD_RATIO, TrainingEstimate


def say(
    shape: ModelShape,
    sites: Sequence[QuerySite],
    estimate: TrainingEstimate,
    documents: Sequence[str],
    flops: float | None = None,
) -> None:
    """Print what a run will take; with the operations a second of a device, its time too."""
    memory = estimate.model_bytes + estimate.training_bytes + estimate.buffer_bytes
    lines = [
        ("model", f"{shape.n_parameters:,} weights, {shape.n_layers} layers"),
        ("queries of a layer", f"{shape.n_heads} heads of {shape.d_head}"),
        ("KV cache", f"{shape.key_value_numbers:,} numbers a token of a row"),
        ("sites", f"layers {', '.join(str(site.layer) for site in sites)}"),
        ("texts", f"{len(documents):,} of {sum(map(len, documents)):,} characters in all"),
        ("tokens", f"{estimate.tokens:,} in {estimate.n_steps:,} steps"),
        ("memory at least", _gib(memory)),
        ("  weights of the model", _gib(estimate.model_bytes)),
        ("  SAEs, gradients, Adam", _gib(estimate.training_bytes)),
        ("  queries to be shuffled", _gib(estimate.buffer_bytes)),
        ("disk", f"{_gib(estimate.disk_bytes)} while it runs, {_gib(estimate.saved_bytes)} after"),
        ("operations a token", f"{_giga(estimate.model_flops)} forward pass up to the last layer"),
        ("", f"{_giga(estimate.sae_flops)} SAEs"),
    ]
    if flops is not None:
        time = f"{estimate.seconds(flops) / 3600:.2g} h at {flops:.3g} operations a second"
        lines.append(("time, extrapolated", f"{time}, {FORWARD_RATIO} times the forward pass"))
    typer.echo("\n".join(f"{what:<26}{told}" for what, told in lines))


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"


def _giga(n: int) -> str:
    return f"{n / 1e9:.2f}e9"
