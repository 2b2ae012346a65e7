"""`Bundle`, `save_bundle`, `load_bundle`: SAEs, centroids, steerer and scores in one folder."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from sae_lens import TrainingSAE

from sae_query_steer.arguments import check_kind
from sae_query_steer.hub import layout
from sae_query_steer.hub.card import model_card
from sae_query_steer.models.fingerprint import (
    Fingerprint,
    check_queries,
    check_reconstructions,
    default_tolerance,
    dtype_name,
    read_fingerprint,
)
from sae_query_steer.models.loading import model_name as name_of
from sae_query_steer.sae.collection import QuerySAEs
from sae_query_steer.sae.core import QueryHeadSAE
from sae_query_steer.sae.encoders import encoder_sites
from sae_query_steer.sae.heads import PLAIN, split_heads
from sae_query_steer.steering.attention_descent import AttentionSteerer
from sae_query_steer.steering.files import steerer_from_settings, steerer_settings
from sae_query_steer.steering.latent_descent import LatentGradientSteerer
from sae_query_steer.storage.checksums import list_files
from sae_query_steer.storage.folders import new_folder
from sae_query_steer.storage.records import (
    read_json,
    read_record,
    rows_table,
    table_rows,
    write_json,
    write_record,
)
from sae_query_steer.storage.tensors import read_tensors, write_tensors
from sae_query_steer.targets.centroids import CentroidTargets
from sae_query_steer.targets.fingerprint import (
    check_belongs,
    check_devices,
    check_shapes,
    reconstructions,
    take_fingerprint,
)

_SIZES = ("n_layers", "n_heads", "d_head", "d_model", "d_vocab")


@dataclass(frozen=True, kw_only=True, eq=False)
class Bundle:
    """What a bundle holds; `load_bundle` and `from_pretrained` make it."""

    saes: QuerySAEs
    """The SAEs of all heads, by hook name."""

    targets: CentroidTargets | None
    """The centroids or learned targets, if it has some."""

    steerer: LatentGradientSteerer | AttentionSteerer | None
    """The steerer over these SAEs and targets, if it has one."""

    evaluation: pd.DataFrame | None
    """The table of scores that it was published with, if any."""

    model: layout.ModelFacts
    """Name, sizes and number format of the model that it was made on."""

    fingerprint: Fingerprint
    """The model's queries on fixed tokens, and the SAEs' reconstructions of them."""

    def check(self, model: Any) -> None:
        """Raise unless the bundle was made on this model, by its sizes and its fingerprint.

        The model's name does not count: it is another on the hub than in a folder.

        Raises:
            ValueError: another model; the message shows both sides.
        """
        here, stored = model_facts(model), self.fingerprint
        try:
            for size in _SIZES:
                if getattr(self.model, size) != getattr(here, size):
                    raise ValueError(f"{size} differs")
            queries = read_fingerprint(model, stored.queries, stored.tokens)
            tolerance = default_tolerance(here.dtype, stored.dtype)
            check_queries(stored, queries, tolerance=tolerance)
        except ValueError as error:
            raise ValueError(
                f"another model than the bundle's:\n  in the bundle: {self.model}\n  here:"
                f"          {here}\n{error}"
            ) from error


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
    index = layout.read_index(folder)
    layout.check_bundle_files(folder, index.shared)
    saes = QuerySAEs.load(folder / layout.LAYERS, device=device)
    if tuple(saes) != index.hook_names:
        raise ValueError(f"{folder} lists {index.hook_names} and holds SAEs at {list(saes)}")
    expected = Fingerprint.expected_tensors(index.hook_names)
    tensors = read_tensors(folder, layout.FINGERPRINT, expected)
    try:
        fingerprint = Fingerprint.from_tensors(tensors, index.hook_names, index.model.dtype)
    except ValueError as error:
        raise ValueError(f"{folder / layout.FINGERPRINT} is damaged: {error}") from error
    stored = {name: query.to(device) for name, query in fingerprint.queries.items()}
    dtypes = {str(sae.dtype).removeprefix("torch.") for sae in saes.values()}
    tolerance = default_tolerance(fingerprint.dtype, *dtypes)
    try:
        check_reconstructions(fingerprint, reconstructions(saes, stored), tolerance=tolerance)
    except ValueError as error:
        raise ValueError(f"{folder} holds SAEs that it was not saved with: {error}") from error
    targets = steerer = evaluation = None
    if index.has(layout.CENTROIDS):
        targets = CentroidTargets.load(folder / layout.CENTROIDS)
        check_shapes(targets, saes)
    if layout.STEERER in index.files:
        settings = read_json(folder / layout.STEERER)
        if targets is None and "look_at" not in settings:
            raise ValueError(f"{folder} holds a steerer without centroids: fetch it again, whole")
        try:
            steerer = steerer_from_settings(settings, saes, targets)
        except ValueError as error:
            raise ValueError(f"{folder / layout.STEERER}: {error}") from error
    if layout.EVALUATION in index.files:
        evaluation = read_record(folder, layout.EVALUATION, layout.Evaluation).rows
    bundle = Bundle(
        saes=saes,
        targets=targets,
        steerer=steerer,
        evaluation=evaluation,
        model=index.model,
        fingerprint=fingerprint,
    )
    if model is not None:
        bundle.check(model)
    return bundle


def model_facts(model: Any, name: str | None = None) -> layout.ModelFacts:
    """Return a model's name, sizes and number format."""
    sizes = {size: int(getattr(model.cfg, size)) for size in _SIZES}
    return layout.ModelFacts(name=name or name_of(model), dtype=dtype_name(model), **sizes)


