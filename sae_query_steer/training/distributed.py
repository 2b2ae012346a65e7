"""Training in several processes, which share the forward pass and the layers.

    torchrun --nproc-per-node N --no-python sae-query-steer train ...

Each process holds the model, runs it over its share of the forward batches, and trains the SAEs of
its share of the layers. Every SAE sees the same queries in the same order as in one process, so the
result equals that of one process: bitwise, where device, number format and number of threads are
equal.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sae_query_steer.config import TrainingConfig
from sae_query_steer.data.token_rows import Texts
from sae_query_steer.models.launch import launched
from sae_query_steer.progress import OnMetrics
from sae_query_steer.sae.collection import QuerySAEs
from sae_query_steer.sites import QuerySite
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
    on_metrics: OnMetrics | None = None,
) -> QuerySAEs:
    """Train the sites in all processes of a launch, or in this one if there is no launch.

    Rank r of n runs the model over forward batches r, r + n, ... and trains the sites r, r + n, ...
    There may be more ranks than sites. A stopped run can be continued by another number of ranks.

    Args:
        model: this process's copy. On a GPU queries are sent by NCCL, else by gloo.
        texts: the same in every process.
        sites: all of them, the same in every process.
        config: as for `train_query_saes`.
        out: the folder of all SAEs, on a disk that all processes share.
        resume: as for `train_query_saes`.
        overwrite: as for `train_query_saes`.
        start: as for `train_query_saes`.
        on_metrics: as for `train_query_saes`, in each process.

    Returns:
        The SAEs of all sites, in every process.

    Raises:
        BlockingIOError: as `train_query_saes`.
        FileExistsError: as `train_query_saes`.
        RuntimeError: another process has ended, or can't be reached.
        ValueError: as `train_query_saes`.
    """
    again: Any = {"out": out, "resume": resume, "overwrite": overwrite, "start": start}
    again |= {"on_metrics": on_metrics}
    with launched(torch.device(model.cfg.device)) as ranks:
        return train_query_saes(model, texts, sites, config, **again, ranks=ranks)
