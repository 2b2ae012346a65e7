"""Conversion of a query-head SAE to one plain SAELens SAE per head, and back.

SAELens saves, loads, scores and publishes the plain SAEs without this package. The reverse makes
SAEs that SAELens trained head by head usable for steering.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAEMetadata

from sae_query_steer.sae.configs import RESCALE
from sae_query_steer.sae.core import QueryHeadSAE, has_unit_norms, with_weights
from sae_query_steer.sites import QuerySite

PLAIN = {f"query_head_{name}": name for name in ("gated", "jumprelu", "standard", "topk")}
"""SAELens's architecture of one head, by ours of all heads.

Both have the same settings and the same weights, of which ours have the head as first axis.
"""

_SIZES = {"d_in", "d_sae", "n_heads", "d_head", "d_sae_per_head", "metadata", "device"}
_OF_ONE_HEAD = {"hook_head_index", "n_heads"}


def split_heads(sae: QueryHeadSAE[Any]) -> list[SAE[Any]]:
    """Return one plain SAELens SAE for each head of a layer, head 0 first.

    Head `h` has the weights `W_enc[h] [d_head d_sae_per_head]`, `W_dec[h] [d_sae_per_head d_head]`
    and so on, and takes the queries of its head, [..., d_head]. Its metadata are those of the layer
    with `hook_head_index`, by which SAELens reads the queries of that head, and `n_heads`, which
    `join_heads` checks. To export them:

        for head, one in enumerate(split_heads(saes["blocks.3.attn.hook_q"])):
            one.save_model(folder / f"blocks.3.attn.hook_q.{head}")

    SAELens's `model.add_sae` ignores `hook_head_index`; use `attached_saes` instead.

    Args:
        sae: the inference SAE of a query site.

    Returns:
        SAEs that hold copies of the weights, on the same device, and need no gradient. Latents and
        reconstructions equal those of `sae` up to rounding.

    Raises:
        TypeError: not a query-head SAE, or still in training.
        ValueError: SAELens has no such architecture.
    """
    if not isinstance(sae, QueryHeadSAE) or isinstance(sae, TrainingSAE):
        raise TypeError(
            f"sae must be a query-head SAE for inference, got {type(sae).__name__}; to_inference "
            "converts one in training"
        )
    ours = sae.cfg.architecture()
    if ours not in PLAIN:
        raise ValueError(
            f"architecture must be one of {sorted(PLAIN)}, which SAELens has for one head, got "
            f"{ours!r}: save it as a whole with save_model"
        )
    plain, config_class = get_sae_class(PLAIN[ours])
    heads = []
    for head in range(sae.n_heads):
        metadata = copy.deepcopy(sae.cfg.metadata)
        metadata.hook_head_index, metadata.n_heads = head, sae.n_heads
        sizes = {"d_in": sae.d_head, "d_sae": sae.d_latent}
        config = config_class(**sizes, **_settings(sae), metadata=metadata)
        weights = {name: value[head].clone() for name, value in sae.state_dict().items()}
        heads.append(with_weights(plain, config, weights, sae.W_dec.device))
    return heads


def join_heads(saes: Iterable[SAE[Any]]) -> QueryHeadSAE[Any]:
    """Return the query-head SAE of the plain SAELens SAEs of all heads of a hook point.

    The reverse of `split_heads`, bitwise. It also joins SAEs that SAELens trained head by head with
    `hook_head_index`, and a mix of both: of a TopK SAE, SAELens saves
    `rescale_acts_by_decoder_norm=True` and `split_heads` False. If all decoder norms are 1, these
    are the same, and the result has False.

    Args:
        saes: one inference SAE for each head, in any order, with `cfg.metadata.hook_head_index` and
            `cfg.metadata.hook_name`. The number of heads is in the metadata that `split_heads`
            writes; without it the highest head counts as the last one.

    Returns:
        An SAE that holds copies of the weights and needs no gradient. Its metadata are those on
        which all heads agree.

    Raises:
        TypeError: one is not a plain inference SAE.
        ValueError: a head is missing, comes twice or is not of this layer; two differ in
            architecture, size, setting, device, hook point or model; or no query-head SAE can hold
            them.
    """
    saes = list(saes)
    for sae in saes:
        if not isinstance(sae, SAE) or isinstance(sae, QueryHeadSAE | TrainingSAE):
            raise TypeError(
                "saes must be plain inference SAEs of one head, such as SAE.load_from_disk returns "
                f"after save_inference_model, got {type(sae).__name__}"
            )
    heads: list[Any] = [sae.cfg.metadata.hook_head_index for sae in saes]
    known: list[Any] = [sae.cfg.metadata.n_heads or 1 for sae in saes]
    highest = (head + 1 for head in heads if isinstance(head, int))
    n = max([1, *known, *highest])
    if set(heads) != set(range(n)) or len(heads) != n:
        raise ValueError(
            f"cfg.metadata.hook_head_index of saes must be each of the heads 0 to {n - 1} once, "
            f"got {heads}"
        )
    saes.sort(key=lambda sae: sae.cfg.metadata.hook_head_index)
    settings = _common_settings(saes)
    metadata = [sae.cfg.metadata.to_dict() for sae in saes]
    agreed = {
        name: copy.deepcopy(value)
        for name, value in metadata[0].items()
        if name not in _OF_ONE_HEAD and all(name in d and d[name] == value for d in metadata)
    }
    hook_name, sizes = agreed.get("hook_name"), {"n_heads": n, "d_head": saes[0].cfg.d_in}
    QuerySite.from_hook_name(str(hook_name), **sizes)
    if (ours := f"query_head_{saes[0].cfg.architecture()}") not in PLAIN:
        raise ValueError(f"architecture must be one of {[*PLAIN.values()]}, got {ours[11:]!r}")
    sae_class, config_class = get_sae_class(ours)
    config: Any = config_class
    config = config(
        **settings, **sizes, d_sae_per_head=saes[0].cfg.d_sae, metadata=SAEMetadata(**agreed)
    )
    states = [sae.state_dict() for sae in saes]
    weights = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    joined = with_weights(sae_class, config, weights, saes[0].W_dec.device)
    assert isinstance(joined, QueryHeadSAE)
    return joined


def _settings(sae: SAE[Any]) -> dict[str, Any]:
    """The config without sizes, device and metadata: the same for all heads."""
    names = [field.name for field in fields(sae.cfg) if field.name not in _SIZES]
    return {name: getattr(sae.cfg, name) for name in names}


def _common_settings(saes: Sequence[SAE[Any]]) -> dict[str, Any]:
    """Return the settings of all heads, which must be the same."""
    every = [_settings(sae) for sae in saes]
    if len({settings.get(RESCALE) for settings in every}) > 1:
        for sae, settings in zip(saes, every, strict=True):
            settings[RESCALE] = bool(settings.get(RESCALE)) and not has_unit_norms(sae.W_dec)
    described = [
        {
            **{"architecture": sae.cfg.architecture(), "device": str(sae.W_dec.device)},
            **{"d_in": sae.cfg.d_in, "d_sae": sae.cfg.d_sae},
            **{name: sae.cfg.metadata[name] for name in ("hook_name", "model_name")},
            **settings,
        }
        for sae, settings in zip(saes, every, strict=True)
    ]
    for head, other in enumerate(described):
        for name, value in described[0].items():
            if other.get(name) != value:
                raise ValueError(
                    f"all heads must have the same {name}, got {value!r} for head 0 and "
                    f"{other.get(name)!r} for head {head} (sae.to changes device and dtype, "
                    "fold_W_dec_norm() makes decoder norms 1, with which rescaling has no effect)"
                )
    return every[0]