def save_bundle(
    folder: str | Path,
    model: Any,
    saes: QuerySAEs,
    *,
    targets: CentroidTargets | None = None,
    steerer: LatentGradientSteerer | AttentionSteerer | None = None,
    evaluation: pd.DataFrame | None = None,
    model_name: str | None = None,
    license: str | None = None,
    note: str = "",
    overwrite: bool = False,
) -> None:
    """Write a bundle, whole or not at all: SAEs, and what there is beside them.

    Args:
        folder: the folder to make.
        model: the model that the SAEs were trained on: its fingerprint is taken.
        saes: the SAEs; those of an architecture that SAELens knows are also written head by head.
        targets: centroids or learned targets of these SAEs; None takes those of the steerer.
        steerer: a steerer over exactly these SAEs and targets.
        evaluation: a table of scores, such as that of `success_by_class` or `evaluate_saes`;
            numbers and texts, and an index with meaning becomes columns. The card shows it.
        model_name: the model's name on the hub, such as "mistralai/Mistral-7B-Instruct-v0.1"; None
            takes that by which it was loaded. With a slash the card names it as base model.
        license: licence of the bundle by its name on the hub, such as "mit".
        note: a paragraph for the card: what it is for, and what you saw.
        overwrite: replace a bundle that is there.

    Raises:
        FileExistsError: the folder exists and `overwrite` is False, or it is something else.
        TypeError: SAEs that are not those of all heads, or are still in training.
        ValueError: the SAEs, the centroids or the steerer do not belong together or to the model,
            a setting of the steerer is a function of your own, or the table can't be written.
    """
    if steerer is not None:
        kinds = (LatentGradientSteerer, AttentionSteerer)
        check_kind("steerer", steerer, kinds, "others can't be saved")
        if isinstance(steerer, LatentGradientSteerer) and targets is None:
            targets = steerer.targets
    _check_together(model, saes, targets, steerer)
    settings = None if steerer is None else steerer_settings(steerer)
    facts = model_facts(model, model_name)
    evaluation = None if evaluation is None else _readable(evaluation)
    with new_folder(folder, overwrite=overwrite, holding=layout.BUNDLE) as new:
        saes.save(new / layout.LAYERS)
        for name, sae in saes.items():
            if sae.cfg.architecture() in PLAIN:
                for head, one in enumerate(split_heads(sae)):
                    one.cfg.metadata.model_name = facts.name
                    one.cfg.metadata.hook_name = name
                    one.save_model(new / layout.HEADS / f"{name}.{head}")
        if targets is not None:
            targets.save(new / layout.CENTROIDS)
        if settings is not None:
            write_json(new / layout.STEERER, settings)
        if evaluation is not None:
            write_record(new / layout.EVALUATION, layout.Evaluation(rows=evaluation))
        write_tensors(new / layout.FINGERPRINT, take_fingerprint(model, saes).to_tensors())
        files = list_files(new)
        index = layout.BundleIndex(
            format="sae_query_steer.bundle/1",
            sae_query_steer=version("sae-query-steer"),
            model=facts,
            hook_names=tuple(saes),
            files=files,
        )
        card = model_card(
            saes,
            facts,
            targets=targets,
            steerer=settings,
            evaluation=evaluation,
            heads=layout.head_folders(files),
            license=license,
            note=note,
        )
        (new / layout.CARD).write_text(card, encoding="utf-8")
        write_record(new / layout.BUNDLE, index)


def _check_together(
    model: Any,
    saes: QuerySAEs,
    targets: CentroidTargets | None,
    steerer: LatentGradientSteerer | AttentionSteerer | None,
) -> None:
    check_kind("saes", saes, QuerySAEs, "such as QuerySAEs.load returns")
    for name, site in encoder_sites(saes).items():
        site.check(model)
        if not isinstance(saes[name], QueryHeadSAE) or isinstance(saes[name], TrainingSAE):
            raise TypeError(f"the SAE at {name} is still in training: give to_inference(sae)")
    check_devices(model, saes)
    if steerer is not None:
        if isinstance(steerer, LatentGradientSteerer) and steerer.targets is not targets:
            raise ValueError("the steerer has other centroids than targets=: give one of the two")
        if steerer.saes.keys() != saes.keys() or any(steerer.saes[n] is not saes[n] for n in saes):
            raise ValueError(
                f"the steerer's SAEs are at {list(steerer.saes)} and not the bundle's, at "
                f"{list(saes)}: make it over the bundle's SAEs, with layers=[...] to steer some"
            )
    if targets is not None:
        check_shapes(targets, saes)
        check_belongs(model, saes, targets)


def _readable(evaluation: pd.DataFrame) -> pd.DataFrame:
    """Return a table of which nothing is lost when it is written and read back."""
    has_index = not isinstance(evaluation.index, pd.RangeIndex)
    table = evaluation.reset_index() if has_index else evaluation
    if not len(table) or not table.columns.is_unique:
        raise ValueError(
            f"evaluation must have rows, and different names of columns, got {len(table)} rows and "
            f"the columns {list(table.columns)}"
        )
    try:
        rows_table(table_rows(table))
    except ValueError as error:
        raise ValueError(f"evaluation cannot be saved: {error}; make such cells text") from error
    return table
