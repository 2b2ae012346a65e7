"""The entry of a bundle in SAELens's `pretrained_saes.yaml`, for a pull request there."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils import validate_repo_id

from sae_query_steer.hub.layout import LAYERS, head_folders, read_index
from sae_query_steer.sae.collection import INDEX, SAEsIndex
from sae_query_steer.storage.records import read_record


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
    index = read_index(folder)
    validate_repo_id(repo_id)
    if not release.strip():
        raise ValueError(f"release must be the name of the release, got {release!r}")
    heads, known = head_folders(index.files), dict(neuronpedia or {})
    if not heads:
        raise ValueError(
            f"{folder} holds no SAE of a single head: SAELens has no architecture for these, and "
            "its registry cannot name them"
        )
    if strangers := known.keys() - heads.keys():
        raise ValueError(
            f"neuronpedia must have ids of the bundle's SAEs, such as {next(iter(heads))!r}, got "
            f"{min(strangers)!r}"
        )
    table = read_record(folder, f"{LAYERS}/{INDEX}", SAEsIndex).metrics
    rows = [] if table is None else table.to_dict("records")
    metrics = {(row.get("layer"), row.get("head")): row for row in rows}
    saes = []
    for name, path in heads.items():
        entry: dict[str, Any] = {"id": name, "path": path}
        row = metrics.get((int(name.split(".")[1]), int(name.rpartition(".")[2])), {})
        for ours, theirs in (("l0", "l0"), ("explained_variance", "variance_explained")):
            if isinstance(value := row.get(ours), float | int) and math.isfinite(value):
                entry[theirs] = round(float(value), 4)
        if name in known:
            entry["neuronpedia"] = known[name]
        saes.append(entry)
    block = {release: {"repo_id": repo_id, "model": index.model.name, "saes": saes}}
    return yaml.safe_dump(block, sort_keys=False, allow_unicode=True)
