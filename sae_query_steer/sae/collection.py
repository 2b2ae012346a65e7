"""The SAEs of several query sites together: what training returns and steering takes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sae_lens import SAE
from sae_lens.util import temporary_seed
from safetensors import SafetensorError

from sae_query_steer.sae.core import QueryHeadSAE
from sae_query_steer.sites import QuerySite
from sae_query_steer.storage import json_rows, new_folder, read_json, write_json

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
        self.metrics = metrics
        self.settings = settings

    def __getitem__(self, hook_name: str) -> QueryHeadSAE[Any]:
        return self._saes[hook_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._saes)

    def __len__(self) -> int:
        return len(self._saes)

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
        """
        with new_folder(folder, overwrite=overwrite, holding=INDEX) as new:
            for name, sae in self.items():
                sae.save_model(new / name)
            # JSON knows no NaN, as of a head that is constant.
            rows = None if self.metrics is None else json_rows(self.metrics)
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
        index = read_json(folder / INDEX)
        if index.get("format") != FORMAT:
            raise ValueError(
                f"{folder} has format {index.get('format')!r}: this version reads {FORMAT!r}"
            )
        names, rows = index.get("hook_names"), index.get("metrics")
        settings = index.get("settings")
        if not (
            isinstance(names, list)
            and isinstance(rows, list | None)
            and isinstance(settings, dict | None)
        ):
            raise ValueError(f"{folder / INDEX} is damaged: it lists no SAEs")
        return cls(
            {str(name): _loaded(folder, str(name), device) for name in names},
            None if rows is None else pd.DataFrame(rows),
            settings,
        )


def _loaded(folder: Path, name: str, device: str) -> QueryHeadSAE[Any]:
    # The name becomes a path: only that of a query hook point may.
    QuerySite.from_hook_name(name, n_heads=1, d_head=1)
    try:
        with temporary_seed(0):  # a new SAE draws weights, which are replaced at once
            sae = SAE.load_from_disk(folder / name, device=device)
    except (KeyError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / name} is no SAE that can be read: {error!r}") from error
    if not isinstance(sae, QueryHeadSAE):
        raise ValueError(f"{folder / name} holds a {type(sae).__name__}, no query-head SAE")
    if not all(bool(value.isfinite().all()) for value in sae.state_dict().values()):
        raise ValueError(f"{folder / name} holds weights that are not finite")
    return sae.requires_grad_(False).eval()
