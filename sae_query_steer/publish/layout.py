"""Where the parts of a bundle lie, and `bundle.json`, which lists them.

README.md                        the model card, for people
bundle.json                      model, data, sites; and size and hash of every file below
fingerprint.safetensors          queries on fixed tokens: is this the model?
layers/blocks.L.attn.hook_q/     all heads of a layer: a SAELens folder that needs this package
heads/blocks.L.attn.hook_q.H/    one head: a SAELens folder that plain SAELens reads
centroids/                       `CentroidTargets`, where there are some
steerer.json                     the settings of a `LatentGradientSteerer`, where there is one
evaluation.json                  a table of scores, where there is one
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sae_query_steer.publish.files import read_list
from sae_query_steer.safe_reading import inside
from sae_query_steer.storage import read_json

FORMAT = "sae_query_steer.bundle/1"

BUNDLE = "bundle.json"
"""The file that every bundle holds."""

CARD = "README.md"
LAYERS, HEADS, CENTROIDS = "layers", "heads", "centroids"
STEERER, EVALUATION, FINGERPRINT = "steerer.json", "evaluation.json", "fingerprint.safetensors"


PARTS = (LAYERS, HEADS, CENTROIDS, STEERER, EVALUATION, FINGERPRINT)
"""First parts of the paths of a bundle's files."""


def head_folders(files: Iterable[str]) -> dict[str, str]:
    """Return the folder of each head's plain SAE, by its id `blocks.L.attn.hook_q.H`."""
    folders = {str(Path(name).parent) for name in files if name.startswith(f"{HEADS}/")}
    found = {folder.removeprefix(f"{HEADS}/"): folder for folder in folders}
    for name in found:
        if re.fullmatch(r"blocks\.\d+\.attn\.hook_(rot_)?q\.\d+", name) is None:
            raise ValueError(f"{HEADS}/{name} is no folder of a query head's SAE")
    return dict(sorted(found.items(), key=lambda item: _numbers(item[0])))


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def read_index(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return `bundle.json` and its list of files, checked."""
    index = read_json(inside(folder, BUNDLE))
    if index.get("format") != FORMAT:
        raise ValueError(
            f"{folder} has format {index.get('format')!r}: this version reads {FORMAT!r}"
        )
    facts, data, names = index.get("model"), index.get("data"), index.get("hook_names")
    if not (
        isinstance(facts, dict)
        and {"name", "dtype"} <= facts.keys()
        and isinstance(data, dict | None)
        and isinstance(names, list)
    ):
        raise ValueError(f"{folder / BUNDLE} is damaged: it tells no model, data and hook names")
    try:
        files = read_list(index.get("files"))
    except ValueError as error:
        raise ValueError(f"{folder / BUNDLE} is refused: {error}") from error
    if FINGERPRINT not in files:
        raise ValueError(f"{folder / BUNDLE} lists no {FINGERPRINT}: save the bundle anew")
    return index, files
