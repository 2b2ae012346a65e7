"""The interchange effect: does a site's query decide anything that steering could change?

Real queries of another class are patched in, and the next token is looked at. It is an
on-distribution reference, not a bound: a steer can overshoot it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_query_steer.capture import capture, span_of
from sae_query_steer.data import (
    LabelledExample,
    TokenBatch,
    TokenizedExample,
    check_classes,
    length_sorted_batches,
)
from sae_query_steer.hosts.models import check_not_steered, next_token_log_probs
from sae_query_steer.metrics import kl_divergence
from sae_query_steer.positions import LastPromptToken, Span
from sae_query_steer.separability import ALL_HEADS
from sae_query_steer.sites import QuerySite, check_sites
from sae_query_steer.targets import as_tokenized


def interchange_effect(
    model: Any,
    sites: Sequence[QuerySite],
    examples: Iterable[LabelledExample | TokenizedExample],
    *,
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
        span: which positions are patched; None means the last prompt token.
        n_pairs: pairs, drawn evenly from the classes; every example is a receiver once before one
            is so twice.
        per_head: also patch every head alone, not only all heads of a layer.
        seed: of the pairs.
        prepend_bos: begin every prompt with BOS.
        chat_template: put every prompt into the tokenizer's chat template.
        batch_size: rows of one forward pass.

    Returns:
        A row for each layer, with head "all", and with `per_head` for each of its heads:

        - kl: mean KL(unpatched || patched) of the next token, in nats, donor of another class
        - kl_control: the same, donor of the receiver's own class
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
        - n_pairs

    Raises:
        ValueError: too few examples of a class.

    Source: our choice; interchange interventions as in causal abstraction.
    """
    if n_pairs < 1:
        raise ValueError(f"n_pairs={n_pairs} is not allowed: give 1 or more")
    span = LastPromptToken() if span is None else span
    check_sites(sites)
    for site in sites:
        site.check(model)
    check_not_steered(model)
    tokenized = as_tokenized(examples, model, prepend_bos=prepend_bos, chat_template=chat_template)
    check_classes([example.label for example in tokenized])
    pairs = _draw_pairs([example.label for example in tokenized], n_pairs, seed)
    hook_names = [site.hook_name for site in sites]
    donors = _donor_queries(model, tokenized, pairs, hook_names, span, batch_size)
    class_log_probs = _class_next_tokens(model, tokenized, span, batch_size)

    cases = [
        (site, head)
        for site in sites
        for head in ([*range(site.n_heads), ALL_HEADS] if per_head else [ALL_HEADS])
    ]
    found: dict[tuple[int, int | str], list[Tensor]] = {
        (site.layer, head): [] for site, head in cases
    }
    receivers = [tokenized[pair.receiver] for pair in pairs]
    order: list[int] = []
    with tqdm(total=len(pairs) * len(cases), desc="Patching queries", unit="patch") as bar:
        for batch in length_sorted_batches(receivers, batch_size):
            here = [pairs[i] for i in batch.indices]
            order += batch.indices
            mask = span_of(batch, span)
            other = _Patch.between(mask, [donors[pair.other] for pair in here])
            control = _Patch.between(mask, [donors[pair.control] for pair in here])
            clean = other.next_tokens(model, batch)
            clean_control = control.next_tokens(model, batch)
            aims = torch.stack([class_log_probs[tokenized[pair.other].label] for pair in here])
            aim, aim_control = (aims[patch.rows].to(clean) for patch in (other, control))
            before, before_control = (
                kl_divergence(aim, clean),
                kl_divergence(aim_control, clean_control),
            )
            for site, head in cases:
                patched = other.next_tokens(model, batch, site, head)
                moved = control.next_tokens(model, batch, site, head)
                values = (
                    other.mean_per_row(kl_divergence(clean, patched)),
                    control.mean_per_row(kl_divergence(clean_control, moved)),
                    other.mean_per_row(before - kl_divergence(aim, patched)),
                    control.mean_per_row(before_control - kl_divergence(aim_control, moved)),
                    other.mean_per_row(before),
                )
                found[site.layer, head].append(torch.stack(values).double().cpu())
                bar.update(len(here))
    rows = []
    for site, head in cases:
        values = torch.cat(found[site.layer, head], dim=1)
        kl, kl_control, toward, toward_control, before = values.mean(1).tolist()
        effect = values[2] - values[3]
        rows.append(
            {
                "layer": site.layer,
                "head": head,
                "kl": kl,
                "kl_control": kl_control,
                "toward_class": toward,
                "toward_share": toward / before,
                "toward_control": toward_control,
                "class_effect": float(effect.mean()),
                "class_effect_se": max(
                    _clustered_error(effect, [pairs[i].receiver for i in order]),
                    _clustered_error(effect, [pairs[i].other for i in order]),
                ),
                "n_pairs": len(pairs),
            }
        )
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class _Pair:
    receiver: int
    other: int
    control: int


