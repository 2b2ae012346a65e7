"""Training in several processes, which share the forward pass and the layers.

    torchrun --nproc-per-node N --no-python sae-query-steer train ...

Each process holds the model, runs it over its share of the forward batches, and trains the SAEs of
its share of the layers. Every SAE sees the same queries in the same order as in one process, so the
result equals that of one process: bitwise, where device, number format and number of threads are
equal.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from sae_query_steer.config import TrainingConfig
from sae_query_steer.data.token_rows import Texts
from sae_query_steer.sae.collection import QuerySAEs
from sae_query_steer.sites import QuerySite
from sae_query_steer.training.ranks import Ranks
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

    Returns:
        The SAEs of all sites, in every process.

    Raises:
        BlockingIOError: as `train_query_saes`.
        FileExistsError: as `train_query_saes`.
        RuntimeError: another process has ended, or can't be reached.
        ValueError: as `train_query_saes`.
    """
    again: Any = {"out": out, "resume": resume, "overwrite": overwrite, "start": start}
    n = int(os.environ.get("WORLD_SIZE", "1"))
    if n == 1:
        return train_query_saes(model, texts, sites, config, **again)
    device = torch.device(model.cfg.device)
    on_gpu = device.type == "cuda"
    ranks = Ranks(int(os.environ["RANK"]), n, str(device) if on_gpu else "cpu")
    with ranks.others():
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo", device_id=device if on_gpu else None
        )
    saes = train_query_saes(model, texts, sites, config, **again, ranks=ranks)
    # Not after an error: this process must end, and NCCL would first wait for the others.
    distributed.destroy_process_group()
    return saes


def local_device() -> str | None:
    """Return the GPU of this process of a launch; None leaves the choice to TransformerLens."""
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return None
