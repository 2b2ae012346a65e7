"""What is measured of the sites before anything is steered."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from sae_query_steer.data.tokenized import TokenizedExamples
from sae_query_steer.diagnostics.class_separability import separability
from sae_query_steer.diagnostics.interchange import interchange_effect
from sae_query_steer.diagnostics.verdicts import site_verdicts
from sae_query_steer.sae.encoders import QueryEncoder
from sae_query_steer.sites import ALL_HEADS, QuerySite


def layer_verdicts(
    model: Any,
    encoders: Mapping[str, QueryEncoder],
    sites: Sequence[QuerySite],
    examples: TokenizedExamples,
    *,
    n_pairs: int = 64,
    seed: int = 0,
) -> pd.DataFrame:
    """Return interchange effect, separability and verdict of each layer, all heads together.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        encoders: by hook name.
        sites: one for each layer.
        examples: of `tokenize_examples`.
        n_pairs: of the interchange effect.
        seed: of pairs and splits.
    """
    moved = interchange_effect(model, sites, examples, n_pairs=n_pairs, per_head=False, seed=seed)
    apart = separability(model, encoders, examples, seed=seed)
    table = moved.merge(apart[apart["head"] == ALL_HEADS], on=["layer", "head"])
    return site_verdicts(table.drop(columns="head"))
