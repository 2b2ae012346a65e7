"""Conversion of a query-head SAE to one plain SAELens SAE per head, and back.

SAELens saves, loads, scores and publishes the plain SAEs without this package. The reverse makes
SAEs that SAELens trained head by head usable for steering.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAEMetadata

from sae_query_steer.sae.core import QueryHeadSAE
from sae_query_steer.sae.inference import with_weights
from sae_query_steer.sites import QuerySite

PLAIN = {f"query_head_{name}": name for name in ("gated", "jumprelu", "standard", "topk")}
"""SAELens's architecture of one head, by ours of all heads.

Both have the same settings and the same weights, of which ours have the head as first axis.
"""

_SIZES = {"d_in", "d_sae", "n_heads", "d_head", "d_sae_per_head", "metadata", "device"}
_RESCALE = "rescale_acts_by_decoder_norm"
_OF_ONE_HEAD = {"hook_head_index", "n_heads"}

_NORM_ROUNDING = 1e-5  # above the rounding of 32-bit norms, too small to change a latent


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
        config = config_class(
            d_in=sae.d_head, d_sae=sae.d_latent, metadata=metadata, **_settings(sae)
        )
        weights = {
            name: value[head].detach().clone(memory_format=torch.contiguous_format)
            for name, value in sae.state_dict().items()
        }
        heads.append(with_weights(plain, config, weights, sae.W_dec.device))
    return heads


def join_heads(saes: Iterable[SAE[Any]], *, n_heads: int | None = None) -> QueryHeadSAE[Any]:
    """Return the query-head SAE of the plain SAELens SAEs of all heads of a hook point.

    The reverse of `split_heads`, bitwise. It also joins SAEs that SAELens trained head by head with
    `hook_head_index`, and a mix of both: of a TopK SAE, SAELens saves
    `rescale_acts_by_decoder_norm=True` and `split_heads` False. If all decoder norms are 1, these
    are the same, and the result has False.

    Args:
        saes: one inference SAE for each head, in any order, with `cfg.metadata.hook_head_index` and
            `cfg.metadata.hook_name`.
        n_heads: query heads of the layer. None reads them from the metadata that `split_heads`
            writes, or takes the highest head as the last one.

    Returns:
        An SAE that holds copies of the weights and needs no gradient. Its metadata are those on
        which all heads agree.

    Raises:
        TypeError: one is not a plain inference SAE.
        ValueError: there are none; a head is missing, comes twice or is not of this layer; two
            differ in architecture, size, setting, device, hook point or model; some rescale by
            decoder norms other than 1 and others do not; or no query-head SAE can hold them.
    """
    heads = _by_head(list(saes))
    ordered = [heads[head] for head in sorted(heads)]
    first = ordered[0]
    common = _in_common(first)
    for other in ordered[1:]:
        theirs = _in_common(other)
        for name, value in common.items():
            if name != _RESCALE and theirs.get(name) != value:
                raise ValueError(
                    f"all heads must have the same {name}, got {value!r} for head "
                    f"{_head_of(first)} and {theirs.get(name)!r} for head {_head_of(other)} "
                    "(device and dtype change with sae.to)"
                )
    replaced = _rescaling_without_effect(ordered)
    ours = f"query_head_{common['architecture']}"
    if ours not in PLAIN:
        raise ValueError(
            f"architecture must be one of {sorted(PLAIN.values())}, got {common['architecture']!r}"
        )
    if common["hook_name"] is None:
        raise ValueError(
            "cfg.metadata.hook_name must be set, such as 'blocks.0.attn.hook_q', got None"
        )
    if common["normalize_activations"] != "none":
        raise ValueError(
            f"normalize_activations must be 'none', got {common['normalize_activations']!r}: fold "
            "the scale into the weights with fold_activation_norm_scaling_factor, where it is one"
        )
    _check_complete(heads, common["hook_name"], n_heads)
    QuerySite.from_hook_name(common["hook_name"], n_heads=len(heads), d_head=first.cfg.d_in)
    sae_class, config_class = get_sae_class(ours)
    made: Any = config_class
    config = made(
        n_heads=len(heads),
        d_head=first.cfg.d_in,
        d_sae_per_head=first.cfg.d_sae,
        metadata=_agreed_metadata(ordered),
        **_settings(first) | replaced,
    )
    states = [one.state_dict() for one in ordered]
    weights = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    joined = with_weights(sae_class, config, weights, first.W_dec.device)
    assert isinstance(joined, QueryHeadSAE)
    return joined


def _settings(sae: SAE[Any]) -> dict[str, Any]:
    """The config without sizes, device and metadata: the same for all heads."""
    names = [field.name for field in fields(sae.cfg) if field.name not in _SIZES]
    return {name: getattr(sae.cfg, name) for name in names}


def _head_of(sae: SAE[Any]) -> Any:
    return sae.cfg.metadata.hook_head_index


def _by_head(saes: Sequence[SAE[Any]]) -> dict[int, SAE[Any]]:
    if not saes:
        raise ValueError("saes must hold one SAE for each head of a hook point, got none")
    heads: dict[int, SAE[Any]] = {}
    for place, sae in enumerate(saes):
        if not isinstance(sae, SAE) or isinstance(sae, QueryHeadSAE | TrainingSAE):
            raise TypeError(
                f"saes[{place}] must be a plain inference SAE of one head, such as "
                "SAE.load_from_disk returns after save_inference_model, got "
                f"{type(sae).__name__}"
            )
        head = _head_of(sae)
        if not isinstance(head, int) or head < 0 or head in heads:
            raise ValueError(
                f"cfg.metadata.hook_head_index of saes[{place}] must be a head that no other SAE "
                f"has, 0 or more, got {head!r}"
            )
        heads[head] = sae
    return heads


def _in_common(sae: SAE[Any]) -> dict[str, Any]:
    cfg = sae.cfg
    return {
        "architecture": cfg.architecture(),
        "hook_name": cfg.metadata.hook_name,
        "model_name": cfg.metadata.model_name,
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "device": str(sae.W_dec.device),
        **_settings(sae),
    }


def _rescaling_without_effect(saes: Sequence[SAE[Any]]) -> dict[str, bool]:
    """Return False for the setting if only some SAEs rescale, all of them by norms of 1."""
    rescaled = [sae for sae in saes if getattr(sae.cfg, _RESCALE, False)]
    if len(rescaled) in (0, len(saes)):
        return {}
    for sae in rescaled:
        norms = sae.W_dec.detach().float().norm(dim=-1)
        if not torch.allclose(norms, torch.ones_like(norms), rtol=0, atol=_NORM_ROUNDING):
            raise ValueError(
                f"head {_head_of(sae)} has {_RESCALE}=True, other heads have False: its decoder "
                f"norms must then be 1, got {float(norms.min()):.3g} to {float(norms.max()):.3g}; "
                "fold_W_dec_norm() makes them 1 without changing its output"
            )
    return {_RESCALE: False}


def _check_complete(heads: Mapping[int, SAE[Any]], hook_name: str, n_heads: int | None) -> None:
    if n_heads is None:
        known = [sae.cfg.metadata.n_heads for sae in heads.values()]
        n_heads = max([1 + max(heads), *(n for n in known if isinstance(n, int))])
    expected = set(range(n_heads))
    if n_heads < 1 or expected != set(heads):
        raise ValueError(
            f"saes must be the {n_heads} heads at {hook_name}, got {sorted(heads)}: missing "
            f"{sorted(expected - set(heads))}, unknown {sorted(set(heads) - expected)}"
        )


def _agreed_metadata(saes: Sequence[SAE[Any]]) -> SAEMetadata:
    every = [sae.cfg.metadata.to_dict() for sae in saes]
    agreed = {
        name: copy.deepcopy(value)
        for name, value in every[0].items()
        if name not in _OF_ONE_HEAD and all(name in d and d[name] == value for d in every)
    }
    return SAEMetadata(**agreed)
