"""How queries go from the rank that read them to the one that trains, and SAEs to all.

Rank r of n trains the sites r, r + n, ... and runs the model over the forward batches r, r + n, ...
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, distributed

from sae_query_steer.models.launch import Ranks
from sae_query_steer.sae.collection import QuerySAEs
from sae_query_steer.sites import QuerySite


def exchange(
    ranks: Ranks,
    queries: Mapping[str, Tensor],
    sites: Sequence[QuerySite],
    n_tokens: Sequence[int],
) -> Callable[[], list[dict[str, Tensor]]]:
    """Begin to send the queries of a forward batch to the ranks that train the sites.

    Args:
        ranks: this process and the others.
        queries: those of this rank's batch [token d_in], by hook name.
        sites: all of them.
        n_tokens: tokens of the batch of each rank.

    Returns:
        A function that waits for the end of it. It returns the queries of this rank's sites in the
        batch of each rank, in the order of ranks.

    Raises:
        RuntimeError: see `Ranks.wait`.
    """
    everyone = range(ranks.n)
    ordered = [site.hook_name for rank in everyone for site in ranks.own(sites, rank)]
    sent = torch.cat([queries[name].to(ranks.device).flatten() for name in ordered])
    widths = [sum(site.d_in for site in ranks.own(sites, rank)) for rank in everyone]
    sizes = [n * widths[ranks.rank] for n in n_tokens]
    received = sent.new_empty(sum(sizes))
    shares = [n_tokens[ranks.rank] * width for width in widths]
    with ranks.others():
        work = distributed.all_to_all_single(received, sent, sizes, shares, async_op=True)
    assert work is not None, "async_op returns a handle"

    def wait() -> list[dict[str, Tensor]]:
        with ranks.others():
            work.wait()
        found = []
        for n, batch in zip(n_tokens, received.split(sizes), strict=True):
            parts = batch.split([n * site.d_in for site in ranks.own(sites)])
            pairs = zip(ranks.own(sites), parts, strict=True)
            found.append({site.hook_name: part.view(n, -1) for site, part in pairs})
        return found

    return wait


def joined(
    ranks: Ranks, share: QuerySAEs | None, sites: Sequence[QuerySite], folder: Path
) -> QuerySAEs:
    """Return the SAEs of all ranks, through files in a folder that all can read.

    Args:
        ranks: this process and the others.
        share: those of this rank, None if it has no site.
        sites: the sites of all.
        folder: on a disk that all share.

    Raises:
        RuntimeError: see `Ranks.wait`.
    """
    if share is not None:
        if ranks.n == 1:
            return share
        share.save(folder / f"rank-{ranks.rank}", overwrite=True)
    ranks.wait()
    parts = [
        QuerySAEs.load(folder / f"rank-{rank}", device=ranks.device)
        for rank in range(min(ranks.n, len(sites)))
    ]
    ranks.wait()
    return join_ranks(parts, sites)


def join_ranks(parts: Sequence[QuerySAEs], sites: Sequence[QuerySite]) -> QuerySAEs:
    """Return the SAEs of several processes as one process would have returned them."""
    names = [site.hook_name for site in sites]
    saes = {name: part[name] for name in names for part in parts if name in part}
    metrics = None
    if all(part.measured for part in parts):
        table = pd.concat([part.metrics for part in parts])
        layers = [table[table["layer"] == site.layer] for site in sites]
        metrics = pd.concat(layers, ignore_index=True)
    return QuerySAEs(saes, metrics, parts[0].settings)
