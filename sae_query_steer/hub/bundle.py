"""`Bundle` and `load_bundle`: what a bundle holds, read back once all of it is checked."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.hub.files import check_files
from sae_query_steer.hub.identity import check_data, check_model
from sae_query_steer.hub.layout import (
    CENTROIDS,
    EVALUATION,
    FINGERPRINT,
    HEADS,
    LAYERS,
    STEERER,
    read_index,
)
from sae_query_steer.models.fingerprint import (
    Fingerprint,
    check_reconstructions,
    check_whole,
    default_tolerance,
)
from sae_query_steer.sae.collection import QuerySAEs
from sae_query_steer.steering.files import steerer_from_settings
from sae_query_steer.steering.steerer import LatentGradientSteerer
from sae_query_steer.storage.folders import read_json, read_tensors, rows_table
from sae_query_steer.targets.builder import check_shapes
from sae_query_steer.targets.capture import reconstructions
from sae_query_steer.targets.centroids import CentroidTargets


@dataclass(frozen=True, kw_only=True, eq=False)
class Bundle:
    """What a bundle holds; `load_bundle` and `from_pretrained` make it."""

    saes: QuerySAEs
    """The SAEs of all heads, by hook name."""

    targets: CentroidTargets | None
    """The centroids, if it has some."""

    steerer: LatentGradientSteerer | None
    """The steerer over these SAEs and centroids, if it has one."""

    evaluation: pd.DataFrame | None
    """The table of scores that it was published with, if any."""

    model: Mapping[str, Any]
    """Name, sizes and number format of the model that it was made on."""

    data: Mapping[str, Any] | None
    """Number, classes and hash of the labelled examples, if they were recorded."""

    fingerprint: Fingerprint
    """The model's queries on fixed tokens, and what the SAEs make of them."""

    def check(self, model: Any, examples: Iterable[LabelledExample] | None = None) -> None:
        """Raise unless this is the model, and these the examples, that the bundle was made on.

        Raises:
            ValueError: another model, or other examples; the message shows both sides.
        """
        check_model(self.model, self.fingerprint, model)
        if examples is not None:
            check_data(self.data, examples)


def load_bundle(
    folder: str | Path,
    *,
    model: Any = None,
    device: str | None = None,
) -> Bundle:
    """Read a bundle that `save_bundle` wrote, once every file is what its list says.

    The files of single heads are for plain SAELens, and are not read here.

    Args:
        folder: the bundle.
        model: a model to check against the fingerprint before anything is returned; None checks
            nothing (a steerer checks it when it is applied).
        device: where to put the SAEs; None means where the model is, or the CPU without one.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, of another format, or not the one that the bundle lists; the
            parts do not belong together; or it is another model, with both sides shown.
    """
    folder = Path(folder)
    if device is None:
        device = "cpu" if model is None else str(model.cfg.device)
    index, files = read_index(folder)
    check_files(
        folder,
        {name: entry for name, entry in files.items() if not name.startswith(f"{HEADS}/")},
    )
    saes = QuerySAEs.load(folder / LAYERS, device=device)
    if list(saes) != index["hook_names"]:
        raise ValueError(f"{folder} lists {index['hook_names']} and holds SAEs at {list(saes)}")
    fingerprint = _read_fingerprint(folder / FINGERPRINT, list(saes), str(index["model"]["dtype"]))
    stored = {name: query.to(device) for name, query in fingerprint.queries.items()}
    dtypes = {str(sae.dtype).removeprefix("torch.") for sae in saes.values()}
    tolerance = default_tolerance(fingerprint.dtype, *dtypes)
    try:
        check_reconstructions(fingerprint, reconstructions(saes, stored), tolerance=tolerance)
    except ValueError as error:
        raise ValueError(f"{folder} holds SAEs that it was not saved with: {error}") from error
    targets = steerer = evaluation = None
    if any(name.startswith(f"{CENTROIDS}/") for name in files):
        targets = CentroidTargets.load(folder / CENTROIDS)
        check_shapes(targets, saes)
    if STEERER in files:
        if targets is None:
            raise ValueError(f"{folder} holds a steerer and no centroids: fetch it again, whole")
        try:
            steerer = steerer_from_settings(read_json(folder / STEERER), saes, targets)
        except ValueError as error:
            raise ValueError(f"{folder / STEERER}: {error}") from error
    if EVALUATION in files:
        try:
            evaluation = rows_table(read_json(folder / EVALUATION).get("rows"), texts=True)
        except ValueError as error:
            raise ValueError(f"{folder / EVALUATION} is damaged: {error}") from error
    bundle = Bundle(
        saes=saes,
        targets=targets,
        steerer=steerer,
        evaluation=evaluation,
        model=index["model"],
        data=index["data"],
        fingerprint=fingerprint,
    )
    if model is not None:
        bundle.check(model)
    return bundle


def _read_fingerprint(path: Path, hook_names: list[str], dtype: str) -> Fingerprint:
    tensors = read_tensors(path)
    try:
        found = Fingerprint(
            tokens=tensors["tokens"],
            queries={name: tensors[f"query.{name}"] for name in hook_names},
            reconstructions={name: tensors[f"reconstruction.{name}"] for name in hook_names},
            dtype=dtype,
        )
    except KeyError as error:
        raise ValueError(f"{path} is incomplete: it has no {error}") from error
    if found.tokens.dtype != torch.int64:
        raise ValueError(f"{path} is damaged: its tokens are {found.tokens.dtype}, not int64")
    try:
        check_whole(found)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return found
