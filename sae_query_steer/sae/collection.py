"""The SAEs of several query sites together: what training returns and steering takes."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sae_query_steer.sae.core import QueryHeadSAE
from sae_query_steer.sae.reading import read_sae
from sae_query_steer.sites import QuerySite
from sae_query_steer.storage.folders import (
    json_rows,
    new_folder,
    read_index,
    rows_table,
    write_json,
)
from sae_query_steer.storage.safe_reading import inside

FORMAT = "sae_query_steer.saes/1"

INDEX = "query_saes.json"
"""The file that every folder of SAEs holds."""


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
            raise ValueError("there are no SAEs: give at least one, by hook name")
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
                "these SAEs were not measured: train them with metric_tokens above 0, or see "
                "evaluate_saes"
            )
        return self._metrics

    def __repr__(self) -> str:
        rows = (
            f"{name}: {sae.cfg.architecture()}, {sae.n_heads} heads of {sae.d_head}, "
            f"{sae.d_latent} latents each"
            for name, sae in self.items()
        )
        return "QuerySAEs(" + "; ".join(rows) + ")"

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
            # JSON knows no NaN, as of a head that is constant.
            rows = json_rows(self.metrics) if self.measured else None
            index = {"format": FORMAT, "hook_names": list(self), "metrics": rows}
            write_json(new / INDEX, index | {"settings": self.settings})

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "cpu") -> "QuerySAEs":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the folder is of another format or damaged, or an SAE in it is not a
                query-head SAE.
        """
        folder = Path(folder)
        index = read_index(inside(folder, INDEX), FORMAT)
        names, rows = index.get("hook_names"), index.get("metrics")
        settings = index.get("settings")
        if not isinstance(names, list) or not isinstance(settings, dict | None):
            raise ValueError(f"{folder / INDEX} is damaged: it lists no SAEs")
        try:
            _check_names(names)
            table = None if rows is None else rows_table(rows)
        except ValueError as error:
            raise ValueError(f"{folder / INDEX} is damaged: {error}") from error
        return cls(
            {name: read_sae(folder, name, device=device) for name in names},
            table,
            settings,
        )


def _check_names(names: Iterable[object]) -> None:
    """Raise unless all are names of query hook points: they become folders."""
    seen = set()
    for name in names:
        if not isinstance(name, str) or name in seen:
            raise ValueError(f"{name!r:.80} is no name, or there twice")
        QuerySite.from_hook_name(name, n_heads=1, d_head=1)
        seen.add(name)
