"""A constant steer of queries as biases of a plain model, which then runs without hooks."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from sae_query_steer.arguments import check_kind
from sae_query_steer.baselines.directions import AddedDirection
from sae_query_steer.descent.control import ExceptLatents, GivenLatents, TargetLatents, TopLatents
from sae_query_steer.descent.objectives import CentroidContrast, FixedMove, LinearProbe
from sae_query_steer.descent.strength import each
from sae_query_steer.models.activations import LOGITS, read_activations, without_hooks
from sae_query_steer.models.fingerprint import fingerprint_tokens
from sae_query_steer.models.loading import check_not_steered, model_name
from sae_query_steer.sae.encoders import linear_decoder
from sae_query_steer.scopes.named import EveryPosition
from sae_query_steer.scopes.positions import TokenPositions
from sae_query_steer.sites import QuerySite
from sae_query_steer.steering.latent_descent import LatentDescent, LatentGradientSteerer
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.where import SiteHeads
from sae_query_steer.storage.folders import check_replaceable, new_folder
from sae_query_steer.storage.records import write_json

MODEL_TYPES = ("gpt2", "llama", "mistral", "qwen2")
"""Architectures that have a bias of queries, or are a Llama without one."""

_WITHOUT = {
    "gemma3_text": "it normalises queries after their projection",
    "phi3": "its fused projection of queries, keys and values has no bias",
    "qwen3": "it normalises queries after their projection",
}
_KINDS = {
    "objective": (FixedMove, CentroidContrast, LinearProbe),
    "latents": (type(None), TargetLatents, TopLatents, GivenLatents, ExceptLatents),
}
"""Objectives whose gradient is the same at all latents, and choices that don't depend on them."""

_RECORD = "query_bias.json"
_REMEDY = "steer it with steerer.apply(model)"


@torch.no_grad()
def export_query_bias(
    model: Any, steerer: Steerer, folder: str | Path, *, overwrite: bool = False
) -> None:
    """Write a model whose query projections hold a steer as their bias; it needs no hooks.

    The folder is that of a plain Hugging Face model: config, safetensors and the tokenizer of the
    model's source, beside `query_bias.json`, which names the model and the heads. A Llama gets
    `attention_bias=True` and biases of 0 elsewhere; a Mistral without a sliding window becomes such
    a Llama. Before the folder takes its name, it is read again and compared with the steered model
    on fixed tokens.

    The steer must add the same to the query of a head at every token: `FixedMove`,
    `CentroidContrast` or `LinearProbe`, over identity encoders or over SAEs of which it lowers no
    latent, or `mean_difference` of queries.

    >>> export_query_bias(model, replace(steerer, scope=EveryPosition()), "steered-model")

    Args:
        model: a TransformerBridge with the weights of the folder or name that it was loaded from.
        steerer: a steerer at `hook_q` in the scope `EveryPosition()`.
        folder: the folder to make.
        overwrite: replace an exported model that is there.

    Raises:
        FileExistsError: the folder exists and `overwrite` is False, or it is something else.
        TypeError: another model than a TransformerBridge, or a steerer of another kind.
        ValueError: what the steerer adds is not constant, the architecture has no bias of queries,
            or the written model differs from the steered one.

    Source: our choice.
    """
    check_kind("steerer", steerer, Steerer, "of JoinedSteerers give one")
    check_replaceable(Path(folder), overwrite=overwrite, holding=_RECORD)
    steerer.check_model(model)
    check_not_steered(model)
    source = _source(model)
    _check_constant(steerer)
    chosen = steerer.where.chosen
    offsets = {at.site.layer: _offset(steerer.edit, at) for at in chosen.values()}
    tokens = fingerprint_tokens(int(model.cfg.d_vocab))
    with without_hooks(model), steerer.apply(model):
        expected = read_activations(model, tokens, [LOGITS])[LOGITS]
    dtype = next(model.parameters()).dtype
    with new_folder(folder, overwrite=overwrite, holding=_RECORD) as new:
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        _add(plain, offsets)
        plain.save_pretrained(new)
        if plain.config.model_type == "mistral":
            llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
            LlamaConfig.from_dict(plain.config.to_dict() | llama).save_pretrained(new)
        AutoTokenizer.from_pretrained(source).save_pretrained(new)
        del plain
        heads = {name: at.heads for name, at in chosen.items()}
        write_json(new / _RECORD, {"model": model_name(model), "heads": heads})
        written = AutoModelForCausalLM.from_pretrained(new, dtype=dtype)(tokens).logits
        found, wanted = (x.float().cpu().log_softmax(-1) for x in (written, expected))
        difference = float((found - wanted).abs().max())
        if not difference < (1e-3 if dtype in (torch.float32, torch.float64) else 0.5):
            raise ValueError(
                f"the log probabilities of the exported model must be those of the steered one, "
                f"but differ by up to {difference:.3g}: the weights are not those of {source}; "
                "save the model that you changed, and load that folder with load_model"
            )


