"""Rows of `benchmarks.training --rows processes`: a launch of two processes against one process.

All are forked here, with one thread each, on the CPU. The ceiling is what two unconnected copies of
the run in one process reach together: 2 where the machine has two free cores and memory to match.
"""

import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import sae_query_steer as sqs
from benchmarks.rounds import faster
from sae_query_steer.training.train import train_on_ranks

FORK = multiprocessing.get_context("fork")  # start-up takes longer than the work


def two_processes(work: Callable[..., None], n_rounds: int) -> list[dict[str, Any]]:
    """Return three rows, of which `equal` says that the weights are bitwise the same.

    Args:
        work: trains with the function that it is given as `train`.
        n_rounds: measured rounds.
    """
    torch.set_num_threads(1)
    ranks, alone, copies, equal = [], [], [], True
    for _ in range(n_rounds):
        with tempfile.TemporaryDirectory() as folder:
            ranks.append(seconds_in(2, work, [f"{folder}/ranks"] * 2, launch=True))
            alone.append(seconds_in(1, work, [f"{folder}/one"]))
            copies.append(seconds_in(2, work, [f"{folder}/0", f"{folder}/1"]) / 2)
            one, both = (sqs.QuerySAEs.load(f"{folder}/{name}") for name in ("one", "ranks"))
        for name, sae in one.items():
            for key, value in sae.state_dict().items():
                equal &= torch.equal(value, both[name].state_dict()[key])
    rows = {
        "2 processes; one": (ranks, alone),
        "2 unconnected copies, one of them; one (ceiling)": (copies, alone),
        "2 processes; one of 2 unconnected copies (share of the ceiling)": (ranks, copies),
    }
    return [faster(n, list(zip(*pair, strict=True)), equal=equal) for n, pair in rows.items()]


def seconds_in(
    n: int, work: Callable[..., None], folders: list[str], *, launch: bool = False
) -> float:
    """Return the seconds of training in n forked processes, of one launch or unconnected."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def run(rank: int) -> None:
        if launch:
            here = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update(here, RANK=str(rank))
        work(train=partial(train_on_ranks, out=folders[rank]))

    workers = [FORK.Process(target=run, args=[rank]) for rank in range(n)]
    begun = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    return time.perf_counter() - begun
