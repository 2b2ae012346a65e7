"""The effect of replacing queries on next tokens and attention."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_query_steer.diagnostics.metrics import kl_divergence
from sae_query_steer.models.activations import LOGITS, pattern_hook, read_activations
from sae_query_steer.sae.encoders import IdentityEncoder

KINDS = ("sae", "zero", "mean")
"""Replacements of the query: its reconstruction, zero, or the mean query of the head."""


class ConstantEncoder(IdentityEncoder):
    """An encoder that decodes every query to one value."""

    value: Float[Tensor, "head d_head"]

    def __init__(self, value: Float[Tensor, "head d_head"]) -> None:
        super().__init__(n_heads=value.shape[0], d_head=value.shape[1])
        object.__setattr__(self, "value", value)

    def decode(self, feature_acts: Float[Tensor, "*batch head d_latent"], /) -> Tensor:
        """Return the value for every query."""
        return self.value.expand(feature_acts.shape)


def read_run(model: Any, tokens: Int[Tensor, "batch pos"], layers: list[int]) -> dict[str, Tensor]:
    """Return next-token log probabilities (`LOGITS`) and the attention of layers, by hook name."""
    names = [name for layer in layers for name in (pattern_hook(layer), _scores_hook(layer))]
    run = read_activations(model, tokens, [LOGITS, *names])
    return run | {LOGITS: run[LOGITS].float().log_softmax(-1)}


def replacement_sums(
    kind: str,
    bare: Mapping[str, Tensor],
    run: Mapping[str, Tensor],
    tokens: Int[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"],
    layer: int,
    heads: list[int],
) -> dict[str, float]:
    """Return sums over the tokens of a batch of what `replacement_scores` needs.

    Args:
        kind: one of `KINDS`.
        bare: a run of the model as it is.
        run: a run with the queries of some heads replaced.
        tokens: ids.
        real: False where the column is padding.
        layer: of these heads.
        heads: which were replaced.
    """
    device = bare[LOGITS].device
    counted = real[:, 1:].to(device)  # a token that has a next one
    following = tokens[:, 1:, None].to(device)
    clean, changed = bare[LOGITS][:, :-1], run[LOGITS][:, :-1]
    sums = {
        f"ce_{kind}": -changed.gather(-1, following)[..., 0][counted],
        f"kl_{kind}": kl_divergence(clean, changed)[counted],
    }
    if kind == "sae":
        sums |= {"n": counted, "ce_clean": -clean.gather(-1, following)[..., 0][counted]}
        sums |= _attention_sums(bare, run, real, layer, heads)
    return {name: float(values.double().sum()) for name, values in sums.items()}


def replacement_scores(sums: Mapping[str, float]) -> dict[str, float]:
    """Return the scores of `evaluate_saes` from sums over all batches."""
    n = sums["n"]
    row = {name: sums[name] / n for name in ("ce_clean", *(f"ce_{kind}" for kind in KINDS))}
    row |= {f"kl_{kind}": sums[f"kl_{kind}"] / n for kind in KINDS}
    for kind in ("zero", "mean"):
        ce, kl = row[f"ce_{kind}"], row[f"kl_{kind}"]
        row[f"ce_score_{kind}"] = _share(ce - row["ce_sae"], ce - row["ce_clean"])
        row[f"kl_score_{kind}"] = _share(kl - row["kl_sae"], kl)
    row["pattern_kl"] = sums["pattern_kl"] / sums["n_queries"]
    row["score_error"] = _share(sums["score_error"], sums["score_norm"])
    return row | {"n_tokens": int(n)}


def _attention_sums(
    bare: Mapping[str, Tensor],
    run: Mapping[str, Tensor],
    real: Bool[Tensor, "batch pos"],
    layer: int,
    heads: list[int],
) -> dict[str, Tensor]:
    before, after = (side[pattern_hook(layer)][:, heads].float() for side in (bare, run))
    divergence = kl_divergence(before.log(), after.clamp(min=1e-30).log()).transpose(1, 2)
    counted = real.to(before.device)
    seen = torch.ones(before.shape[-2:], dtype=torch.bool, device=before.device).tril()
    centred = []
    for side in (bare, run):
        scores = side[_scores_hook(layer)][:, heads].float().where(seen, 0.0)
        scores = scores - scores.sum(-1, keepdim=True) / seen.sum(-1)[:, None]
        centred.append(scores.where(seen & counted[:, None, :, None], 0.0))
    return {
        "pattern_kl": divergence[counted].mean(-1),
        "n_queries": counted,
        "score_error": (centred[1] - centred[0]).square(),
        "score_norm": centred[0].square(),
    }


def _scores_hook(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_attn_scores"


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 1e-9 else float("nan")
