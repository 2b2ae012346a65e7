"""Pairs of examples, patched at each site and head: the table of how the next token changes."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeAlias

import pandas as pd
import torch
from jaxtyping import Float
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
)
from sae_query_steer.models.loading import check_not_steered
from sae_query_steer.models.prefix import PrefixedRows
from sae_query_steer.progress import progress_bar
from sae_query_steer.sites import ALL_HEADS, QuerySite

PASS_TOKENS, PASS_BYTES = 256, 2**29
"""Tokens of a pass with several patches, and bytes of their caches, at most. Source: our choice; on
a CPU more are no faster."""

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
        tried = {site: [*(own if per_head else ()), ALL_HEADS] for site, own in heads.items()}
        found: dict[tuple[QuerySite, int | str], list[pd.DataFrame]] = defaultdict(list)
        order: list[int] = []
        bases = self.examples.subset(pair.base for pair in self.pairs)
        total = len(self.pairs) * sum(map(len, tried.values()))
        with progress_bar(total=total, desc=description, unit="patch") as bar:
            for batch in example_batches(bases, bases.batch_size):
                order += batch.indices
                pairs = [self.pairs[i] for i in batch.indices]
                both = patches(batch, pairs)
                prefixed = prefixed_rows(self.model, batch, both)
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
        pairs = [self.pairs[i] for i in order]
        return pd.DataFrame(
            [
                {"layer": site.layer, "head": head}
                | self._row(pd.concat(parts, ignore_index=True), pairs)
                for (site, head), parts in found.items()
            ]
        )

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
        clean = prefixed.unchanged(rows, positions, layers)
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
    fitting = min(PASS_TOKENS // prefixed.tokens.numel(), PASS_BYTES // max(1, prefixed.n_bytes))
    return max(1, fitting)


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
        prefixed = prefixed_rows(model, batch, [Patch(rows, columns, {})])
        logs = prefixed.unchanged(rows, columns, ()).cpu().double()
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