def _source(model: Any) -> str:
    """Return where a bridge was loaded from, if its architecture takes a bias of queries."""
    inner = vars(model).get("original_model")
    if inner is None:
        raise TypeError(
            f"model must be a TransformerBridge, got {type(model).__name__}: load it with "
            "load_model(..., backend='bridge')"
        )
    kind, window = inner.config.model_type, getattr(inner.config, "sliding_window", None)
    if kind not in MODEL_TYPES:
        why = _WITHOUT.get(kind, "it is not known to have a bias of queries")
        raise ValueError(
            f"the architecture must be one of {MODEL_TYPES}, got {kind}: {why}; {_REMEDY}"
        )
    if kind == "mistral" and window is not None:
        raise ValueError(
            f"sliding_window must be None, got {window}: a Mistral has no bias, and the Llama that "
            f"it would become has no window; {_REMEDY}"
        )
    if not inner.name_or_path:
        raise ValueError("model must have been loaded from a folder or the hub: use load_model")
    return inner.name_or_path


def _check_constant(steerer: Steerer) -> None:
    """Raise unless a steerer adds the same to each token, as far as its settings tell.

    Raises:
        TypeError: its edit is of another kind.
        ValueError: the message names the setting.
    """
    edit: Any = steerer.edit
    scope, sites = steerer.where.scope, [at.site for at in steerer.where.chosen.values()]
    if type(edit) not in (LatentDescent, LatentGradientSteerer, AddedDirection):
        raise TypeError(
            "the steerer's edit must be a LatentDescent or the AddedDirection of mean_difference, "
            f"got {type(edit).__name__}, which depends on the token: {_REMEDY}"
        )

    def check(name: str, value: object, allowed: str, holds: bool) -> None:
        if not holds:
            raise ValueError(
                f"{name} must be {allowed} for a bias, which adds the same at every token, got "
                f"{value!r:.120}: change it, or {_REMEDY}"
            )

    check("scope", scope, "EveryPosition()", type(scope) is EveryPosition)
    for site in sites:
        before_rotary = isinstance(site, QuerySite) and not site.rotated
        check("site", site.hook_name, "blocks.L.attn.hook_q", before_rotary)
    for name in ("target", "strength", "n_steps", "step_size"):
        value = getattr(edit, name, None)
        check(name, value, "one for all rows", each(value, name) == [value])
    if isinstance(edit, LatentDescent):
        for name, kinds in _KINDS.items():
            value, allowed = getattr(edit, name), ", ".join(kind.__name__ for kind in kinds)
            check(name, value, f"one of {allowed}", type(value) in kinds)
        for name in ("max_relative_change", "schedule", "gate", "until"):
            check(name, getattr(edit, name), "None", getattr(edit, name) is None)
        check("keep_norm", edit.keep_norm, "False", not edit.keep_norm)


def _offset(edit: Any, at: SiteHeads) -> Float[Tensor, "head d_head"]:
    """Return what an edit adds to the queries of all heads of a site, 0 for those not chosen.

    Raises:
        ValueError: it depends on the latents, because some would be lowered to the end of their
            range, or on a decoder that is not linear.
    """
    tokens = TokenPositions(row=torch.tensor([0]), position=torch.tensor([0]), n_rows=1)
    queries = torch.zeros(1, len(at.heads), at.site.d_head)
    if isinstance(edit, LatentDescent):
        encoder, move = edit.saes[at.hook_name], edit.descended(queries, at, tokens)
        if linear_decoder(encoder) is None:
            raise ValueError(
                f"the encoder at {at.hook_name} must have a linear decoder, got "
                f"{type(encoder).__name__}: give a query-head SAE or identity_encoders"
            )
        lowered = edit.objective.gradient(move.before, move.goal) > 0
        if edit.latents is not None:
            lowered = lowered & edit.latents(move.before, move.goal, at.hook_name, at.heads)
        if encoder.latent_min is not None and bool(lowered.any()):
            raise ValueError(
                f"the move at {at.hook_name} must lower no latent, but lowers "
                f"{int(lowered.sum())}: they stop at {encoder.latent_min:g}, so the change depends "
                f"on the token; learn it over identity_encoders, or {_REMEDY}"
            )
    offset = torch.zeros(at.site.n_heads, at.site.d_head)
    offset[list(at.heads)] = edit.change(queries, at, tokens).delta[0].float()
    return offset


def _add(plain: Any, offsets: dict[int, Tensor]) -> None:
    """Add offsets of queries [head d_head], by layer, to the biases of a Hugging Face model."""
    fused = plain.config.model_type == "gpt2"
    if plain.config.model_type in ("llama", "mistral"):
        plain.config.attention_bias = True
        for layer in plain.model.layers:
            part = layer.self_attn
            for linear in (part.q_proj, part.k_proj, part.v_proj, part.o_proj):
                if linear.bias is None:
                    linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
    for layer, offset in offsets.items():
        if fused:
            bias = plain.transformer.h[layer].attn.c_attn.bias[: offset.numel()]
        else:
            bias = plain.model.layers[layer].self_attn.q_proj.bias
        bias += offset.flatten()
