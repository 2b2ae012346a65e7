"""Patch queries over a span of other examples, and measure how the next token changes."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.arguments import check_number
from sae_query_steer.data.batches import TokenBatch, example_batches
from sae_query_steer.data.examples import check_classes
from sae_query_steer.data.tokenized import TokenizedExamples, check_tokenized
from sae_query_steer.diagnostics.metrics import kl_divergence, total_variation
from sae_query_steer.models.loading import check_not_steered
from sae_query_steer.models.prefix import PrefixedRows
from sae_query_steer.progress import progress_bar
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

    def read(
        self, prefixed: PrefixedRows, logits: Float[Tensor, "batch pos d_vocab"]
    ) -> Float[Tensor, "token d_vocab"]:
        """Return log probabilities after each patched position, of logits of the last tokens."""
        columns = prefixed.columns(self.rows, self.columns).to(logits.device)
        return logits[self.rows.to(logits.device), columns].float().log_softmax(-1)

    @torch.no_grad()
    def next_tokens(
        self, prefixed: PrefixedRows, site: QuerySite, head: int | str
    ) -> Float[Tensor, "token d_vocab"]:
        """Return log probabilities after each patched position, with the queries patched in."""
        heads = slice(None) if head == ALL_HEADS else slice(int(head), int(head) + 1)
        given = self.queries[site.hook_name][:, heads]
        columns = prefixed.columns(self.rows, self.columns)

        def patch(queries: Tensor, hook: Any) -> Tensor:
            del hook
            patched = queries.clone().reshape(*queries.shape[:2], -1, site.d_head)
            patched[self.rows, columns, heads] = given.to(patched)
            return patched.reshape(queries.shape)

        hooks = [(site.hook_name, patch)]
        return self.read(prefixed, prefixed.logits(hooks, first_layer=site.layer))

    def mean_per_row(self, values: Float[Tensor, " token"]) -> Float[Tensor, " base"]:
        """Return the mean over the patched tokens of each base, in 64 bits on the CPU."""
        rows = self.rows.to(values.device)
        counts = torch.bincount(rows)
        sums = torch.zeros(len(counts)).to(values).index_add(0, rows, values)
        return (sums / counts).double().cpu()


Patches: TypeAlias = Callable[[TokenBatch, Sequence[Pair]], tuple[Patch, Patch]]
"""From a batch of bases and their pairs to two patches: towards the source's class, and the
control."""


class Trial:
    """Pairs of examples and the next tokens that patches should lead to."""

    def __init__(
        self,
        model: Any,
        examples: TokenizedExamples,
        counterparts: TokenizedExamples | None,
        *,
        n_pairs: int,
        seed: int,
    ) -> None:
        """See `interchange_effect` for the arguments and errors."""
        check_number("n_pairs", n_pairs, whole=True, least=1)
        check_tokenized(examples)
        check_not_steered(model)
        check_classes(examples.labels)
        paired = counterparts is not None
        self.pairs = draw_pairs(examples.labels, n_pairs, seed, counterparts=paired)
        self.model = model
        self.examples = examples
        if counterparts is not None:
            check_other_class(examples, counterparts)
            self.examples = replace(examples, examples=[*examples, *counterparts])
        self._aims, self._gaps = _aims(model, self.examples, self.pairs, own=paired)

    def table(
        self,
        heads: Mapping[QuerySite, Sequence[int]],
        patches: Patches,
        *,
        per_head: bool,
        description: str,
    ) -> pd.DataFrame:
        """Return how far patches move the next token, with a row for each site and head."""
        cases = [
            (s, h) for s, own in heads.items() for h in [*(own if per_head else ()), ALL_HEADS]
        ]
        found: list[list[pd.DataFrame]] = [[] for _ in cases]
        order: list[int] = []
        bases = self.examples.subset(pair.base for pair in self.pairs)
        with progress_bar(
            total=len(self.pairs) * len(cases), desc=description, unit="patch"
        ) as bar:
            for batch in example_batches(bases, bases.batch_size):
                order += batch.indices
                pairs = [self.pairs[i] for i in batch.indices]
                aims = torch.stack([self._aims[pair.source] for pair in pairs])
                both = patches(batch, pairs)
                prefixed = prefixed_rows(self.model, batch, both)
                logits = prefixed.unchanged(site.layer for site in heads)
                sides = [self._side(prefixed, logits, patch, aims) for patch in both]
                for parts, case in zip(found, cases, strict=True):
                    measured, control = (side(*case) for side in sides)
                    parts.append(measured.join(control.add_suffix("_control")))
                    bar.update(len(pairs))
        pairs = [self.pairs[i] for i in order]
        rows = [self._row(pd.concat(parts, ignore_index=True), pairs) for parts in found]
        return pd.DataFrame(
            [
                {"layer": site.layer, "head": head, **row}
                for (site, head), row in zip(cases, rows, strict=True)
            ]
        )

    def _side(
        self,
        prefixed: PrefixedRows,
        logits: Float[Tensor, "batch pos d_vocab"],
        patch: Patch,
        aims: Float[Tensor, "base d_vocab"],
    ) -> Callable[[QuerySite, int | str], pd.DataFrame]:
        """Return a function that measures a patch at a site and head, with a row for each base."""
        clean = patch.read(prefixed, logits)
        aim = aims[patch.rows].to(clean)
        before = kl_divergence(aim, clean)

        def measure(site: QuerySite, head: int | str) -> pd.DataFrame:
            after = patch.next_tokens(prefixed, site, head)
            measured = {
                "kl": kl_divergence(clean, after),
                "moved": total_variation(clean, after),
                "toward": before - kl_divergence(aim, after),
                "before": before,
            }
            return pd.DataFrame({k: patch.mean_per_row(v).numpy() for k, v in measured.items()})

        return measure

    def _row(self, measured: pd.DataFrame, pairs: Sequence[Pair]) -> dict[str, float]:
        mean = measured.mean()
        gap, effect = float(self._gaps.mean()), measured["toward"] - measured["toward_control"]
        return {
            **{k: mean[k] for k in ("kl", "kl_control", "moved", "moved_control")},
            "toward_class": mean["toward"],
            "toward_control": mean["toward_control"],
            "toward_share": mean["toward"] / mean["before"] if mean["before"] > 0 else torch.nan,
            "class_effect": float(effect.mean()),
            "class_effect_se": paired_error(effect, pairs),
            "class_share": float(effect.mean()) / gap if gap > 0 else torch.nan,
            "class_gap": gap,
            "class_gap_se": paired_error(self._gaps, self.pairs),
            "n_pairs": len(self.pairs),
        }


def prefixed_rows(model: Any, batch: TokenBatch, patches: Sequence[Patch]) -> PrefixedRows:
    """Return the rows from their first patched token to their last, the rest in the cache."""
    rows = torch.cat([patch.rows for patch in patches])
    columns = torch.cat([patch.columns for patch in patches])
    start = batch.lengths.scatter_reduce(0, rows, columns, "amin")
    stop = torch.zeros_like(start).scatter_reduce(0, rows, columns + 1, "amax")
    return PrefixedRows(model, batch, start, stop)


def _aims(
    model: Any, examples: TokenizedExamples, pairs: Sequence[Pair], *, own: bool
) -> tuple[dict[int, Float[Tensor, " d_vocab"]], pd.Series]:
    """Return the aim of each source by its index, and the gap of each pair.

    The aim is the log of the mean next-token distribution of the source's class at the span; with
    `own`, of the source itself. For the gaps the source is left out of its class's mean, as the
    base is: otherwise it would be near the mean because it is a part of it.
    """
    needed = {i for pair in pairs for i in (pair.base, pair.source)}
    sums: dict[int, Tensor] = {}
    mean_logs: dict[int, Tensor] = {}
    totals: dict[str, Tensor] = {}
    counts: Counter[int | str] = Counter()  # tokens of each example and class
    for batch in example_batches(examples, examples.batch_size):
        rows, columns = batch.mask(examples.span).nonzero(as_tuple=True)
        span = Patch(rows, columns, {})
        prefixed = prefixed_rows(model, batch, [span])
        logs = span.read(prefixed, prefixed.unchanged(())).cpu().double()
        for row, index in enumerate(batch.indices):
            here, label = logs[rows == row], batch.labels[row]
            total = here.exp().sum(0)
            counts[index] = len(here)
            counts[label] += len(here)
            totals[label] = totals[label] + total if label in totals else total
            if index in needed:
                sums[index], mean_logs[index] = total.float(), here.mean(0).float()
    aims, gaps = {}, []
    for base, source, _ in pairs:
        if own:
            goal = sums[source].double() / counts[source]
            aims[source] = goal.log().float()
        else:
            label = examples[source].label
            rest = counts[label] - counts[source]
            goal = (totals[label] - sums[source]).clamp(min=0) / rest
            aims[source] = (totals[label] / counts[label]).log().float()
        nearer = mean_logs[source].double() - mean_logs[base].double()
        # Tokens of probability 0 in the class have no part in KL(c || .).
        gaps.append(float((goal * nearer).where(goal > 0, 0.0).sum()))
    return aims, pd.Series(gaps)


def check_other_class(examples: TokenizedExamples, counterparts: TokenizedExamples) -> None:
    """Raise unless counterparts are one for each example, of another class than it.

    Raises:
        ValueError: the message names the first that does not fit.
    """
    check_tokenized(counterparts, name="counterparts")
    if len(counterparts) != len(examples):
        raise ValueError(
            f"counterparts must be one for each of the {len(examples)} examples, in their order, "
            f"got {len(counterparts)}"
        )
    for index, (one, other) in enumerate(zip(examples, counterparts, strict=True)):
        if one.label == other.label:
            raise ValueError(
                f"the counterpart of example {index} must be of another class than its "
                f"{one.label!r}: give the same text made for another class"
            )
