"""Patch queries over a span of other examples, and measure how the next token changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_query_steer.data.batches import TokenBatch
from sae_query_steer.data.tokenized import TokenizedExamples
from sae_query_steer.diagnostics.metrics import kl_divergence, total_variation
from sae_query_steer.learning.rows import with_counterparts
from sae_query_steer.models.activations import check_finite
from sae_query_steer.models.prefix import PrefixedRows
from sae_query_steer.sites import ALL_HEADS, QuerySite


class Pair(NamedTuple):
    """Indices of an example that is patched and of the two sources of queries."""

    base: int
    source: int
    """Of another class: towards its next token the patch should lead."""

    control: int
    """Of the base's own class."""


def draw_pairs(
    labels: Sequence[str], n_pairs: int, seed: int, *, counterparts: bool = False
) -> list[Pair]:
    """Draw bases evenly from the classes, each with a source of another and of its own class.

    Args:
        labels: the class of each example.
        n_pairs: every example is a base once before one is so twice.
        seed: of all that is drawn.
        counterparts: the source is the base's counterpart, whose index is the base's plus the
            number of labels.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(pool: Sequence[int]) -> int:
        return pool[int(torch.randint(len(pool), (1,), generator=generator))]

    classes = sorted(set(labels))
    members = {k: [i for i, label in enumerate(labels) if label == k] for k in classes}
    orders = {k: torch.randperm(len(members[k]), generator=generator).tolist() for k in classes}
    pairs = []
    for n in range(n_pairs):
        k = classes[n % len(classes)]
        base = members[k][orders[k][n // len(classes) % len(members[k])]]
        source = draw(members[classes[draw([i for i, c in enumerate(classes) if c != k])]])
        control = draw([i for i in members[k] if i != base])
        pairs.append(Pair(base, len(labels) + base if counterparts else source, control))
    return pairs


def paired_error(values: pd.Series, pairs: Sequence[Pair]) -> float:
    """Return the larger standard error of a mean, of those clustered by base and by source."""
    found = []
    for clusters in ([pair.base for pair in pairs], [pair.source for pair in pairs]):
        sums = (values - values.mean()).groupby(clusters).sum()
        n = len(sums)
        found.append((sums.pow(2).sum() * n / (n - 1)) ** 0.5 / len(values) if n > 1 else torch.nan)
    return float(max(found))


@dataclass(frozen=True, eq=False)
class Patch:
    """Queries for some tokens of the bases of one batch."""

    rows: Int[Tensor, " token"]
    columns: Int[Tensor, " token"]
    queries: Mapping[str, Float[Tensor, "token head d_head"]]
    """By hook name."""

    def mean_per_row(self, values: Float[Tensor, " token"]) -> Float[Tensor, " base"]:
        """Return the mean over the patched tokens of each base, in 64 bits on the CPU."""
        rows = self.rows.to(values.device)
        counts = torch.bincount(rows)
        sums = torch.zeros(len(counts)).to(values).index_add(0, rows, values)
        return (sums / counts).double().cpu()


@torch.no_grad()
def next_tokens(
    prefixed: PrefixedRows, site: QuerySite, cases: Sequence[tuple[Patch, int | str]]
) -> tuple[Float[Tensor, "token d_vocab"], ...]:
    """Return log probabilities after each patched position, in one pass for several cases.

    Args:
        prefixed: the rows of the patches, once for each case: `PrefixedRows.repeated`.
        site: where the queries are patched.
        cases: each a patch and its head, or all heads.
    """
    n_rows = prefixed.n_rows // len(cases)
    rows = [patch.rows + n * n_rows for n, (patch, _) in enumerate(cases)]
    places = [prefixed.places(r, p.columns) for r, (p, _) in zip(rows, cases, strict=True)]

    def patched(queries: Tensor, hook: Any) -> Tensor:
        del hook
        result = queries.clone().reshape(*queries.shape[:2], -1, site.d_head)
        for (row, column), (patch, head) in zip(places, cases, strict=True):
            heads = slice(None) if head == ALL_HEADS else slice(int(head), int(head) + 1)
            given = patch.queries[site.hook_name][:, heads]
            result[row, column, heads] = given.to(result)
        return result.reshape(queries.shape)

    positions = torch.cat([patch.columns for patch, _ in cases])
    hooks = [(site.hook_name, patched)]
    logs = prefixed.log_probs(torch.cat(rows), positions, hooks, first_layer=site.layer)
    return logs.split(list(map(len, rows)))


@torch.no_grad()
def queries_of(
    prefixed: PrefixedRows,
    rows: Int[Tensor, " token"],
    positions: Int[Tensor, " token"],
    sites: Sequence[QuerySite],
) -> tuple[Float[Tensor, "token d_vocab"], dict[str, Float[Tensor, "token head d_head"]]]:
    """Return log probabilities after some tokens, and their queries by hook name.

    Raises:
        ValueError: a query is not finite.
    """
    (row, column), found = prefixed.places(rows, positions), {}

    def keep(queries: Tensor, hook: Any, site: QuerySite) -> None:
        del hook
        by_head = queries.reshape(*queries.shape[:2], -1, site.d_head)
        found[site.hook_name] = by_head[row.to(by_head.device), column.to(by_head.device)]
        check_finite(found[site.hook_name], site.hook_name)

    hooks = [(site.hook_name, partial(keep, site=site)) for site in sites]
    return prefixed.log_probs(rows, positions, hooks), found


@dataclass(frozen=True, eq=False)
class Side:
    """A patch and what its effect is measured against: log probabilities [token d_vocab]."""

    patch: Patch
    clean: Float[Tensor, "token d_vocab"]
    """Unpatched."""

    aim: Float[Tensor, "token d_vocab"]
    """Towards which the patch should lead."""

    @cached_property
    def before(self) -> Float[Tensor, " token"]:
        """KL(aim || clean)."""
        return kl_divergence(self.aim, self.clean)

    def measured(self, after: Float[Tensor, "token d_vocab"]) -> pd.DataFrame:
        """Return the effect of the patch, with a row for each base."""
        measured = {
            "kl": kl_divergence(self.clean, after),
            "moved": total_variation(self.clean, after),
            "toward": self.before - kl_divergence(self.aim, after),
            "before": self.before,
        }
        rows = {k: self.patch.mean_per_row(v).numpy() for k, v in measured.items()}
        return pd.DataFrame(rows)


def prefixed_rows(model: Any, batch: TokenBatch, mask: Bool[Tensor, "batch pos"]) -> PrefixedRows:
    """Return the rows from the first token of their mask to its last, the rest in the cache."""
    index = torch.arange(mask.shape[1])
    start = index.where(mask, mask.shape[1]).amin(1)
    return PrefixedRows(model, batch, start, (index + 1).where(mask, 0).amax(1))


def check_other_class(examples: TokenizedExamples, counterparts: TokenizedExamples) -> None:
    """Raise unless counterparts are one for each example, of another class than it.

    Raises:
        ValueError: the message names the first that does not fit.
    """
    for index, (one, other) in enumerate(with_counterparts(examples, counterparts)):
        if one.label == other.label:
            raise ValueError(
                f"the counterpart of example {index} must be of another class than its "
                f"{one.label!r}: give the same text made for another class"
            )
