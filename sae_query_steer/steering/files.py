"""A steerer in a folder: its settings as JSON, with its SAEs and centroids or references to them.

Only values of this package are read back, by name from a fixed list, and nothing is executed. A
function of a user's own is no such value, and is refused.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_type_hints

import torch
from pydantic import JsonValue
from torch import Tensor

from sae_query_steer import scopes
from sae_query_steer.arguments import check_kind
from sae_query_steer.descent import control, objectives
from sae_query_steer.sae.collection import QuerySAEs
from sae_query_steer.sae.core import QueryHeadSAE
from sae_query_steer.sae.encoders import IdentityEncoder, QueryEncoder
from sae_query_steer.steering.attention_descent import AttentionSteerer
from sae_query_steer.steering.latent_descent import LatentGradientSteerer
from sae_query_steer.steering.look_at import LookAt
from sae_query_steer.storage.folders import inside, new_folder
from sae_query_steer.storage.records import Record, read_record, write_record
from sae_query_steer.targets.centroids import CentroidTargets

STEERER = "steerer.json"

_NAMES: dict[Any, str] = {
    scopes: "EveryPosition PromptTokens LastPromptToken LastPromptTokens ResponseTokens "
    "FirstResponseTokens Window WindowAroundPromptEnd AtPositions RowMask AfterToken "
    "AnyOf AllOf Not",
    objectives: "SquaredDistance PrototypeLogLikelihood CentroidContrast CosineSimilarity "
    "GaussianLogLikelihood LinearProbe FixedMove",
    control: "ExponentialDecay LinearWarmUp ActiveLatents TopLatents GivenLatents ExceptLatents "
    "TargetLatents PosteriorBelow LatentAbove",
}
VALUES: dict[str, Any] = {
    name: getattr(module, name) for module, names in _NAMES.items() for name in names.split()
} | {"LookAt": LookAt}
"""Values that a file may name."""

_PLAIN = (bool, int, float, NoneType)
_NOT_SETTINGS = {"saes", "targets"}


class _Index(Record):
    format: Literal["sae_query_steer.steerer/1"]
    settings: dict[str, JsonValue]
    saes: str | None
    identities: dict[str, dict[str, int]]
    targets: str | None
    """None for an `AttentionSteerer`, which has no centroids."""


def save_steerer(
    steerer: LatentGradientSteerer | AttentionSteerer,
    folder: str | Path,
    *,
    saes: str | Path | None = None,
    targets: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write a steerer to a folder, whole or not at all.

    Args:
        steerer: what to write.
        folder: the folder to make.
        saes: a folder that holds its SAEs already: it is referred to, relative to `folder` if the
            path is relative, and the SAEs are not written again. None writes them. What it refers
            to outside of `folder` is read only with `follow_references`, see `load_steerer`.
        targets: the same of its centroids; None for an `AttentionSteerer`, which has none.
        overwrite: replace a steerer that is there.

    Raises:
        FileExistsError: the folder exists and `overwrite` is False, or it is something else.
        ValueError: a setting is a function of your own, or an encoder is no SAE of this package.
    """
    kinds = (LatentGradientSteerer, AttentionSteerer)
    check_kind("steerer", steerer, kinds, "other steerers can't be saved")
    if isinstance(steerer, AttentionSteerer) and targets is not None:
        raise ValueError(f"targets must be None, got {targets}: an AttentionSteerer has none")
    settings = steerer_settings(steerer)
    identities = {n: e for n, e in steerer.saes.items() if isinstance(e, IdentityEncoder)}
    own = {n: e for n, e in steerer.saes.items() if isinstance(e, QueryHeadSAE)}
    if others := sorted({*steerer.saes} - {*identities} - {*own}):
        kinds = [type(steerer.saes[name]).__name__ for name in others]
        raise ValueError(
            f"encoders must be query-head SAEs or IdentityEncoder to be saved, got {kinds} at "
            f"{others}"
        )
    with new_folder(folder, overwrite=overwrite, holding=STEERER) as new:
        if own and saes is None:
            QuerySAEs(own).save(new / "saes")
        if isinstance(steerer, LatentGradientSteerer) and targets is None:
            steerer.targets.save(new / "targets")
            targets = "targets"
        index = _Index(
            format="sae_query_steer.steerer/1",
            settings=settings,
            saes=(str(saes) if saes is not None else "saes") if own else None,
            identities={n: dataclasses.asdict(e) for n, e in identities.items()},
            targets=None if targets is None else str(targets),
        )
        write_record(new / STEERER, index)


