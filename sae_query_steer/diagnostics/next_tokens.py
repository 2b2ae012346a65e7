"""Where a change of queries should lead: the next token that another class has at a span."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.data.batches import example_batches
from sae_query_steer.data.tokenized import TokenizedExample
from sae_query_steer.diagnostics.interchange_pairs import Pair
from sae_query_steer.models.activations import next_token_log_probs
from sae_query_steer.scopes.positions import Span


@dataclass(frozen=True, kw_only=True, eq=False)
class Aims:
    """The next token that each pair's donor stands for, and how far the receiver is from it."""

    log_probs: Mapping[int, Float[Tensor, " d_vocab"]]
    """By the index of the donor: log of the mean distribution of its class, or of its own where
    it is the receiver's counterpart."""

    gaps: Float[Tensor, " pair"]
    """KL(c || next token of the receiver) - KL(c || next token of the donor), in nats: by how much
    a real prompt of the other class is nearer to what the class says."""


def aims_of(
    model: Any,
    examples: Sequence[TokenizedExample],
    pairs: Sequence[Pair],
    span: Span,
    *,
    counterparts: bool,
    batch_size: int,
) -> Aims:
    """Return where the pairs lead.

    For the gaps the donor is left out of its class's mean, as the receiver is: otherwise it would
    be near to the mean because it is a part of it.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        examples: of all classes.
        pairs: receivers and donors.
        span: where the next token is read.
        counterparts: whether a donor stands for itself and not for its class.
        batch_size: rows of one forward pass.
    """
    looked_at = {pair.receiver for pair in pairs} | {pair.other for pair in pairs}
    sums: dict[int, Tensor] = {}
    mean_logs: dict[int, Tensor] = {}
    totals: dict[str, Tensor] = {}
    counts: dict[int, int] = {}
    for batch in example_batches(examples, batch_size):
        rows, columns = batch.mask(span).nonzero(as_tuple=True)
        logs = next_token_log_probs(model, batch.tokens, rows, columns).cpu().double()
        for row, index in enumerate(batch.indices):
            own = logs[rows == row]
            total, label = own.exp().sum(0), batch.labels[row]
            counts[index] = len(own)
            totals[label] = totals[label] + total if label in totals else total
            if index in looked_at:
                sums[index], mean_logs[index] = total.float(), own.mean(0).float()
    n_tokens: dict[str, int] = {}
    for index, n in counts.items():
        n_tokens[examples[index].label] = n_tokens.get(examples[index].label, 0) + n
    classes = {label: (total / n_tokens[label]).log().float() for label, total in totals.items()}

    gaps, aims = [], {}
    for pair in pairs:
        label, donor = examples[pair.other].label, pair.other
        if counterparts:
            goal = sums[donor].double() / counts[donor]
            aims[donor] = goal.log().float()
        else:
            rest = n_tokens[label] - counts[donor]
            goal = (totals[label] - sums[donor]).clamp(min=0) / rest
            aims[donor] = classes[label]
        # What no text of the class says has no part in KL(c || .).
        nearer = mean_logs[donor].double() - mean_logs[pair.receiver].double()
        gaps.append((goal * nearer).where(goal > 0, 0.0).sum())
    return Aims(log_probs=aims, gaps=torch.stack(gaps))
