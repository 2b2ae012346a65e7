"""Queries laid over a span of other texts, and how far they move the next token, site by site."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_query_steer.data.batches import TokenBatch, example_batches
from sae_query_steer.data.examples import LabelledExample, check_classes
from sae_query_steer.data.tokenized import TokenizedExample
from sae_query_steer.diagnostics.interchange_pairs import Pair, draw_pairs, paired_error
from sae_query_steer.diagnostics.metrics import kl_divergence, total_variation
from sae_query_steer.diagnostics.next_tokens import Aims, aims_of
from sae_query_steer.models.activations import next_token_log_probs
from sae_query_steer.models.loading import check_not_steered
from sae_query_steer.scopes.positions import LastPromptToken, Span
from sae_query_steer.sites import ALL_HEADS, QuerySite, check_sites
from sae_query_steer.targets.builder import as_tokenized

_MEASURED = (
    *("kl", "kl_control", "moved", "moved_control", "toward_class", "toward_control"),
    "before",
)
"""What is measured of each receiver; the last is KL(c || unpatched)."""


@dataclass(frozen=True, eq=False)
class Patch:
    """Queries for tokens of the receivers of one batch, by hook name."""

    rows: Int[Tensor, " token"]
    columns: Int[Tensor, " token"]
    queries: Mapping[str, Tensor]

    @classmethod
    def between(cls, mask: Tensor, donors: Sequence[Mapping[str, Tensor]]) -> "Patch":
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


Patches: TypeAlias = Callable[[TokenBatch, Tensor, Sequence[Pair]], tuple[Patch, Patch]]
"""From a batch of receivers, the mask of their span and their pairs to two patches: one that leads
to the other class, and one, the control, that leads to the receiver's own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """Receivers, donors and aims: all of a comparison but whose queries are laid over."""

    model: Any
    sites: Sequence[QuerySite]
    examples: Sequence[TokenizedExample]
    """Counterparts, where there are such, stand after the examples they belong to."""

    pairs: Sequence[Pair]
    aims: Aims
    span: Span
    per_head: bool
    batch_size: int
    _cases: list[tuple[QuerySite, int | str]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        heads = {s: [*range(s.n_heads)] if self.per_head else [] for s in self.sites}
        cases = [(site, head) for site in self.sites for head in [*heads[site], ALL_HEADS]]
        object.__setattr__(self, "_cases", cases)

    def table(self, patches: Patches, description: str) -> pd.DataFrame:
        """Return how far patches move the next token, a row for each site and head."""
        found: dict[tuple[int, int | str], list[Tensor]] = {
            (site.layer, head): [] for site, head in self._cases
        }
        order: list[int] = []
        with tqdm(total=len(self.pairs) * len(self._cases), desc=description, unit="patch") as bar:
            for batch, pairs in self._batches():
                order += batch.indices
                mask = batch.mask(self.span)
                for site, head, values in self._moved(batch, pairs, *patches(batch, mask, pairs)):
                    found[site.layer, head].append(values)
                    bar.update(len(pairs))
        ordered = [self.pairs[i] for i in order]
        gap = float(self.aims.gaps.mean())
        shared = {
            "class_gap": gap,
            "class_gap_se": paired_error(self.aims.gaps, self.pairs),
            "n_pairs": len(self.pairs),
        }
        rows = []
        for site, head in self._cases:
            values = torch.cat(found[site.layer, head], dim=1)
            means = dict(zip(_MEASURED, values.mean(1).tolist(), strict=True))
            before = means.pop("before")
            effect = (
                values[_MEASURED.index("toward_class")]
                - (values[_MEASURED.index("toward_control")])
            )
            rows.append(
                {
                    "layer": site.layer,
                    "head": head,
                    **means,
                    "toward_share": means["toward_class"] / before if before > 0 else float("nan"),
                    "class_effect": float(effect.mean()),
                    "class_effect_se": paired_error(effect, ordered),
                    "class_share": float(effect.mean()) / gap if gap > 0 else float("nan"),
                    **shared,
                }
            )
        return pd.DataFrame(rows)

    def _batches(self) -> Iterator[tuple[TokenBatch, list[Pair]]]:
        receivers = [self.examples[pair.receiver] for pair in self.pairs]
        for batch in example_batches(receivers, self.batch_size):
            yield batch, [self.pairs[i] for i in batch.indices]

    def _moved(
        self, batch: TokenBatch, pairs: Sequence[Pair], other: Patch, control: Patch
    ) -> Iterator[tuple[QuerySite, int | str, Tensor]]:
        """Yield what two patches do at each site and head, [measured receiver]."""
        clean = other.next_tokens(self.model, batch)
        clean_control = control.next_tokens(self.model, batch)
        aims = torch.stack([self.aims.log_probs[pair.other] for pair in pairs])
        aim, aim_control = (aims[patch.rows].to(clean) for patch in (other, control))
        before, before_control = (
            kl_divergence(aim, clean),
            kl_divergence(aim_control, clean_control),
        )
        for site, head in self._cases:
            patched = other.next_tokens(self.model, batch, site, head)
            moved = control.next_tokens(self.model, batch, site, head)
            values = (
                other.mean_per_row(kl_divergence(clean, patched)),
                control.mean_per_row(kl_divergence(clean_control, moved)),
                other.mean_per_row(total_variation(clean, patched)),
                control.mean_per_row(total_variation(clean_control, moved)),
                other.mean_per_row(before - kl_divergence(aim, patched)),
                control.mean_per_row(before_control - kl_divergence(aim_control, moved)),
                other.mean_per_row(before),
            )
            yield site, head, torch.stack(values).double().cpu()


def prepared(
    model: Any,
    sites: Sequence[QuerySite],
    examples: Sequence[LabelledExample | TokenizedExample],
    counterparts: Sequence[LabelledExample | TokenizedExample] | None,
    *,
    span: Span | None,
    n_pairs: int,
    per_head: bool,
    seed: int,
    prepend_bos: bool,
    chat_template: bool,
    batch_size: int,
) -> Trial:
    """Return a trial over labelled examples; see `interchange_effect` for what is given.

    Raises:
        ValueError: no pairs, too few examples of a class, or counterparts that do not fit.
    """
    if n_pairs < 1:
        raise ValueError(f"n_pairs={n_pairs} is not allowed: give 1 or more")
    span = LastPromptToken() if span is None else span
    check_sites(sites)
    for site in sites:
        site.check(model)
    check_not_steered(model)
    tokenizing = {"prepend_bos": prepend_bos, "chat_template": chat_template}
    tokenized = as_tokenized(examples, model, **tokenizing)
    labels = [example.label for example in tokenized]
    check_classes(labels)
    if counterparts is not None:
        others = as_tokenized(counterparts, model, **tokenizing)
        if len(others) != len(tokenized):
            raise ValueError(
                f"{len(others)} counterparts do not fit {len(tokenized)} examples: give one for "
                "each, in the same order"
            )
        same = [i for i, other in enumerate(others) if other.label == labels[i]]
        if same:
            raise ValueError(
                f"the counterpart of example {same[0]} is of its own class {labels[same[0]]!r}: "
                "give the same text made for another class"
            )
        tokenized = [*tokenized, *others]
    pairs = draw_pairs(labels, n_pairs, seed, counterparts=counterparts is not None)
    aims = aims_of(
        model,
        tokenized,
        pairs,
        span,
        counterparts=counterparts is not None,
        batch_size=batch_size,
    )
    return Trial(
        model=model,
        sites=sites,
        examples=tokenized,
        pairs=pairs,
        aims=aims,
        span=span,
        per_head=per_head,
        batch_size=batch_size,
    )
