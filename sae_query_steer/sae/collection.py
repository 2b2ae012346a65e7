"""The SAEs of several query sites together: what training returns and steering takes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import torch
from pydantic import BeforeValidator, JsonValue
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata

from sae_query_steer.arguments import check_device
from sae_query_steer.sae.core import QueryHeadSAE, with_weights
from sae_query_steer.sites import QuerySite
from sae_query_steer.storage.folders import inside, new_folder
from sae_query_steer.storage.records import Record, Table, read_json, read_record, write_record
from sae_query_steer.storage.tensors import FLOATS, read_shapes, read_tensors

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
        if hook_name not in self._saes:
            raise KeyError(f"no SAE at {hook_name!r}: there are some at {list(self._saes)}")
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
        check_device(device)
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
        with new_folder(folder, overwrite=overwrite, holding=INDEX) as new:
            for name, sae in self.items():
                _check_name(name)
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
        check_device(device)
        index = read_record(folder, INDEX, SAEsIndex)
        names = dict.fromkeys(index.hook_names)
        saes = {name: _read_sae(Path(folder), name, device) for name in names}
        return cls(saes, index.metrics, index.settings)


def _check_name(name: str) -> None:
    """Raise unless this is the name of a query hook point, of which a folder can be made."""
    QuerySite.from_hook_name(name, n_heads=1, d_head=1)


def _read_sae(folder: Path, name: str, device: str) -> QueryHeadSAE[Any]:
    """Return the inference SAE that SAELens's `save_model` wrote to a folder, on a device.

    SAELens's loader makes the tensors that `cfg.json` claims and then reads the weights. Here the
    claims are first compared with the header of the weights, so that nothing larger than the file
    is allocated; the result is the same.
    """
    _check_name(name)
    config_file, weights = f"{name}/cfg.json", f"{name}/sae_weights.safetensors"
    path = inside(folder, config_file)
    architecture = read_json(path).get("architecture")
    classes = SAE_CLASS_REGISTRY.items()
    known = {key: kinds for key, kinds in classes if issubclass(kinds[0], QueryHeadSAE)}
    if not isinstance(architecture, str) or architecture not in known:
        raise ValueError(
            f"architecture in {path} must be one of {sorted(known)}, got {architecture!r:.80}"
        )
    sae_class, config_class = known[architecture]
    kind: Any = Annotated[config_class, BeforeValidator(_settings)]
    config = read_record(folder, config_file, kind)
    sizes = (config.n_heads, config.d_head, config.d_sae_per_head)
    shape = read_shapes(folder, weights).get("W_enc", ("", ()))[1]
    if shape != sizes or min(sizes) < 1:
        raise ValueError(
            f"n_heads, d_head and d_sae_per_head in {path} must be the shape of W_enc, "
            f"{list(shape)}, got {list(sizes)}"
        )
    config.device = "meta"  # nothing is allocated
    try:
        empty = sae_class(config).state_dict()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    expected = {key: (FLOATS, tuple(value.shape)) for key, value in empty.items()}
    tensors = read_tensors(folder, weights, expected)
    sae = with_weights(sae_class, config, tensors, device)
    if not all(bool(value.isfinite().all()) for value in sae.state_dict().values()):
        raise ValueError(f"the weights in {path.parent} must be finite, got NaN or infinity")
    assert isinstance(sae, QueryHeadSAE)
    return sae


def _settings(config: Any) -> Any:
    """Return the fields of a config in JSON, after checking its metadata."""
    metadata = config.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError("metadata must be an object")
    for key in metadata:  # they become attributes, which must not hide SAELens's methods
        if not key.isidentifier() or hasattr(SAEMetadata, key) or key == "self":
            raise ValueError(f"metadata must not have the name {key!r:.80}")
    return {name: value for name, value in config.items() if name != "architecture"}
