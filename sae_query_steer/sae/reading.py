"""One SAE from a folder that may come from elsewhere.

SAELens's loader makes the tensors that `cfg.json` claims and then reads the weights. Here the
claims are first compared with the header of the weights, so that nothing larger than the file is
allocated; the result is the same.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata

from sae_query_steer.sae.core import QueryHeadSAE
from sae_query_steer.sae.inference import with_weights
from sae_query_steer.storage.folders import inside
from sae_query_steer.storage.records import read_json, read_record
from sae_query_steer.storage.tensors import FLOATS, read_shapes, read_tensors


def read_sae(folder: Path, name: str, *, device: str = "cpu") -> QueryHeadSAE[Any]:
    """Return an inference SAE that SAELens's `save_model` wrote.

    Args:
        folder: the folder that holds it.
        name: its own folder in it.
        device: device of the SAE, whatever its config says.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: not a query-head SAE, its config does not fit its weights, or a file of it is
            damaged or outside of the folder.
    """
    config_file, weights = f"{name}/cfg.json", f"{name}/sae_weights.safetensors"
    path = inside(folder, config_file)
    architecture = read_json(path).get("architecture")
    known = {
        n: kinds for n, kinds in SAE_CLASS_REGISTRY.items() if issubclass(kinds[0], QueryHeadSAE)
    }
    if not isinstance(architecture, str) or architecture not in known:
        raise ValueError(
            f"architecture in {path} must be one of {sorted(known)}, got {architecture!r:.80}"
        )
    sae_class, config_class = known[architecture]
    kind: Any = Annotated[config_class, BeforeValidator(_settings)]
    config = read_record(folder, config_file, kind)
    sizes = (config.n_heads, config.d_head, config.d_sae_per_head)
    shape = read_shapes(folder, weights).get("W_enc", ("", ()))[1]
    if shape != sizes or min(sizes) < 1:
        raise ValueError(
            f"n_heads, d_head and d_sae_per_head in {path} must be the shape of W_enc, "
            f"{list(shape)}, got {list(sizes)}"
        )
    config.device = "meta"  # nothing is allocated
    try:
        empty = sae_class(config).state_dict()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    expected = {key: (FLOATS, tuple(value.shape)) for key, value in empty.items()}
    tensors = read_tensors(folder, weights, expected)
    sae = with_weights(sae_class, config, tensors, device)
    if not all(bool(value.isfinite().all()) for value in sae.state_dict().values()):
        raise ValueError(f"the weights in {path.parent} must be finite, got NaN or infinity")
    assert isinstance(sae, QueryHeadSAE)
    return sae


def _settings(config: Any) -> Any:
    """Return the fields of a config in JSON, after checking its metadata."""
    if not isinstance(config, dict):
        raise ValueError("must be an object")
    metadata = config.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError("metadata must be an object")
    for key in metadata:  # they become attributes, which must not hide SAELens's methods
        if not key.isidentifier() or hasattr(SAEMetadata, key) or key == "self":
            raise ValueError(f"metadata must not have the name {key!r:.80}")
    return {name: value for name, value in config.items() if name != "architecture"}
