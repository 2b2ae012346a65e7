"""The model card of a bundle, for its page on the hub."""

import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import pandas as pd
from huggingface_hub import ModelCard, ModelCardData

from sae_query_steer.hub.layout import ModelFacts
from sae_query_steer.sae.collection import QuerySAEs
from sae_query_steer.storage.markdown import markdown_table, markdown_text
from sae_query_steer.targets.centroids import CentroidTargets, LearnedTargets

TAGS = (
    *("saelens", "sparse-autoencoder", "mechanistic-interpretability"),
    *("transformer-lens", "attention-queries", "steering", "sae-query-steer"),
)

REPOSITORY = "USER/REPOSITORY"
"""Placeholder that `push_to_hub` replaces by the repository's name."""

_ROWS = 200
"""Rows of a table that a card shows; the files have all."""


def model_card(
    saes: QuerySAEs,
    model: ModelFacts,
    *,
    targets: CentroidTargets | None,
    steerer: Mapping[str, Any] | None,
    evaluation: pd.DataFrame | None,
    heads: Mapping[str, str],
    license: str | None = None,
    note: str = "",
) -> str:
    """Return the README.md of a bundle.

    Args:
        saes: its SAEs, with their metrics and settings where these are known.
        model: the model that they were trained on.
        targets: its centroids or learned targets.
        steerer: the settings of its steerer.
        evaluation: its table of scores.
        heads: the folder of the plain SAE of each head, by its id; empty where there are none.
        license: name of the licence on the hub.
        note: a paragraph of the author's.
    """
    about = ModelCardData(
        library_name="saelens",
        tags=list(TAGS),
        base_model=model.name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model.name) else None,
        license=license,
    )
    sizes = {
        f"{s.cfg.architecture()}, {s.n_heads} heads of {s.d_head}, {s.d_latent} latents per head"
        for s in saes.values()
    }
    card = ModelCard.from_template(
        about,
        template_str=(files("sae_query_steer.hub") / "card.md").read_text(encoding="utf-8"),
        model=model,
        name=markdown_text(model.name),
        facts=markdown_text(model),
        hook_names=", ".join(f"`{name}`" for name in saes),
        first=next(iter(saes)),
        repository=REPOSITORY,
        note=note.strip(),
        head=next(iter(heads.values()), None),
        sizes=sorted(sizes),
        settings=saes.settings and json.dumps(saes.settings, indent=1),
        metrics=_table(saes.metrics if saes.measured else None),
        centroids=targets and _centroids(targets),
        steerer=steerer and json.dumps(steerer, indent=1),
        evaluation=_table(evaluation),
        by_class=evaluation is not None and {"target", "n", "success"} <= set(evaluation.columns),
    )
    return str(card)


def _centroids(targets: CentroidTargets) -> str:
    pairs = zip(targets.classes, targets.counts, strict=True)
    counts = ", ".join(f"{markdown_text(label)} {int(n)}" for label, n in pairs)
    span = markdown_text(targets.span)
    if isinstance(targets, LearnedTargets):
        shares = targets.share_removed.items()
        removed = ", ".join(f"{markdown_text(label)} {share:.0%}" for label, share in shares)
        kind = "Moves" if targets.are_moves else "Points"
        return (
            f"{kind} of latents, learned through the model; scope {span}; examples: {counts}. "
            f"Held-out loss removed: {removed}."
        )
    return f"Mean and variance of each class's latents; span {span}; tokens: {counts}."


def _table(table: pd.DataFrame | None) -> str | None:
    if table is None:
        return None
    left = len(table) - _ROWS
    more = f"\n\n{left} more rows are in the files." if left > 0 else ""
    return markdown_table(table.head(_ROWS)) + more
