"""The entry of a bundle in SAELens's `pretrained_saes.yaml`, for a pull request there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from huggingface_hub.utils import validate_repo_id

from sae_query_steer.hub.layout import LAYERS, head_folders, read_index
from sae_query_steer.sae.collection import INDEX, SAEsIndex
from sae_query_steer.storage.records import read_record

_LARGEST = 1e9
"""No number of latents is larger, and NaN is not smaller."""


def registry_entry(
    folder: str | Path,
    *,
    release: str,
    repo_id: str,
    neuronpedia: Mapping[str, str] | None = None,
) -> str:
    """Return the block of a bundle for SAELens's registry: one SAE for each head.

    Args:
        folder: the bundle.
        release: name of the release in the registry, as in `SAE.from_pretrained(release, id)`.
        repo_id: where the bundle lies on the hub.
        neuronpedia: ids on Neuronpedia by id of the SAE (`blocks.L.attn.hook_q.H`), where known.

    Returns:
        YAML with release, model, repo_id, and of every SAE id, path, l0 and variance_explained
        (of the metrics after training; left out where they are not known).

    Raises:
        ValueError: the folder is no bundle, or holds no SAE that plain SAELens reads; a name is
            empty; or a Neuronpedia id is of an SAE that it does not hold.
    """
    folder = Path(folder)
    index = read_index(folder)
    validate_repo_id(repo_id)
    if not release.strip():
        raise ValueError(f"release={release!r} is not allowed: give its name")
    heads = head_folders(index.files)
    if not heads:
        raise ValueError(
            f"{folder} holds no SAE of a single head: SAELens has no architecture for these, and "
            "its registry can't name them"
        )
    known = dict(neuronpedia or {})
    if strangers := known.keys() - heads.keys():
        raise ValueError(
            f"neuronpedia names {sorted(strangers)[0]!r}, which is no SAE of the bundle: its ids "
            f"are {', '.join(list(heads)[:3])}, ..."
        )
    metrics = _metrics(read_record(folder, f"{LAYERS}/{INDEX}", SAEsIndex).metrics)
    saes = []
    for name, path in heads.items():
        entry: dict[str, Any] = {"id": name, "path": path}
        hook_name, _, head = name.rpartition(".")
        row = metrics.get((int(hook_name.split(".")[1]), int(head)), {})
        for ours, theirs in (("l0", "l0"), ("explained_variance", "variance_explained")):
            value = row.get(ours)
            if isinstance(value, float | int) and abs(value) < _LARGEST:
                entry[theirs] = round(float(value), 4)
        if name in known:
            entry["neuronpedia"] = known[name]
        saes.append(entry)
    block = {release: {"repo_id": repo_id, "model": index.model.name, "saes": saes}}
    return yaml.safe_dump(block, sort_keys=False, allow_unicode=True)


def _metrics(table: pd.DataFrame | None) -> dict[tuple[int, int], dict[str, Any]]:
    found = {}
    for row in [] if table is None else table.to_dict("records"):
        if type(row.get("head")) is int and type(row.get("layer")) is int:
            found[row["layer"], row["head"]] = row
    return found
