"""What SAEs keep of queries, measured on batches as the stream gives them."""

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from sae_query_steer.diagnostics.metrics import ReconstructionMoments
from sae_query_steer.sae.core import QueryHeadSAE
from sae_query_steer.sites import QuerySite
from sae_query_steer.training.stream import Queries


@torch.no_grad()
def reconstruction_metrics(
    saes: Mapping[str, QueryHeadSAE[Any]],
    batches: Iterator[Queries],
    *,
    n_tokens: int,
) -> pd.DataFrame:
    """Return L0, explained variance and share of dead latents of every head.

    Args:
        saes: the SAEs, by hook name.
        batches: flat queries [token head*d_head] by hook name.
        n_tokens: tokens to measure on.

    Returns:
        One row per layer and head with the columns layer, head, l0, explained_variance,
        dead_share (latents that fired at none of these tokens) and n_tokens.
    """
    moments = {name: ReconstructionMoments() for name in saes}
    with tqdm(total=n_tokens, desc="Measuring SAEs", unit="token") as bar:
        seen = 0  # not the bar's count: a user may have switched the bars off
        while seen < n_tokens:
            batch = next(batches)
            for name, sae in saes.items():
                x = batch[name].to(sae.device).unflatten(-1, (sae.n_heads, sae.cfg.d_head))
                latents = sae.encode(x)
                moments[name].update(x, sae.decode(latents), latents)
            seen += len(next(iter(batch.values())))
            bar.update(len(next(iter(batch.values()))))
    tables = []
    for name, moment in moments.items():
        sae = saes[name]
        tables.append(
            pd.DataFrame(
                {
                    "layer": QuerySite.from_hook_name(
                        name, n_heads=sae.n_heads, d_head=sae.cfg.d_head
                    ).layer,
                    "head": range(sae.n_heads),
                    "l0": moment.l0().tolist(),
                    "explained_variance": moment.explained_variance().tolist(),
                    "dead_share": moment.dead_share().tolist(),
                    "n_tokens": moment.n_tokens,
                }
            )
        )
    return pd.concat(tables, ignore_index=True)
