"""The processes of a launch by torchrun, which share the work."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process and the others of its launch; by default there is no other."""

    rank: int = 0
    """Number of this process, from 0."""

    n: int = 1
    """Number of processes."""

    device: str = "cpu"
    """Where tensors are sent from: a GPU with NCCL, the CPU with gloo."""

    def own(self, items: Sequence[Item], rank: int | None = None) -> Sequence[Item]:
        """Return the share of a rank, this one by default: every n-th item; it may be empty."""
        return items[self.rank if rank is None else rank :: self.n]

    def wait(self) -> None:
        """Wait until all ranks are here.

        Raises:
            RuntimeError: another rank has ended, or can't be reached.
        """
        if self.n > 1:
            with self.others():
                distributed.barrier()

    def gathered(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in their order.

        Raises:
            RuntimeError: see `wait`.
        """
        found = [value] * self.n
        if self.n > 1:
            with self.others():
                distributed.all_gather_object(found, value)
        return found

    def summed(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of tensors over all ranks, bitwise the same in each; alone, the tensors.

        Raises:
            RuntimeError: see `wait`.
        """
        if self.n == 1:
            return list(values)
        joined = torch.cat([value.flatten().to(self.device) for value in values])
        with self.others():
            distributed.all_reduce(joined)
        parts = joined.split([value.numel() for value in values])
        return [part.view_as(like).to(like) for part, like in zip(parts, values, strict=True)]

    @contextmanager
    def others(self) -> Iterator[None]:
        """Name the cause where a call that needs the other ranks fails.

        Raises:
            RuntimeError: see `wait`.
        """
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.n} stops because another rank has ended or can't be "
                "reached: its own error says why; start all again, with resume=True to continue "
                "where they stopped"
            ) from error


ALONE = Ranks()
"""One process."""


@contextmanager
def launched(device: torch.device | None = None) -> Iterator[Ranks]:
    """Connect the processes of a launch for a `with` block; without a launch there is one.

    Args:
        device: a GPU from which tensors are sent, by NCCL; otherwise gloo sends from the CPU.

    Raises:
        RuntimeError: another process has ended, or can't be reached.
    """
    n = int(os.environ.get("WORLD_SIZE", "1"))
    if n == 1:
        yield ALONE
        return
    on_gpu = device is not None and device.type == "cuda"
    ranks = Ranks(int(os.environ["RANK"]), n, str(device) if on_gpu else "cpu")
    with ranks.others():
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo", device_id=device if on_gpu else None
        )
    yield ranks
    # Not after an error: this process must end, and NCCL would first wait for the others.
    distributed.destroy_process_group()


def local_device() -> str | None:
    """Return the GPU of this process of a launch; None leaves the choice to TransformerLens."""
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return None
