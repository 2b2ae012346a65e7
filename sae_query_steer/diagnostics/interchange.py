"""The interchange effect: does a site's query decide anything that steering could change?

Real queries of another class are patched in, and the next token is looked at. It is an
on-distribution reference, not a bound: a steer can overshoot it.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from torch import Tensor

from sae_query_steer.data.batches import TokenBatch
from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.data.tokenized import TokenizedExample, TokenizedExamples
from sae_query_steer.diagnostics.interchange_pairs import Pair
from sae_query_steer.diagnostics.query_patches import Patch, Trial, prepared
from sae_query_steer.models.activations import read_at_span
from sae_query_steer.scopes.positions import Span
from sae_query_steer.sites import QuerySite


def interchange_effect(
    model: Any,
    sites: Sequence[QuerySite],
    examples: Sequence[LabelledExample | TokenizedExample],
    *,
    counterparts: Sequence[LabelledExample | TokenizedExample] | None = None,
    span: Span | None = None,
    n_pairs: int = 64,
    per_head: bool = True,
    seed: int = 0,
    prepend_bos: bool = True,
    chat_template: bool = False,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Return how far real queries of another class move the next token, at each site and head.

    For each pair the queries of the donor's span are patched into the receiver's, token by token
    from the start of the span, and the distribution of the next token is read at the patched
    positions. The control patches queries of another example of the receiver's own class: what it
    moves is content, not class.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        sites: where, from `query_sites`.
        examples: labelled examples, two or more of each class.
        counterparts: for each example the same text made for another class, such as the prompt
            with another request, where there are such. The donor is then the counterpart, and c
            below its own next-token distribution: content is equal on both sides, so the class
            stands out more.
        span: which positions are patched; None means the last prompt token.
        n_pairs: pairs, drawn evenly from the classes; every example is a receiver once before one
            is so twice.
        per_head: also patch every head alone, not only all heads of a layer.
        seed: of the pairs.
        prepend_bos: begin every prompt with BOS.
        chat_template: put every prompt into the tokenizer's chat template.
        batch_size: rows of one forward pass.

    Returns:
        A row for each layer, with head "all", and with `per_head` for each of its heads, with
        the columns

        - kl: mean KL(unpatched || patched) of the next token, in nats, donor of another class
        - kl_control: the same, donor of the receiver's own class
        - moved: mean total variation between unpatched and patched: the share of the next token's
          probability that changes hands, donor of another class
        - moved_control: the same, donor of the receiver's own class
        - toward_class: by how many nats the patch lowers KL(c || next token), where c is the mean
          next-token distribution of the donor's class at its own span
        - toward_share: that, as a share of KL(c || unpatched): 1 would be all the way
        - toward_control: the same as toward_class, towards the same c, but with the queries of the
          donor of the receiver's own class: what any patch does
        - class_effect: toward_class minus toward_control. Where it is within two standard errors of
          0, nothing says that the queries of this site carry the class into the next token.
        - class_effect_se: its standard error, the larger of two that count receivers, or donors,
          and not pairs as independent; NaN with fewer than two of either. Two standard errors are
          meant for one site: of forty, about one is beyond them, above, by luck. With fewer than
          some twenty examples a class it is too small.
        - class_share: class_effect as a share of class_gap: how far of the way from the receiver's
          class to the donor's, where 1 is as near as a real prompt of the donor's class. NaN where
          there is no gap.
        - class_gap: KL(c || next token of the receiver) minus KL(c || next token of the donor),
          both unpatched, the donor left out of c: what the class changes in the next token at all
        - class_gap_se: its standard error
        - n_pairs

        `site_verdicts` reads it.

    Raises:
        ValueError: too few examples of a class, or counterparts that do not fit.

    Source: our choice; interchange interventions as in causal abstraction.
    """
    trial = prepared(
        model,
        sites,
        examples,
        counterparts,
        span=span,
        n_pairs=n_pairs,
        per_head=per_head,
        seed=seed,
        prepend_bos=prepend_bos,
        chat_template=chat_template,
        batch_size=batch_size,
    )
    donors = _donor_queries(trial)

    def patches(batch: TokenBatch, mask: Tensor, pairs: Sequence[Pair]) -> tuple[Patch, Patch]:
        del batch
        return (
            Patch.between(mask, [donors[pair.other] for pair in pairs]),
            Patch.between(mask, [donors[pair.control] for pair in pairs]),
        )

    return trial.table(patches, "Patching queries")


def _donor_queries(trial: Trial) -> dict[int, dict[str, Tensor]]:
    """Return the queries at the span of every donor, [token head d_head] by hook name."""
    chosen = sorted({i for pair in trial.pairs for i in (pair.other, pair.control)})
    names = [site.hook_name for site in trial.sites]
    examples = [trial.examples[i] for i in chosen]
    queries: dict[int, dict[str, Tensor]] = {}
    read = TokenizedExamples(examples=examples, span=trial.span, batch_size=trial.batch_size)
    for batch in read_at_span(trial.model, read, names):
        for row in batch.row.unique().tolist():
            own = batch.row == row
            queries[chosen[row]] = {
                name: q[own.to(q.device)] for name, q in batch.activations.items()
            }
    return queries
