"""`Bundle` and `load_bundle`: the parts of a bundle, read back and checked together."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.hub.layout import (
    CENTROIDS,
    EVALUATION,
    FINGERPRINT,
    LAYERS,
    STEERER,
    DataFacts,
    Evaluation,
    ModelFacts,
    check_files,
    read_index,
)
from sae_query_steer.models.fingerprint import (
    Fingerprint,
    check_reconstructions,
    default_tolerance,
    dtype_name,
    read_fingerprint,
    relative_difference,
)
from sae_query_steer.models.loading import model_name
from sae_query_steer.sae.collection import QuerySAEs
from sae_query_steer.steering.files import steerer_from_settings
from sae_query_steer.steering.latent_descent import LatentGradientSteerer
from sae_query_steer.storage.records import read_json, read_record
from sae_query_steer.storage.tensors import FLOATS, INTEGERS, read_tensors
from sae_query_steer.targets.centroids import CentroidTargets
from sae_query_steer.targets.fingerprint import check_shapes, reconstructions

_SIZES = ("n_layers", "n_heads", "d_head", "d_model", "d_vocab")


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

    model: ModelFacts
    """Name, sizes and number format of the model that it was made on."""

    data: DataFacts | None
    """Number, classes and hash of the labelled examples, if they were recorded."""

    fingerprint: Fingerprint
    """The model's queries on fixed tokens, and the SAEs' reconstructions of them."""

    def check(self, model: Any, examples: Iterable[LabelledExample] | None = None) -> None:
        """Raise unless the bundle was made on this model, and with these examples in any order.

        The model's name does not count: it is another on the hub than in a folder.

        Raises:
            ValueError: another model, or other examples; the message shows both sides.
        """
        self._check_model(model)
        if examples is None:
            return
        if self.data is None:
            raise ValueError("the bundle records no examples: it was saved without examples=")
        if self.data != (here := data_facts(examples)):
            raise ValueError(
                f"other examples than the bundle's:\n  in the bundle: {self.data}"
                f"\n  here:          {here}\nTake the same texts and labels, or make new centroids"
            )

    def _check_model(self, model: Any) -> None:
        here, stored = model_facts(model), self.fingerprint
        sides = f"\n  in the bundle: {self.model}\n  here:          {here}"
        remedy = "\nLoad the model that the bundle names, or train SAEs on yours"
        if any(getattr(self.model, size) != getattr(here, size) for size in _SIZES):
            raise ValueError(f"another model than the bundle's:{sides}{remedy}")
        if int(stored.tokens.max()) >= here.d_vocab:
            raise ValueError(f"the bundle's fingerprint has tokens outside the vocabulary:{sides}")
        queries = read_fingerprint(model, stored.queries, stored.tokens)
        tolerance = default_tolerance(here.dtype, stored.dtype)
        lines = [
            f"\n  at {name} the queries differ by {difference:.3g} (relative), allowed is "
            f"{tolerance:g}"
            for name, query in queries.items()
            if not (difference := relative_difference(query, stored.queries[name])) <= tolerance
        ]
        if lines:
            raise ValueError(f"another model than the bundle's:{sides}{''.join(lines[:3])}{remedy}")


def load_bundle(folder: str | Path, *, model: Any = None, device: str | None = None) -> Bundle:
    """Read a bundle that `save_bundle` wrote, after a check of size and hash of its files.

    The files of single heads are for plain SAELens and are not read.

    Args:
        folder: the bundle.
        model: a model to check against the fingerprint; None skips the check (a steerer checks the
            model when it is applied).
        device: where to put the SAEs; None means the model's device, or the CPU without a model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, of another format, or not the one that the bundle lists; the
            parts do not belong together; or it is another model, with both sides shown.
    """
    folder = Path(folder)
    if device is None:
        device = "cpu" if model is None else str(model.cfg.device)
    index = read_index(folder)
    check_files(folder, index.shared)
    saes = QuerySAEs.load(folder / LAYERS, device=device)
    if tuple(saes) != index.hook_names:
        raise ValueError(f"{folder} lists {index.hook_names} and holds SAEs at {list(saes)}")
    fingerprint = _read_fingerprint(folder, index.hook_names, index.model.dtype)
    stored = {name: query.to(device) for name, query in fingerprint.queries.items()}
    dtypes = {str(sae.dtype).removeprefix("torch.") for sae in saes.values()}
    tolerance = default_tolerance(fingerprint.dtype, *dtypes)
    try:
        check_reconstructions(fingerprint, reconstructions(saes, stored), tolerance=tolerance)
    except ValueError as error:
        raise ValueError(f"{folder} holds SAEs that it was not saved with: {error}") from error
    targets = steerer = evaluation = None
    if index.has(CENTROIDS):
        targets = CentroidTargets.load(folder / CENTROIDS)
        check_shapes(targets, saes)
    if STEERER in index.files:
        if targets is None:
            raise ValueError(f"{folder} holds a steerer without centroids: fetch it again, whole")
        try:
            steerer = steerer_from_settings(read_json(folder / STEERER), saes, targets)
        except ValueError as error:
            raise ValueError(f"{folder / STEERER}: {error}") from error
    if EVALUATION in index.files:
        evaluation = read_record(folder, EVALUATION, Evaluation).rows
    bundle = Bundle(
        saes=saes,
        targets=targets,
        steerer=steerer,
        evaluation=evaluation,
        model=index.model,
        data=index.data,
        fingerprint=fingerprint,
    )
    if model is not None:
        bundle.check(model)
    return bundle


def _read_fingerprint(folder: Path, hook_names: tuple[str, ...], dtype: str) -> Fingerprint:
    expected = {f"{part}.{n}": (FLOATS, None) for n in hook_names for part in _PARTS}
    tensors = read_tensors(folder, FINGERPRINT, expected | {"tokens": (INTEGERS, None)})
    queries, made = ({n: tensors[f"{part}.{n}"] for n in hook_names} for part in _PARTS)
    try:
        return Fingerprint(
            tokens=tensors["tokens"], queries=queries, reconstructions=made, dtype=dtype
        )
    except ValueError as error:
        raise ValueError(f"{folder / FINGERPRINT} is damaged: {error}") from error


_PARTS = ("query", "reconstruction")


def model_facts(model: Any, name: str | None = None) -> ModelFacts:
    """Return a model's name, sizes and number format."""
    sizes = {size: int(getattr(model.cfg, size)) for size in _SIZES}
    return ModelFacts(name=name or model_name(model), dtype=dtype_name(model), **sizes)


def data_facts(examples: Iterable[LabelledExample]) -> DataFacts:
    """Return the number of labelled examples, of each class, and a hash that ignores their order.

    Raises:
        TypeError: something else than labelled examples.
    """
    given = list(examples)
    if not all(isinstance(example, LabelledExample) for example in given):
        kinds = sorted({type(example).__name__ for example in given})
        raise TypeError(f"examples must be LabelledExample (their texts are hashed), got {kinds}")
    texts = sorted(json.dumps([str(e.label), e.prompt, e.response]) for e in given)
    return DataFacts(
        n_examples=len(given),
        classes=dict(sorted(Counter(str(e.label) for e in given).items())),
        sha256=hashlib.sha256("\n".join(texts).encode()).hexdigest(),
    )
