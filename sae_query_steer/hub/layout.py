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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from sae_query_steer import storage
from sae_query_steer.hub.files import read_list
from sae_query_steer.sae.collection import INDEX
from sae_query_steer.storage.safe_reading import inside
from sae_query_steer.targets.centroids import CENTROID_FILES

FORMAT = "sae_query_steer.bundle/1"

BUNDLE = "bundle.json"
"""The file that every bundle holds."""

CARD = "README.md"
LAYERS, HEADS, CENTROIDS = "layers", "heads", "centroids"
STEERER, EVALUATION, FINGERPRINT = "steerer.json", "evaluation.json", "fingerprint.safetensors"


def head_folders(files: Iterable[str]) -> dict[str, str]:
    """Return the folder of each head's plain SAE, by its id `blocks.L.attn.hook_q.H`."""
    folders = {name.rpartition("/")[0] for name in files if name.startswith(f"{HEADS}/")}
    found = {folder.removeprefix(f"{HEADS}/"): folder for folder in folders}
    for name in found:
        if re.fullmatch(r"blocks\.\d+\.attn\.hook_(rot_)?q\.\d+", name) is None:
            raise ValueError(f"{HEADS}/{name} is no folder of a query head's SAE")
    return dict(sorted(found.items(), key=lambda item: _numbers(item[0])))


def _needed(hook_names: Iterable[str], files: Iterable[str]) -> Iterator[str]:
    """Yield the files without which a bundle is none: what is read must be on the list."""
    yield FINGERPRINT
    yield f"{LAYERS}/{INDEX}"
    for name in hook_names:
        yield f"{LAYERS}/{name}/{SAE_CFG_FILENAME}"
        yield f"{LAYERS}/{name}/{SAE_WEIGHTS_FILENAME}"
    if any(name.startswith(f"{CENTROIDS}/") for name in files):
        yield from (f"{CENTROIDS}/{name}" for name in CENTROID_FILES)


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def read_index(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return `bundle.json` and its list of files, checked."""
    index = storage.read_index(inside(folder, BUNDLE), FORMAT)
    facts, data, names = index.get("model"), index.get("data"), index.get("hook_names")
    if not (
        isinstance(facts, dict)
        and {"name", "dtype"} <= facts.keys()
        and isinstance(data, dict | None)
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
    ):
        raise ValueError(f"{folder / BUNDLE} is damaged: it tells no model, data and hook names")
    try:
        files = read_list(index.get("files"))
    except ValueError as error:
        raise ValueError(f"{folder / BUNDLE} is refused: {error}") from error
    for part in _needed(names, files):
        if part not in files:
            raise ValueError(f"{folder / BUNDLE} lists no {part}: save the bundle anew")
    return index, files
