"""The SAEs of several query sites together: what training returns and steering takes."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from pydantic import JsonValue

from sae_query_steer.sae.core import QueryHeadSAE
from sae_query_steer.sae.reading import read_sae
from sae_query_steer.sites import QuerySite
from sae_query_steer.storage.folders import new_folder
from sae_query_steer.storage.records import Record, Table, read_record, write_record

INDEX = "query_saes.json"
"""The file that every folder of SAEs holds."""


class SAEsIndex(Record):
    """What `query_saes.json` holds."""

    format: Literal["sae_query_steer.saes/1"]
    """Version of the format."""

    hook_names: tuple[str, ...]
    """The sites; each has a SAELens folder of that name."""

    metrics: Table | None
    """See `QuerySAEs.metrics`."""

    settings: dict[str, JsonValue] | None
    """See `QuerySAEs`."""


class QuerySAEs(Mapping[str, QueryHeadSAE[Any]]):
    """A mapping from hook name to the SAE of all heads of that site.

    Args:
        saes: the SAEs, by hook name.
        metrics: one row per layer and head: l0, explained_variance, dead_share, n_tokens.
        settings: what they were trained with, as JSON.
    """

    def __init__(
        self,
        saes: Mapping[str, QueryHeadSAE[Any]],
        metrics: pd.DataFrame | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if not saes:
            raise ValueError("saes must hold at least one SAE, by hook name, got none")
        self._saes = dict(saes)
        self._metrics = metrics
        self.settings = settings

    def __getitem__(self, hook_name: str) -> QueryHeadSAE[Any]:
        return self._saes[hook_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._saes)

    def __len__(self) -> int:
        return len(self._saes)

    @property
    def measured(self) -> bool:
        """Whether there are `metrics`."""
        return self._metrics is not None

    @property
    def metrics(self) -> pd.DataFrame:
        """One row per layer and head: l0, explained_variance, dead_share, n_tokens.

        Raises:
            ValueError: they were trained without measuring.
        """
        if self._metrics is None:
            raise ValueError(
                "these SAEs were not measured: train them with metric_tokens above 0, or call "
                "evaluate_saes"
            )
        return self._metrics

    def __repr__(self) -> str:
        name, first = next(iter(self.items()))
        return (
            f"QuerySAEs({first.cfg.architecture()}, {first.n_heads} heads, {first.d_latent} "
            f"latents each, at {name} and {len(self) - 1} more)"
        )

    def to(self, device: str | torch.device) -> "QuerySAEs":
        """Move every SAE to a device, in place, and return this mapping."""
        for sae in self.values():
            sae.to(device=device)
        return self

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write a folder with one SAELens folder per site, whole or not at all.

        Each of them loads with SAELens's `SAE.load_from_disk` once this package is imported.

        Raises:
            FileExistsError: the folder exists and `overwrite` is False.
            ValueError: a name is not that of a query hook point.
        """
        _check_names(self)
        with new_folder(folder, overwrite=overwrite, holding=INDEX) as new:
            for name, sae in self.items():
                sae.save_model(new / name)
            index = SAEsIndex(
                format="sae_query_steer.saes/1",
                hook_names=tuple(self),
                metrics=self._metrics,
                settings=None if self.settings is None else dict(self.settings),
            )
            write_record(new / INDEX, index)

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "cpu") -> "QuerySAEs":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the folder is of another format or damaged, or an SAE in it is not a
                query-head SAE.
        """
        index = read_record(folder, INDEX, SAEsIndex)
        try:
            _check_names(index.hook_names)
        except ValueError as error:
            raise ValueError(f"{Path(folder) / INDEX} is damaged: {error}") from error
        saes = {n: read_sae(Path(folder), n, device=device) for n in index.hook_names}
        return cls(saes, index.metrics, index.settings)


def _check_names(names: Iterable[object]) -> None:
    """Raise unless all are names of query hook points: they become folders."""
    seen = set()
    for name in names:
        if not isinstance(name, str) or name in seen:
            raise ValueError(f"{name!r:.80} is no name, or there twice")
        QuerySite.from_hook_name(name, n_heads=1, d_head=1)
        seen.add(name)
