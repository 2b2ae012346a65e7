"""To and from ordinary SAELens SAEs: one plain SAE for each head of a layer.

A query-head SAE holds the SAEs of all heads side by side and shares nothing among them, so each of
them is an SAE that plain SAELens knows: it saves, loads, scores and publishes it without this
package. The reverse takes SAEs that were trained with SAELens, head by head, into steering.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from sae_lens import SAE, SAEConfig, TopKSAEConfig, TrainingSAE
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from sae_query_steer.sae.core import QueryHeadSAE
from sae_query_steer.sites import QuerySite

PLAIN = {
    "query_head_gated": "gated",
    "query_head_jumprelu": "jumprelu",
    "query_head_standard": "standard",
    "query_head_topk": "topk",
}
"""SAELens's architecture of one head, by ours of all heads.

An entry promises that both have the same settings and the same weights, of which ours have the
head as their first axis.
"""

_SIZES = {"d_in", "d_sae", "n_heads", "d_head", "d_sae_per_head"}
_RESCALE = "rescale_acts_by_decoder_norm"
_OF_ONE_HEAD = {"hook_head_index", "n_heads"}

_NORM_ROUNDING = 1e-5  # many times what 32-bit norms miss, far below what moves a latent


def split_heads(sae: QueryHeadSAE[Any]) -> list[SAE[Any]]:
    """Return one plain SAELens SAE for each head of a layer, head 0 first.

    Head `h` has the weights `W_enc[h] [d_head d_sae_per_head]`, `W_dec[h] [d_sae_per_head d_head]`
    and so on, and takes the queries of its head alone, [..., d_head]. Its metadata are those of
    the layer (hook_name, model_name, context_size, prepend_bos, ...) with `hook_head_index`, by
    which SAELens's store and evals read the queries of that head, and `n_heads`, by which
    `join_heads` knows how many there were. To export them:

        for head, one in enumerate(split_heads(saes["blocks.3.attn.hook_q"])):
            one.save_model(folder / f"blocks.3.attn.hook_q.{head}")

    SAELens's `SAE.load_from_disk` reads each folder without this package. Beware of its
    `model.add_sae`: it ignores `hook_head_index`, see `sae_query_steer.steering.attach`.

    Args:
        sae: the inference SAE of a query site.

    Returns:
        SAEs that hold copies of the weights, on the same device, and need no gradient. Latents and
        reconstructions equal those of `sae` up to rounding.

    Raises:
        TypeError: it is another SAE, or still in training.
        ValueError: SAELens has no architecture for one head of it.
    """
    if not isinstance(sae, QueryHeadSAE):
        raise TypeError(
            f"sae is a {type(sae).__name__}: give a query-head SAE, such as one value of what "
            "train_query_saes returns"
        )
    if isinstance(sae, TrainingSAE):
        raise TypeError(f"sae is a {type(sae).__name__}, in training: give to_inference(sae)")
    ours = sae.cfg.architecture()
    if ours not in PLAIN:
        raise ValueError(
            f"architecture {ours!r} has no counterpart for one head in SAELens: allowed are "
            f"{sorted(PLAIN)}; save it as a whole with save_model"
        )
    heads = []
    for head in range(sae.n_heads):
        metadata = copy.deepcopy(sae.cfg.metadata)
        metadata.hook_head_index, metadata.n_heads = head, sae.n_heads
        config = get_sae_class(PLAIN[ours])[1](
            d_in=sae.cfg.d_head,
            d_sae=sae.cfg.d_sae_per_head,
            metadata=metadata,
            **_settings(sae),
        )
        weights = {
            name: value[head].detach().clone(memory_format=torch.contiguous_format)
            for name, value in sae.state_dict().items()
        }
        heads.append(_with_weights(config, weights))
    return heads


def join_heads(saes: Iterable[SAE[Any]], *, n_heads: int | None = None) -> QueryHeadSAE[Any]:
    """Return one query-head SAE that holds the plain SAELens SAEs of all heads of a hook.

    The reverse of `split_heads`: split and then joined, the weights are bitwise the same. Works as
    well for SAEs that SAELens trained head by head with `hook_head_index`, and for some of these
    among ours: of a TopK SAE, SAELens saves `rescale_acts_by_decoder_norm=True` and ours False.
    By norms of 1 there is nothing to rescale, so such a mix becomes an SAE with False.

    Args:
        saes: one inference SAE for each head, in any order; `cfg.metadata.hook_head_index` tells
            which head it is, `cfg.metadata.hook_name` at which hook.
        n_heads: query heads of the layer. None takes it from the metadata that `split_heads`
            writes, and where there are none, the highest head that came as the last one.

    Returns:
        An SAE that holds copies of the weights and needs no gradient. Its metadata are those on
        which all heads agree.

    Raises:
        TypeError: one is no plain inference SAE.
        ValueError: there are none; a head is missing, comes twice or is not of this layer; two
            differ in architecture, size, setting, device, hook or model; some rescale by decoder
            norms other than 1 and others do not; or they are SAEs that no query-head SAE can
            hold. Always before any weight is copied.
    """
    given = list(saes)
    if not given:
        raise ValueError("there are no SAEs: give one for each head of a hook")
    heads = _by_head(given)
    first, *others = (heads[head] for head in sorted(heads))
    common = _in_common(first)
    architecture = common["architecture"]
    ours = {plain: headed for headed, plain in PLAIN.items()}.get(architecture)
    if ours is None:
        raise ValueError(
            f"there is no query-head SAE for architecture {architecture!r}: allowed are "
            f"{sorted(PLAIN.values())}"
        )
    without_effect = _rescaling_without_effect([first, *others])
    for other in others:
        _check_equal({n: v for n, v in common.items() if n not in without_effect}, first, other)
    if common["hook_name"] is None:
        raise ValueError(
            "the SAEs do not say where they belong: set cfg.metadata.hook_name of each, such as "
            "'blocks.0.attn.hook_q'"
        )
    if common["normalize_activations"] != "none":
        raise ValueError(
            f"normalize_activations={common['normalize_activations']!r} is not supported for "
            "query-head SAEs: train with 'none', or fold it into the weights where SAELens can "
            "(fold_activation_norm_scaling_factor)"
        )
    _check_complete(heads, common["hook_name"], n_heads)
    QuerySite.from_hook_name(common["hook_name"], n_heads=len(heads), d_head=first.cfg.d_in)
    config = get_sae_class(ours)[1](
        n_heads=len(heads),  # pyright: ignore[reportCallIssue]
        d_head=first.cfg.d_in,  # pyright: ignore[reportCallIssue]
        d_sae_per_head=first.cfg.d_sae,  # pyright: ignore[reportCallIssue]
        metadata=_agreed_metadata([first, *others]),
        **_settings(first) | without_effect,
    )
    states = [one.state_dict() for one in (first, *others)]
    weights = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    joined = _with_weights(config, weights)
    assert isinstance(joined, QueryHeadSAE)
    return joined


def _settings(sae: SAE[Any]) -> dict[str, Any]:
    """What is set for all heads alike: the config without sizes and metadata."""
    names = {field.name for field in fields(sae.cfg)} - _SIZES - {"metadata"}
    return {name: getattr(sae.cfg, name) for name in names} | {"device": str(sae.W_dec.device)}


def _with_weights(config: SAEConfig, weights: Mapping[str, Tensor]) -> SAE[Any]:
    device, config.device = config.device, "meta"  # as SAELens loads: no random weights are drawn
    sae = get_sae_class(config.architecture())[0](config)
    sae.load_state_dict(weights, assign=True)
    return sae.to(device=device).requires_grad_(False).eval()


def _by_head(saes: Sequence[SAE[Any]]) -> dict[int, SAE[Any]]:
    heads: dict[int, SAE[Any]] = {}
    for place, sae in enumerate(saes):
        if not isinstance(sae, SAE) or isinstance(sae, QueryHeadSAE | TrainingSAE):
            raise TypeError(
                f"SAE {place} of the list is a {type(sae).__name__}: allowed are plain inference "
                "SAEs of one head, such as SAE.load_from_disk returns after save_inference_model"
            )
        head = sae.cfg.metadata.hook_head_index
        if not isinstance(head, int) or head < 0:
            raise ValueError(
                f"SAE {place} of the list has hook_head_index={head!r}: set "
                "cfg.metadata.hook_head_index to its head, 0 or more"
            )
        if head in heads:
            raise ValueError(f"head {head} comes twice: give each head once")
        heads[head] = sae
    return heads


def _in_common(sae: SAE[Any]) -> dict[str, Any]:
    metadata = sae.cfg.metadata
    return {
        "architecture": sae.cfg.architecture(),
        "hook_name": metadata.hook_name,
        "model_name": metadata.model_name,
        "d_in": sae.cfg.d_in,
        "d_sae": sae.cfg.d_sae,
        **_settings(sae),
    }


def _check_equal(common: Mapping[str, Any], first: SAE[Any], other: SAE[Any]) -> None:
    here = _in_common(other)
    for name, value in common.items():
        if here.get(name) != value:
            raise ValueError(
                f"head {other.cfg.metadata.hook_head_index} has {name}={here.get(name)!r}, head "
                f"{first.cfg.metadata.hook_head_index} has {value!r}: the heads of a layer need "
                "SAEs of one hook and model with equal architecture, sizes and settings "
                "(device and dtype change with sae.to)"
            )


def _rescaling_without_effect(saes: Sequence[SAE[Any]]) -> dict[str, bool]:
    """Return what replaces the setting of each: False where only some rescale, all by norms of 1.

    Nothing where all agree, or are no TopK SAEs.
    """
    topk = [sae for sae in saes if isinstance(sae.cfg, TopKSAEConfig)]
    rescaled = [sae for sae in topk if getattr(sae.cfg, _RESCALE)]
    if len(rescaled) in (0, len(topk)):
        return {}
    for sae in rescaled:
        norms = sae.W_dec.detach().float().norm(dim=-1)
        if not torch.allclose(norms, torch.ones_like(norms), rtol=0, atol=_NORM_ROUNDING):
            raise ValueError(
                f"head {sae.cfg.metadata.hook_head_index} has {_RESCALE}=True and decoder rows of "
                f"norm {float(norms.min()):.3g} to {float(norms.max()):.3g}, other heads have "
                "False: make the norms 1 with its fold_W_dec_norm(), which leaves its output as "
                "it is, and join again"
            )
    return {_RESCALE: False}


def _check_complete(heads: Mapping[int, SAE[Any]], hook_name: str, n_heads: int | None) -> None:
    if n_heads is None:
        known = [sae.cfg.metadata.n_heads for sae in heads.values()]
        n_heads = max([1 + max(heads), *(n for n in known if isinstance(n, int))])
    if n_heads < 1:
        raise ValueError(f"n_heads={n_heads} is not allowed: give the query heads of the layer")
    missing = sorted(set(range(n_heads)) - set(heads))
    unknown = sorted(set(heads) - set(range(n_heads)))
    if missing or unknown:
        wrong = [f"missing are {missing}"] * bool(missing) + [f"unknown are {unknown}"] * bool(
            unknown
        )
        raise ValueError(
            f"the heads at {hook_name} are 0 to {n_heads - 1}, and {' and '.join(wrong)}: give one "
            "SAE for each head of the layer"
        )


def _agreed_metadata(saes: Sequence[SAE[Any]]) -> SAEMetadata:
    every = [sae.cfg.metadata.to_dict() for sae in saes]
    agreed = {
        name: copy.deepcopy(value)
        for name, value in every[0].items()
        if name not in _OF_ONE_HEAD and all(name in d and d[name] == value for d in every)
    }
    return SAEMetadata(**agreed)
