"""Pairs of examples, patched at each site and head: the table of how the next token changes."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeAlias

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_query_steer.arguments import check_number
from sae_query_steer.data.batches import TokenBatch, example_batches
from sae_query_steer.data.examples import check_classes
from sae_query_steer.data.tokenized import TokenizedExamples, check_tokenized
from sae_query_steer.diagnostics.patches import (
    Pair,
    Patch,
    Side,
    check_other_class,
    draw_pairs,
    next_tokens,
    paired_error,
    prefixed_rows,
    queries_of,
)
from sae_query_steer.models.loading import check_not_steered
from sae_query_steer.models.prefix import PrefixedRows
from sae_query_steer.progress import progress_bar
from sae_query_steer.sites import ALL_HEADS, QuerySite

PASS_TOKENS, PASS_BYTES = 256, 2**29
"""Tokens of a pass with several patches, and bytes of copied caches, at most. Source: our choice;
on a CPU more are no faster."""

CACHE_BYTES = 2**30
"""Size of all caches of prompts that are kept at most; those of other prompts are made twice."""

Patches: TypeAlias = Callable[[Bool[Tensor, "pair pos"], Sequence[Pair]], tuple[Patch, Patch]]
"""From the spans of the bases of some pairs to two patches: towards the source's class, and the
control."""


class Trial:
    """Pairs of examples and the next tokens that patches should lead to.

    Every example runs once: its next tokens, its queries and the cache of the tokens before its
    span are kept.
    """

    def __init__(
        self,
        model: Any,
        sites: Sequence[QuerySite],
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
        self.examples = examples
        if counterparts is not None:
            check_other_class(examples, counterparts)
            self.examples = replace(examples, examples=[*examples, *counterparts])
        self._model, self._sites = model, sites
        self.queries: dict[int, dict[str, Float[Tensor, "token head d_head"]]] = {}
        """Queries at the span of the examples of pairs, by index and hook name."""
        self._kept: dict[tuple[int, ...], PrefixedRows] = {}
        self._aims, self._gaps = _aims(self._logs(), self.examples.labels, self.pairs, own=paired)

    def table(
        self,
        heads: Mapping[QuerySite, Sequence[int]],
        patches: Patches,
        *,
        per_head: bool,
        description: str,
    ) -> pd.DataFrame:
        """Return how far patches move the next token, with a row for each site and head."""
        tried = {site: [*(own if per_head else ()), ALL_HEADS] for site, own in heads.items()}
        found: dict[tuple[QuerySite, int | str], list[pd.DataFrame]] = defaultdict(list)
        order: list[Pair] = []
        total = len(self.pairs) * sum(map(len, tried.values()))
        with progress_bar(total=total, desc=description, unit="patch") as bar:
            for pairs, mask, prefixed in self._bases():
                order += pairs
                both = patches(mask, pairs)
                sides = self._sides(prefixed, both, pairs, [site.layer for site in heads])
                repeated = lru_cache(maxsize=2)(prefixed.repeated)
                n_cases = _cases_in_a_pass(prefixed)
                for site, own in tried.items():
                    cases = [(side, head) for head in own for side in sides]
                    parts = []
                    for start in range(0, len(cases), n_cases):
                        some = cases[start : start + n_cases]
                        pairs_of = [(side.patch, head) for side, head in some]
                        after = next_tokens(repeated(len(some)), site, pairs_of)
                        parts += [s.measured(a) for (s, _), a in zip(some, after, strict=True)]
                    for head, one, control in zip(own, parts[::2], parts[1::2], strict=True):
                        found[site, head].append(one.join(control.add_suffix("_control")))
                    bar.update(len(pairs) * len(own))
        return pd.DataFrame(
            [
                {"layer": site.layer, "head": head}
                | self._row(pd.concat(parts, ignore_index=True), order)
                for (site, head), parts in found.items()
            ]
        )

    def _logs(self) -> Iterator[tuple[int, Float[Tensor, "token d_vocab"]]]:
        """Yield the log probabilities at the span of each example; keep queries and caches."""
        chosen, left = {i for pair in self.pairs for i in pair}, CACHE_BYTES
        bases = {pair.base for pair in self.pairs}
        for batch in self._batches():
            mask = batch.mask(self.examples.span)
            rows, columns = mask.nonzero(as_tuple=True)
            prefixed = prefixed_rows(self._model, batch, mask)
            if not bases.isdisjoint(batch.indices) and prefixed.n_bytes <= left:
                left -= prefixed.n_bytes
                self._kept[batch.indices] = prefixed
            logs, queries = queries_of(prefixed, rows, columns, self._sites)
            for row, index in enumerate(batch.indices):
                own = rows == row
                if index in chosen:
                    self.queries[index] = {n: q[own.to(q.device)] for n, q in queries.items()}
                yield index, logs[own.to(logs.device)]

    def _batches(self) -> Iterator[TokenBatch]:
        return example_batches(self.examples, self.examples.batch_size)

    def _bases(self) -> Iterator[tuple[list[Pair], Bool[Tensor, "pair pos"], PrefixedRows]]:
        """Yield pairs whose bases are in a batch, with spans of the bases and their rows."""
        for batch in self._batches():
            places = {index: row for row, index in enumerate(batch.indices)}
            here = [pair for pair in self.pairs if pair.base in places]
            if not here:
                continue
            mask = batch.mask(self.examples.span)
            prefixed = self._kept.get(batch.indices) or prefixed_rows(self._model, batch, mask)
            for start in range(0, len(here), self.examples.batch_size):
                some = here[start : start + self.examples.batch_size]
                rows = torch.tensor([places[pair.base] for pair in some])
                yield some, mask[rows], prefixed.taken(rows)

    def _sides(
        self,
        prefixed: PrefixedRows,
        both: tuple[Patch, Patch],
        pairs: Sequence[Pair],
        layers: Sequence[int],
    ) -> list[Side]:
        """Return both patches with what their effects are measured against."""
        rows = torch.cat([patch.rows for patch in both])
        positions = torch.cat([patch.columns for patch in both])
        clean = prefixed.unchanged(rows, positions, layers, copies=True)
        aims = torch.stack([self._aims[pair.source] for pair in pairs])[rows].to(clean)
        sizes = [len(patch.rows) for patch in both]
        parts = zip(both, clean.split(sizes), aims.split(sizes), strict=True)
        return [Side(*part) for part in parts]

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


def _cases_in_a_pass(prefixed: PrefixedRows) -> int:
    """Return how many patches run as one batch, within `PASS_TOKENS` and `PASS_BYTES`."""
    fitting = PASS_TOKENS // prefixed.tokens.numel()
    if not prefixed.shares_cache:
        fitting = min(fitting, PASS_BYTES // max(1, prefixed.n_bytes))
    return max(1, fitting)


def _aims(
    logs_of: Iterable[tuple[int, Tensor]],
    labels: Sequence[str],
    pairs: Sequence[Pair],
    *,
    own: bool,
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
    for index, logs in logs_of:
        here, label = logs.cpu().double(), labels[index]
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
            label = labels[source]
            rest = counts[label] - counts[source]
            goal = (totals[label] - sums[source]).clamp(min=0) / rest
            aims[source] = (totals[label] / counts[label]).log().float()
        nearer = mean_logs[source].double() - mean_logs[base].double()
        # Tokens of probability 0 in the class have no part in KL(c || .).
        gaps.append(float((goal * nearer).where(goal > 0, 0.0).sum()))
    return aims, pd.Series(gaps)
