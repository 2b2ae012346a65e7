"""Training in several processes, each of which trains its share of the layers.

    torchrun --nproc-per-node N --no-python sae-query-steer train ...

Layers share the model only, of which every process holds a copy, so nothing is sent: each process
writes its own folder, and the first joins them. A site's SAE does not depend on the sites trained
with it, so the result equals that of one process.
"""

import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import distributed

from sae_query_steer.config import TrainingConfig
from sae_query_steer.data.token_rows import Texts
from sae_query_steer.sae.collection import INDEX, QuerySAEs
from sae_query_steer.sites import QuerySite
from sae_query_steer.storage.folders import check_replaceable, locked
from sae_query_steer.training.train import train_query_saes


def train_on_ranks(
    model: Any,
    texts: Texts,
    sites: Sequence[QuerySite],
    config: TrainingConfig,
    *,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    start: QuerySAEs | None = None,
) -> QuerySAEs:
    """Train the sites in all processes of a launch, or in this one if there is no launch.

    Rank r of n trains the sites r, r + n, ... in `<out>.rank<r>of<n>`, which can be stopped and
    resumed as any run, with the same number of processes.

    Args:
        model: this process's copy.
        texts: the same in every process.
        sites: all of them, the same in every process.
        config: as for `train_query_saes`.
        out: the folder of all SAEs, on a disk that all processes share.
        resume: as for `train_query_saes`.
        overwrite: as for `train_query_saes`.
        start: as for `train_query_saes`.

    Returns:
        The SAEs of all sites, in every process.

    Raises:
        BlockingIOError: as `train_query_saes`.
        FileExistsError: as `train_query_saes`.
        ValueError: as `train_query_saes`, or there are more processes than sites.
    """
    out = Path(out)
    rank, n = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if n > max(1, len(sites)):
        raise ValueError(f"processes must be at most one per layer, {len(sites)}, got {n}")
    again: Any = {"resume": resume, "overwrite": overwrite, "start": start}
    if n == 1:
        return train_query_saes(model, texts, sites, config, out=out, **again)
    if resume and (out / INDEX).is_file():
        with suppress(ValueError) if overwrite else nullcontext():  # of another run
            return train_query_saes(model, texts, sites, config, out=out, resume=True, start=start)
    with locked(out) if rank == 0 else nullcontext():
        check_replaceable(out, overwrite=overwrite, holding=INDEX)
        parts = [out.with_name(f"{out.name}.rank{r}of{n}") for r in range(n)]
        train_query_saes(model, texts, sites[rank::n], config, out=parts[rank], **again)
        # The first process to finish may wait long for the last.
        distributed.init_process_group("gloo", timeout=timedelta(weeks=52))
        try:
            distributed.barrier()
            if rank == 0:
                joined = join_ranks([QuerySAEs.load(part) for part in parts], sites)
                joined.save(out, overwrite=overwrite)
                for part in parts:
                    shutil.rmtree(part, ignore_errors=True)
            distributed.barrier()
        finally:
            distributed.destroy_process_group()
        return QuerySAEs.load(out, device=str(model.cfg.device))


def join_ranks(parts: Sequence[QuerySAEs], sites: Sequence[QuerySite]) -> QuerySAEs:
    """Return the SAEs of several processes as one process would have returned them."""
    names = [site.hook_name for site in sites]
    saes = {name: part[name] for name in names for part in parts if name in part}
    metrics = None
    if all(part.measured for part in parts):
        table = pd.concat([part.metrics for part in parts])
        layers = [table[table["layer"] == site.layer] for site in sites]
        metrics = pd.concat(layers, ignore_index=True)
    return QuerySAEs(saes, metrics, {**(parts[0].settings or {}), "hook_names": names})


def local_device() -> str | None:
    """Return the GPU of this process of a launch; None leaves the choice to TransformerLens."""
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return None
