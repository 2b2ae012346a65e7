"""Record queries with their labels: one forward pass, many sites."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_query_steer.data.examples import TokenBatch, TokenizedExample, length_sorted_batches
from sae_query_steer.models.fingerprint import Fingerprint, dtype_name, fingerprint_tokens
from sae_query_steer.models.loading import check_not_steered, queries_at, without_hooks
from sae_query_steer.sae.encoders import QueryEncoder, device_of, encoded, encoder_sites
from sae_query_steer.scopes.positions import Positions, Span, select
from sae_query_steer.scopes.prompt_lengths import by_position


@dataclass(frozen=True, kw_only=True, eq=False)
class SpanQueries:
    """The queries of one batch at the positions of a span, one row per token."""

    queries: Mapping[str, Float[Tensor, "token head d_head"]]
    """By hook name."""

    row: Int[Tensor, " token"]
    """Index of the example in the sequence that was captured."""

    position: Int[Tensor, " token"]
    """Absolute position of the token in its example."""

    token: Int[Tensor, " token"]
    """Id of the token."""


def batch_positions(batch: TokenBatch) -> Positions:
    """Return the positions of a right-padded batch of whole examples."""
    index = torch.arange(batch.tokens.shape[1]).expand(batch.tokens.shape)
    valid = index < batch.lengths[:, None]
    return Positions(
        index=index,
        valid=valid,
        prompt_lengths=batch.prompt_lengths,
        lengths=batch.lengths,
        tokens=by_position(batch.tokens, valid),
    )


def span_of(batch: TokenBatch, span: Span) -> Tensor:
    """Return the mask of a span over a batch.

    Raises:
        ValueError: an example of the batch has no token in the span.
    """
    mask = select(span, batch_positions(batch))
    if not bool(mask.any(1).all()):
        missing = int((~mask.any(1)).nonzero()[0])
        raise ValueError(
            f"example {batch.indices[missing]} ({batch.labels[missing]!r}) has no token in the "
            f"span {span!r}: its prompt has {int(batch.prompt_lengths[missing])} tokens and its "
            f"response {int(batch.lengths[missing] - batch.prompt_lengths[missing])}"
        )
    return mask


def capture(
    model: Any,
    examples: Sequence[TokenizedExample],
    hook_names: Sequence[str],
    span: Span,
    *,
    batch_size: int = 32,
    description: str = "Reading queries",
) -> Iterator[SpanQueries]:
    """Yield the queries at the span of every example, batch by batch, each example once.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        examples: labelled, tokenised examples.
        hook_names: the sites.
        span: which positions of each example.
        batch_size: rows of one forward pass.
        description: what the progress bar says.

    Raises:
        ValueError: an example has no token in the span, or a query is not finite.
    """
    check_not_steered(model)
    for batch in length_sorted_batches(examples, batch_size):
        span_of(batch, span)  # before the model runs: an example outside the span costs no work
    with tqdm(total=len(examples), desc=description, unit="text") as bar:
        for batch in length_sorted_batches(examples, batch_size):
            mask = span_of(batch, span)
            rows, columns = mask.nonzero(as_tuple=True)
            at_span = {}
            for name, queries in queries_at(model, batch.tokens, hook_names).items():
                at_span[name] = queries[rows.to(queries.device), columns.to(queries.device)]
                check_finite(at_span[name], name)
            yield SpanQueries(
                queries=at_span,
                row=torch.tensor(batch.indices)[rows],
                position=columns,
                token=batch.tokens[rows, columns],
            )
            bar.update(len(batch.labels))


def check_finite(queries: Tensor, hook_name: str) -> None:
    """Raise if a query is NaN or infinite.

    Raises:
        ValueError: the message names the site.
    """
    if not bool(queries.isfinite().all()):
        raise ValueError(
            f"the queries at {hook_name} are not finite: look for an overflow before this layer "
            "(float16 overflows above 65,504; try bfloat16 or float32)"
        )


def take_fingerprint(model: Any, encoders: Mapping[str, QueryEncoder]) -> Fingerprint:
    """Return the fingerprint of a model and its encoders, taken with all hooks set aside."""
    check_devices(model, encoders)
    tokens = fingerprint_tokens(int(model.cfg.d_vocab))
    with without_hooks(model):
        queries = queries_at(model, tokens, list(encoders))
    return Fingerprint(
        tokens=tokens,
        queries={name: query.float().cpu() for name, query in queries.items()},
        reconstructions=reconstructions(encoders, queries),
        dtype=dtype_name(model),
    )


@torch.no_grad()
def reconstructions(
    encoders: Mapping[str, QueryEncoder], queries: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return decode(encode(queries)) of each encoder, on the CPU in 32 bits."""
    return {
        name: encoder.decode(encoded(encoder, queries[name])).float().cpu()
        for name, encoder in encoders.items()
    }


def check_devices(model: Any, encoders: Mapping[str, QueryEncoder]) -> None:
    """Raise unless every encoder lies on the device of its layer.

    Raises:
        ValueError: the message names both devices.
    """
    for name, site in encoder_sites(encoders).items():
        here = next(model.blocks[site.layer].parameters()).device
        there = device_of(encoders[name])
        if there is not None and there.type != here.type:
            raise ValueError(
                f"the SAE at {name} is on {there}, the layer on {here}: move it with "
                f"saes.to({str(here)!r})"
            )
