"""Patch queries over a span of other examples, and measure how the next token changes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_query_steer.data.batches import TokenBatch, example_batches
from sae_query_steer.data.examples import check_classes
from sae_query_steer.data.tokenized import TokenizedExamples, check_tokenized
from sae_query_steer.diagnostics.metrics import kl_divergence, total_variation
from sae_query_steer.models.activations import next_token_log_probs
from sae_query_steer.models.loading import check_not_steered
from sae_query_steer.sites import ALL_HEADS, QuerySite

_MEASURED = (
    *("kl", "kl_control", "moved", "moved_control", "toward_class", "toward_control"),
    "before",
)
"""What is measured of each base; the last is KL(c || unpatched)."""


@dataclass(frozen=True, kw_only=True)
class Pair:
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
        source = len(labels) + base if counterparts else source
        pairs.append(Pair(base=base, source=source, control=control))
    return pairs


def clustered_error(values: Tensor, clusters: Sequence[int]) -> float:
    """Return the standard error of a mean of values that are dependent within clusters."""
    index = torch.tensor(clusters).unique(return_inverse=True)[1]
    n_clusters = int(index.max()) + 1
    if n_clusters < 2:
        return float("nan")
    sums = torch.zeros(n_clusters, dtype=values.dtype).index_add(0, index, values - values.mean())
    correction = n_clusters / (n_clusters - 1)
    return float((sums.square().sum() * correction).sqrt()) / len(values)


def paired_error(values: Tensor, pairs: Sequence[Pair]) -> float:
    """Return the larger of the standard errors clustered by base and by source; or NaN."""
    return max(
        clustered_error(values, [pair.base for pair in pairs]),
        clustered_error(values, [pair.source for pair in pairs]),
    )


@dataclass(frozen=True, eq=False)
class Patch:
    """Queries for some tokens of the bases of one batch."""

    rows: Int[Tensor, " token"]
    columns: Int[Tensor, " token"]
    queries: Mapping[str, Float[Tensor, "token head d_head"]]
    """By hook name."""

    def next_tokens(
        self, model: Any, batch: TokenBatch, site: QuerySite | None = None, head: int | str = ""
    ) -> Tensor:
        """Return log probabilities after each patched position; without a site, unpatched."""
        hooks = []
        if site is not None:
            given = self.queries[site.hook_name]
            heads = slice(None) if head == ALL_HEADS else slice(int(head), int(head) + 1)

            def patch(queries: Tensor, hook: Any) -> Tensor:
                del hook
                patched = queries.clone().reshape(*queries.shape[:2], -1, site.d_head)
                patched[self.rows, self.columns, heads] = given[:, heads].to(patched)
                return patched.reshape(queries.shape)

            hooks.append((site.hook_name, patch))
        return next_token_log_probs(model, batch.tokens, self.rows, self.columns, hooks)

    def mean_per_row(self, values: Tensor) -> Tensor:
        """Return the mean over the patched tokens of each base."""
        rows = self.rows.to(values.device)
        counts = torch.bincount(rows)
        return torch.zeros(len(counts)).to(values).index_add(0, rows, values) / counts


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
        if n_pairs < 1:
            raise ValueError(f"n_pairs must be 1 or more, got {n_pairs}")
        check_tokenized(examples)
        check_not_steered(model)
        check_classes(examples.labels)
        paired = counterparts is not None
        self.pairs = draw_pairs(examples.labels, n_pairs, seed, counterparts=paired)
        self.model = model
        self.examples = examples if counterparts is None else _joined(examples, counterparts)
        self._aims: dict[int, Float[Tensor, " d_vocab"]] = {}
        self._gaps = self._read_aims(own=paired)

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
            (site, head)
            for site, own in heads.items()
            for head in [*(own if per_head else ()), ALL_HEADS]
        ]
        found: list[list[Tensor]] = [[] for _ in cases]
        order: list[int] = []
        bases = self.examples.subset(pair.base for pair in self.pairs)
        with tqdm(total=len(self.pairs) * len(cases), desc=description, unit="patch") as bar:
            for batch in example_batches(bases, bases.batch_size):
                order += batch.indices
                pairs = [self.pairs[i] for i in batch.indices]
                measure = self._measure(batch, pairs, *patches(batch, pairs))
                for values, (site, head) in zip(found, cases, strict=True):
                    values.append(measure(site, head))
                    bar.update(len(pairs))
        pairs = [self.pairs[i] for i in order]
        return pd.DataFrame(
            [
                {"layer": site.layer, "head": head, **self._row(torch.cat(values, dim=1), pairs)}
                for values, (site, head) in zip(found, cases, strict=True)
            ]
        )

    def _row(self, values: Tensor, pairs: Sequence[Pair]) -> dict[str, float]:
        means = dict(zip(_MEASURED, values.mean(1).tolist(), strict=True))
        before, gap = means.pop("before"), float(self._gaps.mean())
        by_name = dict(zip(_MEASURED, values, strict=True))
        effect = by_name["toward_class"] - by_name["toward_control"]
        return {
            **means,
            "toward_share": means["toward_class"] / before if before > 0 else float("nan"),
            "class_effect": float(effect.mean()),
            "class_effect_se": paired_error(effect, pairs),
            "class_share": float(effect.mean()) / gap if gap > 0 else float("nan"),
            "class_gap": gap,
            "class_gap_se": paired_error(self._gaps, self.pairs),
            "n_pairs": len(self.pairs),
        }

    def _measure(
        self, batch: TokenBatch, pairs: Sequence[Pair], source: Patch, control: Patch
    ) -> Callable[[QuerySite, int | str], Tensor]:
        """Return a function that measures two patches at a site and head, [measured base]."""
        aims = torch.stack([self._aims[pair.source] for pair in pairs])
        sides = []
        for patch in (source, control):
            clean = patch.next_tokens(self.model, batch)
            aim = aims[patch.rows].to(clean)
            sides.append((patch, clean, aim, kl_divergence(aim, clean)))

        def measure(site: QuerySite, head: int | str) -> Tensor:
            kl, moved, toward = [], [], []
            for patch, clean, aim, before in sides:
                after = patch.next_tokens(self.model, batch, site, head)
                kl.append(patch.mean_per_row(kl_divergence(clean, after)))
                moved.append(patch.mean_per_row(total_variation(clean, after)))
                toward.append(patch.mean_per_row(before - kl_divergence(aim, after)))
            before = source.mean_per_row(sides[0][3])
            return torch.stack([*kl, *moved, *toward, before]).double().cpu()

        return measure

    def _read_aims(self, *, own: bool) -> Float[Tensor, " pair"]:
        """Set the aim of each source, and return the gap of each pair.

        The aim is the log of the mean next-token distribution of the source's class at the span;
        with `own`, of the source itself. For the gaps the source is left out of its class's mean,
        as the base is: otherwise it would be near the mean because it is a part of it.
        """
        needed = {i for pair in self.pairs for i in (pair.base, pair.source)}
        sums: dict[int, Tensor] = {}
        mean_logs: dict[int, Tensor] = {}
        totals: dict[str, Tensor] = {}
        counts: dict[int, int] = {}
        n_tokens: dict[str, int] = {}
        for batch in example_batches(self.examples, self.examples.batch_size):
            rows, columns = batch.mask(self.examples.span).nonzero(as_tuple=True)
            logs = next_token_log_probs(self.model, batch.tokens, rows, columns).cpu().double()
            for row, index in enumerate(batch.indices):
                here = logs[rows == row]
                total, label = here.exp().sum(0), batch.labels[row]
                counts[index] = len(here)
                n_tokens[label] = n_tokens.get(label, 0) + len(here)
                totals[label] = totals[label] + total if label in totals else total
                if index in needed:
                    sums[index], mean_logs[index] = total.float(), here.mean(0).float()
        classes = {
            label: (total / n_tokens[label]).log().float() for label, total in totals.items()
        }
        gaps = []
        for pair in self.pairs:
            label, source = self.examples[pair.source].label, pair.source
            if own:
                goal = sums[source].double() / counts[source]
                self._aims[source] = goal.log().float()
            else:
                rest = n_tokens[label] - counts[source]
                goal = (totals[label] - sums[source]).clamp(min=0) / rest
                self._aims[source] = classes[label]
            nearer = mean_logs[source].double() - mean_logs[pair.base].double()
            # Tokens of probability 0 in the class have no part in KL(c || .).
            gaps.append((goal * nearer).where(goal > 0, 0.0).sum())
        return torch.stack(gaps)


def _joined(examples: TokenizedExamples, counterparts: TokenizedExamples) -> TokenizedExamples:
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
    return examples.joined(counterparts)