def load_steerer(
    folder: str | Path, *, device: str = "cpu", follow_references: bool = False
) -> LatentGradientSteerer | AttentionSteerer:
    """Read a steerer that `save_steerer` wrote.

    Args:
        folder: its folder.
        device: where to put its SAEs.
        follow_references: read SAEs and centroids also from outside the folder, where it refers to
            them there. A file from elsewhere could name any folder of this machine or its network,
            so you say so, for a steerer of your own.

    Raises:
        FileNotFoundError: a file is missing, or a folder that it refers to.
        ValueError: a file is damaged, of another format, names a value that there is not, or refers
            to a folder outside and `follow_references` is False.
    """
    folder = Path(folder)
    index = read_record(folder, STEERER, _Index)
    targets, saes = None, {}
    if index.targets is not None:
        targets = CentroidTargets.load(_referred(folder, index.targets, follow_references))
    if index.saes is not None:
        place = _referred(folder, index.saes, follow_references)
        saes = dict(QuerySAEs.load(place, device=device))
    try:
        encoders: dict[str, QueryEncoder] = {
            name: IdentityEncoder(**sizes) for name, sizes in index.identities.items()
        }
        return steerer_from_settings(index.settings, encoders | saes, targets)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / STEERER} is damaged: {error}") from error


def _referred(folder: Path, name: str, follow: bool) -> Path:
    if follow:
        return folder / name
    try:
        return inside(folder, name)
    except ValueError as error:
        raise ValueError(
            f"{error}. If this steerer is your own, load_steerer(..., follow_references=True) "
            "reads what it refers to elsewhere"
        ) from error


def steerer_from_settings(
    settings: Mapping[str, Any], saes: Mapping[str, QueryEncoder], targets: CentroidTargets | None
) -> Any:
    """Return the steerer of some settings, of `steerer_settings`, over SAEs and centroids.

    An `AttentionSteerer`, known by its `look_at`, takes no centroids.

    Raises:
        ValueError: a setting is none, or names a value that there is not, or centroids are missing.
    """
    kind: Any = AttentionSteerer if "look_at" in settings else LatentGradientSteerer
    parts: Any = (saes,) if kind is AttentionSteerer else (saes, targets)
    try:
        values = {name: _read(value) for name, value in settings.items()}
        _check_types(kind, values)
        return kind(*parts, **values)
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError) as error:
        raise ValueError(f"one of its settings is damaged: {error!r:.500}") from error


def steerer_settings(steerer: LatentGradientSteerer | AttentionSteerer) -> dict[str, Any]:
    """Return all settings of a steerer as JSON: two that steer alike have equal ones.

    Raises:
        ValueError: a setting is a function of your own.
    """
    return {
        field.name: _written(getattr(steerer, field.name), field.name)
        for field in dataclasses.fields(steerer)
        if field.init and field.name not in _NOT_SETTINGS
    }


def _written(value: Any, name: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} holds {value}: only finite numbers can be saved")
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)  # the name of a Bloom level
    if isinstance(value, Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {"mapping": [[_written(k, name), _written(v, name)] for k, v in value.items()]}
    if isinstance(value, tuple) and name == "look_at":  # several sources; a list has rows
        return {"tuple": [_written(item, name) for item in value]}
    if isinstance(value, Sequence):
        return [_written(item, name) for item in value]
    if VALUES.get(type(value).__name__) is not type(value):
        raise ValueError(
            f"{name}={value!r} can't be saved: it is no value of this package (a function can't be "
            "read back safely); give such a value, or keep this steerer in your own code"
        )
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.repr or f.init}
    return {
        "kind": type(value).__name__,
        "fields": {key: _written(item, name) for key, item in fields.items()},
    }


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return [_read(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        kinds = {"bool": torch.bool, "float32": torch.float32, "float64": torch.float64}
        return torch.tensor(value["tensor"], dtype=kinds[value["dtype"]])
    if "tuple" in value:
        return tuple(_read(item) for item in value["tuple"])
    if "mapping" in value:
        return {_read(key): _read(item) for key, item in value["mapping"]}
    if value["kind"] not in VALUES:
        raise ValueError(f"there is no value {value['kind']!r:.80}: allowed are {sorted(VALUES)}")
    kind = VALUES[value["kind"]]
    fields = {name: _read(item) for name, item in value["fields"].items()}
    if kind in (scopes.AnyOf, scopes.AllOf):
        return kind(*fields["scopes"])
    _check_types(kind, fields)
    return kind(**fields)


def _check_types(kind: type, fields: Mapping[str, Any]) -> None:
    """Raise where a field that is one plain value, or None, holds another type."""
    hints = get_type_hints(kind)
    for name, value in fields.items():
        options = get_args(hints.get(name)) or (hints.get(name),)
        given = (type(value), float) if type(value) is int else (type(value),)
        if all(one in _PLAIN for one in options) and not any(one in options for one in given):
            raise TypeError(f"{kind.__name__} has {name}={value!r:.80}")
