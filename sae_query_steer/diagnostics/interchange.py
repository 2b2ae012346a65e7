"""Effects on the next token: of real queries patched in (interchange), and of a steerer."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from sae_query_steer.arguments import check_kind
from sae_query_steer.data.tokenized import TokenizedExamples
from sae_query_steer.diagnostics.patches import Pair, Patch
from sae_query_steer.diagnostics.trial import Trial
from sae_query_steer.scopes.positions import TokenPositions
from sae_query_steer.sites import QuerySite, check_sites
from sae_query_steer.steering.latent_descent import LatentGradientSteerer


def interchange_effect(
    model: Any,
    sites: Sequence[QuerySite],
    examples: TokenizedExamples,
    *,
    counterparts: TokenizedExamples | None = None,
    n_pairs: int = 64,
    per_head: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """Return how far real queries of another class move the next token, at each site and head.

    For each pair the queries at the source's span are patched into the base's, token by token from
    the start of the span, and the next-token distribution is read at the patched positions. The
    negative control patches queries of another example of the base's own class. It is an
    on-distribution reference, not a bound: a steerer can overshoot it.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        sites: where, from `query_sites`.
        examples: two or more of each class, with the span to patch.
        counterparts: for each example the same text made for another class, such as the prompt
            with another request. It is then the source, and c below is its own next-token
            distribution: the content is equal on both sides, so the class stands out more.
        n_pairs: pairs, drawn evenly from the classes; every example is a base once before one is
            so twice.
        per_head: also patch every head alone, not only all heads of a layer.
        seed: of the pairs.

    Returns:
        A row for each layer, with head "all", and with `per_head` for each of its heads, with

        - kl, kl_control: mean KL(unpatched || patched) of the next token in nats, with a source of
          another class and of the base's own
        - moved, moved_control: mean total variation between unpatched and patched
        - toward_class: by how many nats the patch lowers KL(c || next token), where c is the mean
          next-token distribution of the source's class at its own span
        - toward_share: toward_class as a share of KL(c || unpatched)
        - toward_control: as toward_class, towards the same c, with queries of the own class
        - class_effect: toward_class minus toward_control
        - class_effect_se: its standard error, the larger of those clustered by bases and by
          sources; NaN with fewer than two of either, too small with fewer than some 20 examples a
          class
        - class_gap: KL(c || next token of the base) minus KL(c || next token of the source), both
          unpatched, the source left out of c
        - class_share: class_effect as a share of class_gap: 1 is as near as a real prompt of the
          source's class. NaN without a gap.
        - class_gap_se: the standard error of class_gap
        - n_pairs

        `site_verdicts` interprets it.

    Raises:
        ValueError: too few examples of a class, counterparts that do not fit, or a model that is
            being steered.

    Source: interchange interventions as in causal abstraction.
    """
    check_sites(model, sites)
    trial = Trial(model, sites, examples, counterparts, n_pairs=n_pairs, seed=seed)

    def patches(mask: Tensor, pairs: Sequence[Pair]) -> tuple[Patch, Patch]:
        return (
            _laid_over(mask, [trial.queries[pair.source] for pair in pairs]),
            _laid_over(mask, [trial.queries[pair.control] for pair in pairs]),
        )

    heads = {site: range(site.n_heads) for site in sites}
    return trial.table(heads, patches, per_head=per_head, description="Patching queries")


def achieved_effect(
    model: Any,
    steerer: LatentGradientSteerer,
    examples: TokenizedExamples,
    *,
    counterparts: TokenizedExamples | None = None,
    n_pairs: int = 64,
    per_head: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """Return how far a steerer moves the next token towards another class, at each site and head.

    The same metric as `interchange_effect`, with the same pairs for equal examples and seed, for
    the steering intervention: the base's own queries are steered towards the source's class and,
    for the negative control, towards the class that the base has already. Nothing is generated.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        steerer: gives encoders, centroids (best of other texts than the examples), objective and
            strength; its sites are steered one at a time, at the span of the examples and not at
            its scope, and its target is replaced.
        examples: as in `interchange_effect`, like all other arguments.
        counterparts: as there.
        n_pairs: as there.
        per_head: as there, for the heads of the steerer.
        seed: as there.

    Returns:
        The columns of `interchange_effect`.

    Raises:
        ValueError: too few examples of a class, a class without a centroid, or a steerer of another
            model.
    """
    check_kind("steerer", steerer, LatentGradientSteerer, "other edits have no target to replace")
    steerer.check_model(model)
    chosen = steerer.where.chosen
    heads = {at.site: at.heads for at in chosen.values() if isinstance(at.site, QuerySite)}
    trial = Trial(model, [*heads], examples, counterparts, n_pairs=n_pairs, seed=seed)

    def patches(mask: Tensor, pairs: Sequence[Pair]) -> tuple[Patch, Patch]:
        rows, columns = mask.nonzero(as_tuple=True)
        bases = [pair.base for pair in pairs]
        lengths = [trial.examples[base].prompt_length for base in bases]
        tokens = TokenPositions(
            row=rows,
            position=columns,
            n_rows=len(pairs),
            prompt_lengths=torch.tensor(lengths),
        )
        made = []
        for sources in ([pair.source for pair in pairs], bases):
            towards = replace(steerer, target=[trial.examples[i].label for i in sources])
            steered = {}
            for site in heads:
                at = chosen[site.hook_name]
                queries = torch.cat([trial.queries[base][site.hook_name] for base in bases])
                own = queries[:, list(at.heads)]
                queries[:, list(at.heads)] += towards.change(own, at, tokens).delta.to(own)
                steered[site.hook_name] = queries
            made.append(Patch(rows, columns, steered))
        return made[0], made[1]

    return trial.table(heads, patches, per_head=per_head, description="Steering queries")


def _laid_over(mask: Tensor, sources: Sequence[Mapping[str, Tensor]]) -> Patch:
    """Lay each source over the span of its row, token by token; the longer span is cut."""
    rows, columns = [], []
    parts: dict[str, list[Tensor]] = {name: [] for name in sources[0]}
    for row, source in enumerate(sources):
        own = mask[row].nonzero()[:, 0]
        n = min(len(own), len(next(iter(source.values()))))
        rows.append(torch.full((n,), row))
        columns.append(own[:n])
        for name, queries in source.items():
            parts[name].append(queries[:n])
    queries = {name: torch.cat(part) for name, part in parts.items()}
    return Patch(torch.cat(rows), torch.cat(columns), queries)
