"""Where the parts of a bundle are, and `bundle.json`, the list of its files by size and hash.

README.md                        the model card
bundle.json                      model, sites, and size and SHA-256 of every file below
fingerprint.safetensors          queries on fixed tokens, which identify the model
layers/blocks.L.attn.hook_q/     all heads of a layer: a SAELens folder that needs this package
heads/blocks.L.attn.hook_q.H/    one head: a SAELens folder that plain SAELens reads
centroids/                       `CentroidTargets`, optional
steerer.json                     settings of a `LatentGradientSteerer`, optional
evaluation.json                  a table of scores, optional
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from sae_query_steer.sae.collection import INDEX
from sae_query_steer.storage.folders import inside, size_of
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


class ListedFile(Record):
    """What `bundle.json` says of a file."""

    bytes: Annotated[int, Field(ge=0)]
    """Its size."""

    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
    """Hash of its content."""


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


def list_files(folder: Path) -> dict[str, ListedFile]:
    """Return size and hash of every file below a folder, by its path with forward slashes."""
    return {
        path.relative_to(folder).as_posix(): ListedFile(
            bytes=path.stat().st_size, sha256=sha256(path)
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check_files(folder: Path, files: Mapping[str, ListedFile]) -> None:
    """Raise unless every listed file is there, with its size and hash.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not in the folder (see `inside`), or differs from the list.
    """
    for name, listed in files.items():
        path = inside(folder, name)
        try:
            found = size_of(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder} lacks {name}: fetch it again, whole") from error
        # The size first, so that a file that is too large is not read.
        if found != listed.bytes or (found := sha256(path)) != listed.sha256:
            raise ValueError(
                f"{path} is not the file that the bundle lists ({listed.bytes} bytes, SHA-256 "
                f"{listed.sha256}), got {found}: fetch the bundle again, or save it again"
            )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
