"""Where the parts of a bundle are, and `bundle.json`, the list of its files by size and hash.

README.md                        the model card
bundle.json                      model, sites, and size and SHA-256 of every file below
fingerprint.safetensors          queries on fixed tokens, which identify the model
layers/blocks.L.attn.hook_q/     all heads of a layer: a SAELens folder that needs this package
heads/blocks.L.attn.hook_q.H/    one head: a SAELens folder that plain SAELens reads
centroids/                       `CentroidTargets` or `LearnedTargets`, optional
steerer.json                     settings of a steerer, optional
evaluation.json                  a table of scores, optional
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from sae_query_steer.sae.collection import INDEX
from sae_query_steer.storage.checksums import ListedFile, check_files
from sae_query_steer.storage.records import Record, Table, read_record
from sae_query_steer.targets.centroids import CENTROID_FILES

BUNDLE = "bundle.json"
"""The file that every bundle holds."""

CARD = "README.md"
LAYERS, HEADS, CENTROIDS = "layers", "heads", "centroids"
STEERER, EVALUATION, FINGERPRINT = "steerer.json", "evaluation.json", "fingerprint.safetensors"

MAX_FILES = 65_536
"""Most files of a bundle. Source: our choice; 32 layers of 32 heads have 2,112."""

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
FileName = Annotated[
    str, StringConstraints(pattern=rf"^({_PART}/){{0,2}}{_PART}\.(json|safetensors)$")
]
"""Relative path of a JSON or safetensors file, at most two folders deep."""


class ModelFacts(Record):
    """Name, sizes and number format of the model that a bundle was made on."""

    name: str
    n_layers: int
    n_heads: int
    d_head: int
    d_model: int
    d_vocab: int
    dtype: str


class Evaluation(Record):
    """What `evaluation.json` holds."""

    rows: Table
    """The scores."""


class BundleIndex(Record):
    """What `bundle.json` holds."""

    format: Literal["sae_query_steer.bundle/1"]
    sae_query_steer: str
    """Version of the package that wrote it."""

    model: ModelFacts
    hook_names: tuple[str, ...]
    files: Annotated[dict[FileName, ListedFile], Field(min_length=1, max_length=MAX_FILES)]

    @model_validator(mode="after")
    def _lists_what_is_read(self) -> "BundleIndex":
        needed = [FINGERPRINT, f"{LAYERS}/{INDEX}"]
        for name in self.hook_names:
            needed += (f"{LAYERS}/{name}/{f}" for f in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME))
        if self.has(CENTROIDS):
            needed += (f"{CENTROIDS}/{name}" for name in CENTROID_FILES)
        if missing := [name for name in needed if name not in self.files]:
            raise ValueError(f"files lists no {missing[0]}: save the bundle again")
        return self

    def has(self, folder: str) -> bool:
        """Return whether the bundle has files in a folder."""
        return any(name.startswith(f"{folder}/") for name in self.files)

    @property
    def shared(self) -> dict[str, ListedFile]:
        """The files that this package reads; the rest, single heads, are for plain SAELens."""
        return {n: file for n, file in self.files.items() if not n.startswith(f"{HEADS}/")}


def read_index(folder: str | Path) -> BundleIndex:
    """Read `bundle.json`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged or of another version, or does not list a file that is needed.
    """
    return read_record(folder, BUNDLE, BundleIndex)


def head_folders(files: Iterable[str]) -> dict[str, str]:
    """Return the folder of each head's plain SAE, by its id `blocks.L.attn.hook_q.H`."""
    folders = {name.rpartition("/")[0] for name in files if name.startswith(f"{HEADS}/")}
    found = {folder.removeprefix(f"{HEADS}/"): folder for folder in folders}
    for name in found:
        if re.fullmatch(r"blocks\.\d+\.attn\.hook_(rot_)?q\.\d+", name) is None:
            raise ValueError(f"{HEADS}/{name} must be named after the SAE of a query head")
    return dict(sorted(found.items(), key=lambda item: list(map(int, re.findall(r"\d+", item[0])))))


def check_bundle_files(folder: Path, files: Mapping[str, ListedFile]) -> None:
    """Raise unless every listed file is there, with its size and hash; see `check_files`."""
    try:
        check_files(folder, files)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{error}: fetch the bundle again, or save it again") from error
