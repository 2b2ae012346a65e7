"""One SAE from a folder that someone else may have made.

SAELens's own loader makes what `cfg.json` claims and then looks at the weights. Here the claims are
compared with the header of the weights first, so that nothing is made that is not in the file;
what comes out is the same, weight for weight.
"""

from pathlib import Path
from typing import Any, get_type_hints

from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from sae_lens.util import temporary_seed

from sae_query_steer.sae.core import QueryHeadSAE, QueryHeadSAEConfig
from sae_query_steer.storage.folders import inside
from sae_query_steer.storage.records import read_json
from sae_query_steer.storage.tensors import FLOATS, read_shapes, read_tensors

_SIZES = ("n_heads", "d_head", "d_sae_per_head")
_PLAIN = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}


def read_sae(folder: Path, name: str, *, device: str = "cpu") -> QueryHeadSAE[Any]:
    """Return an SAE for inference that SAELens's `save_model` wrote.

    Args:
        folder: the folder that holds it.
        name: its own folder, within.
        device: where to put it; what its config says does not count.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is no query-head SAE, its config is not what its weights are, or a file of it
            is damaged or leads out of the folder.
    """
    here = inside(folder, name)
    settings = read_json(inside(folder, f"{name}/cfg.json"))
    weights = f"{name}/sae_weights.safetensors"
    told = f"{here} is no SAE that can be read: "
    sae_class, config_class = _classes(settings.get("architecture"), told)
    _check_settings(settings, config_class, told)
    shapes = read_shapes(folder, weights)
    encoder = shapes["W_enc"][1] if "W_enc" in shapes else None
    n_heads, d_head, d_latent = (settings[size] for size in _SIZES)
    if encoder != (n_heads, d_head, d_latent):
        raise ValueError(
            f"{told}cfg.json claims {n_heads} heads of {d_head} and {d_latent} latents, the W_enc "
            f"of its weights is {encoder}"
        )
    try:
        # On "meta" nothing is allocated. A new SAE draws weights, which are replaced at once.
        with temporary_seed(0):
            sae = sae_class(config_class.from_dict(settings | {"device": "meta"}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{told}{error}") from error
    expected = {key: (FLOATS, tuple(value.shape)) for key, value in sae.state_dict().items()}
    sae.load_state_dict(read_tensors(folder, weights, expected), assign=True)
    sae = sae.to(device=device, dtype=sae.dtype)
    if not all(bool(value.isfinite().all()) for value in sae.state_dict().values()):
        raise ValueError(f"{here} holds weights that are not finite")
    return sae.requires_grad_(False).eval()


def _classes(
    architecture: object, told: str
) -> tuple[type[QueryHeadSAE[Any]], type[QueryHeadSAEConfig]]:
    known = {
        name: (sae, config)
        for name, (sae, config) in SAE_CLASS_REGISTRY.items()
        if issubclass(sae, QueryHeadSAE) and issubclass(config, QueryHeadSAEConfig)
    }
    if not isinstance(architecture, str) or architecture not in known:
        raise ValueError(f"{told}no architecture {architecture!r:.80}: allowed are {sorted(known)}")
    return known[architecture]


def _check_settings(settings: dict[str, Any], config: type[QueryHeadSAEConfig], told: str) -> None:
    hints = {**get_type_hints(config), "architecture": str, "metadata": dict}
    if not set(_SIZES) <= settings.keys() <= hints.keys():
        odd = sorted({*_SIZES} - settings.keys()), sorted(settings.keys() - hints.keys())
        raise ValueError(f"{told}cfg.json lacks {odd[0]} and has unknown settings {odd[1]!s:.200}")
    for name, value in settings.items():
        allowed = _PLAIN.get(hints[name], (hints[name],) if name == "metadata" else None)
        if allowed is not None and type(value) not in allowed:
            raise ValueError(f"{told}{name}={value!r:.80} is no {hints[name].__name__}")
    if min(settings[size] for size in _SIZES) < 1:
        raise ValueError(f"{told}{', '.join(_SIZES)} must be 1 or more")
    for key in settings.get("metadata", {}):
        # SAELens makes attributes of them, which may not stand before its methods.
        if not key.isidentifier() or hasattr(SAEMetadata, key) or key == "self":
            raise ValueError(f"{told}metadata can't have the name {key!r:.80}")
