"""`save_bundle`: SAEs, centroids, steerer and scores in one folder that can be published."""

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from sae_lens import TrainingSAE
from torch import Tensor

from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.hub.bundle import data_facts, model_facts
from sae_query_steer.hub.card import model_card
from sae_query_steer.hub.layout import (
    BUNDLE,
    CARD,
    CENTROIDS,
    EVALUATION,
    FINGERPRINT,
    HEADS,
    LAYERS,
    STEERER,
    BundleIndex,
    Evaluation,
    head_folders,
    list_files,
)
from sae_query_steer.models.fingerprint import Fingerprint
from sae_query_steer.sae.collection import QuerySAEs
from sae_query_steer.sae.core import QueryHeadSAE
from sae_query_steer.sae.encoders import encoder_sites
from sae_query_steer.sae.heads import PLAIN, split_heads
from sae_query_steer.steering.files import steerer_settings
from sae_query_steer.steering.latent_descent import LatentGradientSteerer
from sae_query_steer.storage.folders import new_folder
from sae_query_steer.storage.records import rows_table, table_rows, write_json, write_record
from sae_query_steer.storage.tensors import write_tensors
from sae_query_steer.targets.centroids import CentroidTargets
from sae_query_steer.targets.fingerprint import (
    check_belongs,
    check_devices,
    check_shapes,
    take_fingerprint,
)


def save_bundle(
    folder: str | Path,
    model: Any,
    saes: QuerySAEs,
    *,
    targets: CentroidTargets | None = None,
    steerer: LatentGradientSteerer | None = None,
    examples: Iterable[LabelledExample] | None = None,
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
        targets: centroids of these SAEs; None takes those of the steerer.
        steerer: a steerer over exactly these SAEs and centroids.
        examples: the labelled examples that the centroids were made of: their hash is kept, not
            they.
        evaluation: a table of scores, such as that of `evaluate_saes` or of a sweep; numbers and
            texts, and an index with meaning becomes columns.
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
    if steerer is not None and targets is None:
        targets = steerer.targets
    _check_together(model, saes, targets, steerer)
    settings = None if steerer is None else steerer_settings(steerer)
    facts = model_facts(model, model_name)
    about = None if examples is None else data_facts(examples)
    evaluation = None if evaluation is None else _readable(evaluation)
    with new_folder(folder, overwrite=overwrite, holding=BUNDLE) as new:
        saes.save(new / LAYERS)
        for name, sae in saes.items():
            if sae.cfg.architecture() in PLAIN:
                for head, one in enumerate(split_heads(sae)):
                    one.cfg.metadata.model_name = facts.name
                    one.cfg.metadata.hook_name = name
                    one.save_model(new / HEADS / f"{name}.{head}")
        if targets is not None:
            targets.save(new / CENTROIDS)
        if settings is not None:
            write_json(new / STEERER, settings)
        if evaluation is not None:
            write_record(new / EVALUATION, Evaluation(rows=evaluation))
        write_tensors(new / FINGERPRINT, _fingerprint_tensors(take_fingerprint(model, saes)))
        files = list_files(new)
        index = BundleIndex(
            format="sae_query_steer.bundle/1",
            sae_query_steer=version("sae-query-steer"),
            model=facts,
            data=about,
            hook_names=tuple(saes),
            files=files,
        )
        card = model_card(
            saes,
            facts,
            data=about,
            targets=targets,
            steerer=settings,
            evaluation=evaluation,
            heads=head_folders(files),
            license=license,
            note=note,
        )
        (new / CARD).write_text(card, encoding="utf-8")
        write_record(new / BUNDLE, index)


def _check_together(
    model: Any,
    saes: QuerySAEs,
    targets: CentroidTargets | None,
    steerer: LatentGradientSteerer | None,
) -> None:
    if not isinstance(saes, QuerySAEs):
        raise TypeError(
            f"saes is a {type(saes).__name__}: give QuerySAEs, such as of QuerySAEs.load"
        )
    for name, site in encoder_sites(saes).items():
        site.check(model)
        if not isinstance(saes[name], QueryHeadSAE) or isinstance(saes[name], TrainingSAE):
            raise TypeError(f"the SAE at {name} is still in training: give to_inference(sae)")
    check_devices(model, saes)
    if steerer is not None:
        if steerer.targets is not targets:
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
    table = evaluation
    if not isinstance(table.index, pd.RangeIndex):
        table = table.reset_index()
    if not len(table) or not table.columns.is_unique:
        raise ValueError(
            f"evaluation has {len(table)} rows and the columns {list(table.columns)}: give one row "
            "or more, and every column a name of its own"
        )
    try:
        rows_table(table_rows(table))
    except ValueError as error:
        raise ValueError(
            f"evaluation can't be saved: {error}; turn such cells into text"
        ) from error
    return table


def _fingerprint_tensors(fingerprint: Fingerprint) -> dict[str, Tensor]:
    queries = {f"query.{name}": value for name, value in fingerprint.queries.items()}
    made = {f"reconstruction.{name}": v for name, v in fingerprint.reconstructions.items()}
    return {"tokens": fingerprint.tokens, **queries, **made}