def _draw_pairs(labels: Sequence[str], n_pairs: int, seed: int) -> list[_Pair]:
    """Draw receivers evenly from the classes, each with a donor of another and of its own class."""
    generator = torch.Generator().manual_seed(seed)

    def draw(pool: Sequence[int]) -> int:
        return pool[int(torch.randint(len(pool), (1,), generator=generator))]

    classes = sorted(set(labels))
    members = {k: [i for i, label in enumerate(labels) if label == k] for k in classes}
    orders = {k: torch.randperm(len(members[k]), generator=generator).tolist() for k in classes}
    pairs = []
    for n in range(n_pairs):
        k = classes[n % len(classes)]
        receiver = members[k][orders[k][n // len(classes) % len(members[k])]]
        other_class = draw([i for i, name in enumerate(classes) if name != k])
        pairs.append(
            _Pair(
                receiver=receiver,
                other=draw(members[classes[other_class]]),
                control=draw([i for i in members[k] if i != receiver]),
            )
        )
    return pairs


def _clustered_error(values: Tensor, clusters: Sequence[int]) -> float:
    """Return the standard error of a mean whose values are dependent within clusters."""
    index = torch.tensor(clusters).unique(return_inverse=True)[1]
    n_clusters = int(index.max()) + 1
    if n_clusters < 2:
        return float("nan")
    sums = torch.zeros(n_clusters, dtype=values.dtype).index_add(0, index, values - values.mean())
    correction = n_clusters / (n_clusters - 1)
    return float((sums.square().sum() * correction).sqrt()) / len(values)


def _donor_queries(
    model: Any,
    examples: Sequence[TokenizedExample],
    pairs: Sequence[_Pair],
    hook_names: Sequence[str],
    span: Span,
    batch_size: int,
) -> dict[int, dict[str, Tensor]]:
    """Return the queries at the span of every donor, [token head d_head] by hook name."""
    chosen = sorted({pair.other for pair in pairs} | {pair.control for pair in pairs})
    queries: dict[int, dict[str, Tensor]] = {}
    for batch in capture(
        model, [examples[i] for i in chosen], hook_names, span, batch_size=batch_size
    ):
        for row in batch.row.unique().tolist():
            own = batch.row == row
            queries[chosen[row]] = {name: q[own.to(q.device)] for name, q in batch.queries.items()}
    return queries


def _class_next_tokens(
    model: Any, examples: Sequence[TokenizedExample], span: Span, batch_size: int
) -> dict[str, Tensor]:
    """Return the log of each class's mean next-token distribution at its own span."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for batch in length_sorted_batches(examples, batch_size):
        rows, columns = span_of(batch, span).nonzero(as_tuple=True)
        probabilities = next_token_log_probs(model, batch.tokens, rows, columns).exp().double()
        for row, p in zip(rows.tolist(), probabilities.cpu(), strict=True):
            label = batch.labels[row]
            sums[label] = sums.get(label, torch.zeros_like(p)) + p
            counts[label] = counts.get(label, 0) + 1
    return {label: (total / counts[label]).log().float() for label, total in sums.items()}


@dataclass(frozen=True, eq=False)
class _Patch:
    """Queries of donors, laid over the span of the receivers of one batch."""

    rows: Int[Tensor, " token"]
    columns: Int[Tensor, " token"]
    queries: Mapping[str, Tensor]

    @classmethod
    def between(cls, mask: Tensor, donors: Sequence[Mapping[str, Tensor]]) -> "_Patch":
        """Lay donors over a span, token by token; the longer of the two spans is cut."""
        rows, columns = [], []
        parts: dict[str, list[Tensor]] = {name: [] for name in donors[0]}
        for row, donor in enumerate(donors):
            own = mask[row].nonzero()[:, 0]
            n = min(len(own), len(next(iter(donor.values()))))
            rows.append(torch.full((n,), row))
            columns.append(own[:n])
            for name, queries in donor.items():
                parts[name].append(queries[:n])
        return cls(
            torch.cat(rows), torch.cat(columns), {name: torch.cat(q) for name, q in parts.items()}
        )

    def next_tokens(
        self,
        model: Any,
        batch: TokenBatch,
        site: QuerySite | None = None,
        head: int | str = ALL_HEADS,
    ) -> Tensor:
        """Return log probabilities after each patched position; without a site, unpatched."""
        hooks = []
        if site is not None:
            donated = self.queries[site.hook_name]
            heads = slice(None) if head == ALL_HEADS else slice(int(head), int(head) + 1)

            def patch(queries: Tensor, hook: Any) -> Tensor:
                del hook
                patched = (
                    queries.clone().unflatten(-1, (-1, site.d_head))
                    if (queries.ndim == 3)
                    else queries.clone()
                )
                patched[self.rows, self.columns, heads] = donated[:, heads].to(patched)
                return patched.reshape(queries.shape)

            hooks.append((site.hook_name, patch))
        return next_token_log_probs(model, batch.tokens, self.rows, self.columns, hooks)

    def mean_per_row(self, values: Tensor) -> Tensor:
        """Return the mean over the patched tokens of each receiver."""
        rows = self.rows.to(values.device)
        counts = torch.bincount(rows)
        return torch.zeros(len(counts)).to(values).index_add(0, rows, values) / counts
