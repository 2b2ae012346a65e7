"""Scores of query SAEs: reconstruction, and the effect of replacing queries on the model."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize, pad

from sae_query_steer.arguments import check_number
from sae_query_steer.data.batches import row_batches
from sae_query_steer.data.token_rows import Texts, token_rows
from sae_query_steer.diagnostics.metrics import kl_divergence
from sae_query_steer.models.activations import LOGITS, pattern_hook, read_activations
from sae_query_steer.models.loading import check_not_steered
from sae_query_steer.sae.encoders import IdentityEncoder, QueryEncoder, encoder_sites
from sae_query_steer.sites import ALL_HEADS
from sae_query_steer.steering.attach import attached_saes
from sae_query_steer.steering.where import chosen_heads
from sae_query_steer.targets.fingerprint import check_devices
from sae_query_steer.training.reconstruction import ReconstructionMoments

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


@torch.no_grad()
def evaluate_saes(
    model: Any,
    saes: Mapping[str, QueryEncoder],
    texts: Texts,
    *,
    n_tokens: int = 16_384,
    per_head: bool = True,
    heads: Sequence[int] | Mapping[int, Sequence[int]] | None = None,
    batch_size: int = 16,
    **reading: Any,
) -> pd.DataFrame:
    """Return scores of every SAE, head by head and for all heads of a layer together.

    Give texts that the SAEs were not trained on. The model runs over all tokens twice, and three
    times more for each row of the result: `heads` and `per_head` limit the rows.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        saes: the SAEs by hook name; identity encoders are scored as well.
        texts: in any form that `token_rows` takes.
        n_tokens: about how many tokens to read, in whole rows.
        per_head: also replace the query of every head alone; False leaves the rows "all".
        heads: only these heads and no "all": the same heads in each layer, or heads by layer;
            None means every head and "all".
        batch_size: rows of one forward pass.
        reading: options of `token_rows`; by default texts are packed into full rows.

    Returns:
        One row for each layer and head, and one with head "all" unless `heads` are given, with

        - l0, explained_variance, dead_share: as in `QuerySAEs.metrics`, on these texts; for "all"
          l0 is that of all heads together
        - cosine: mean cosine of query and reconstruction
        - max_decoder_cosine: largest cosine between two decoder rows of a head
        - position_share: share of the latents' variance that the token's position explains,
          corrected for chance
        - ce_clean, ce_sae, ce_zero, ce_mean: cross entropy of the next token in nats, unmodified
          and with the query replaced; kl_sae, kl_zero, kl_mean: KL(clean || replaced) in nats. A
          zero query attends evenly.
        - ce_score_zero, ce_score_mean: (CE_ablated - CE_sae) / (CE_ablated - CE_clean), and
          kl_score_zero, kl_score_mean: (KL_ablated - KL_sae) / KL_ablated; NaN if the ablation
          has no effect
        - pattern_kl: KL(clean || reconstructed) of the attention pattern in nats, mean over queries
          and heads
        - score_error: squared error of the attention scores over their squared norm, both centred
          over the visible keys, because the softmax ignores their mean
        - n_tokens

    Raises:
        TypeError: a value of `saes` is not an encoder, or `heads` is not a list.
        ValueError: a site, head or layer that does not exist, no row left, an SAE on another
            device, unusable texts, or a model that is being steered; before any work starts.

    Source: SAELens's evals for l0, explained variance, CE and KL scores.
    """
    sites = encoder_sites(saes)
    for site in sites.values():
        site.check(model)
    if not per_head and heads is not None:
        raise ValueError(f"heads must be None with per_head=False, got {heads!r}")
    picked = chosen_heads(sites, None, heads)
    whole = [ALL_HEADS] if heads is None else []
    replaced = {n: [*(picked[n] if per_head else ()), *whole] for n in sites if n in picked}
    check_devices(model, saes)
    check_not_steered(model)
    check_number("n_tokens", n_tokens, whole=True, least=1)
    check_number("batch_size", batch_size, whole=True, least=1)
    rows = token_rows(model, texts, n_tokens=n_tokens, **reading)
    rows = rows[: max(1, n_tokens // rows.shape[1])].long()
    kept = {name: ReconstructionMoments() for name in replaced}
    places = {name: _PositionMoments(rows.shape[1]) for name in replaced}
    for _, tokens, real in row_batches(rows, batch_size, "Reading queries"):
        for name, queries in read_activations(model, tokens, list(kept)).items():
            here, latents = real.to(queries.device), saes[name].encode(queries)
            output = saes[name].decode(latents)
            kept[name].update(queries[here], output[here], latents[here])
            places[name].update(latents, here)
    sums: dict[tuple[str, int | str], Counter[str]]
    sums = {(name, head): Counter() for name in replaced for head in replaced[name]}
    for _, tokens, real in row_batches(rows, batch_size, "Replacing queries"):
        bare = read_run(model, tokens, [sites[name].layer for name in kept])
        for (name, head), found in sums.items():
            layer, n_heads = sites[name].layer, sites[name].n_heads
            chosen = list(range(n_heads)) if head == ALL_HEADS else [int(head)]
            mean = kept[name].mean.float()
            encoders = (saes[name], ConstantEncoder(torch.zeros_like(mean)), ConstantEncoder(mean))
            for kind, encoder in zip(KINDS, encoders, strict=True):
                with attached_saes(model, {name: encoder}, heads=chosen):
                    run = read_run(model, tokens, [layer])
                found.update(_sums(kind, bare, run, tokens, real, layer, chosen))
    return pd.DataFrame(
        [
            {
                "layer": sites[name].layer,
                "head": head,
                **_reconstruction(saes[name], kept[name], places[name], head),
                **_effect(found),
            }
            for (name, head), found in sums.items()
        ]
    )


class _PositionMoments:
    """Accumulates sums of latents by position."""

    def __init__(self, n_positions: int) -> None:
        self._n_positions = n_positions
        self._sums: tuple[Tensor, ...] = ()

    def update(
        self, latents: Float[Tensor, "batch pos head d"], real: Bool[Tensor, "batch pos"]
    ) -> None:
        """Add a batch of latents; padding does not count."""
        missing = self._n_positions - real.shape[1]
        latents = pad((latents * real[..., None, None]).double(), (0, 0, 0, 0, 0, missing))
        count = pad(real.double(), (0, missing)).sum(0)
        sums = (latents.sum(0), latents.square().sum((0, 1, 3)), count)
        self._sums = tuple(map(torch.add, self._sums, sums)) if self._sums else sums

    def share(self, heads: slice) -> float:
        """Return the share of the variance of some heads' latents that the position explains."""
        sums, squares, count = self._sums
        n, here, square = count.sum(), sums[:, heads], squares[heads].sum()
        by_position = (here.square() / count.clamp(min=1)[:, None, None]).sum()
        total = square - (here.sum(0).square() / n).sum()
        # Any grouping explains some variance by chance: compare unbiased estimates.
        free = (n - (count > 0).sum()).clamp(min=1)
        return float(1 - ((square - by_position) / free) / (total / (n - 1).clamp(min=1)))


def max_decoder_cosine(weights: Float[Tensor, "head d_latent d_head"] | None) -> float:
    """Return the largest cosine between two decoder rows of the same head; NaN without weights."""
    if weights is None:
        return math.nan
    rows = normalize(weights.detach().float(), dim=-1)
    cosines = rows @ rows.mT
    cosines.diagonal(dim1=-2, dim2=-1).fill_(-1.0)
    return float(cosines.max())


def _reconstruction(
    sae: QueryEncoder, moments: ReconstructionMoments, places: _PositionMoments, head: int | str
) -> dict[str, float]:
    """Return the scores of the reconstruction of one head, or of all together."""
    heads = slice(None) if head == ALL_HEADS else slice(int(head), int(head) + 1)
    weights = getattr(sae, "W_dec", None)
    return {
        "l0": float(moments.l0()[heads].sum()),
        "explained_variance": float(moments.explained_variance(pooled=heads)),
        "dead_share": float(moments.dead_share()[heads].mean()),
        "cosine": float(moments.cosine(heads)),
        "max_decoder_cosine": max_decoder_cosine(None if weights is None else weights[heads]),
        "position_share": places.share(heads),
    }


def read_run(model: Any, tokens: Int[Tensor, "batch pos"], layers: list[int]) -> dict[str, Tensor]:
    """Return next-token log probabilities (`LOGITS`) and the attention of layers, by hook name."""
    names = [name for layer in layers for name in (pattern_hook(layer), _scores_hook(layer))]
    run = read_activations(model, tokens, [LOGITS, *names])
    return run | {LOGITS: run[LOGITS].float().log_softmax(-1)}


def _sums(
    kind: str,
    bare: Mapping[str, Tensor],
    run: Mapping[str, Tensor],
    tokens: Int[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"],
    layer: int,
    heads: list[int],
) -> dict[str, float]:
    """Return sums over the tokens of a batch of what `_effect` needs.

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
        before, after = (side[pattern_hook(layer)][:, heads].float() for side in (bare, run))
        divergence = kl_divergence(before.log(), after.clamp(min=1e-30).log()).transpose(1, 2)
        queries = real.to(before.device)
        sums |= {"pattern_kl": divergence[queries].mean(-1), "n_queries": queries}
        first, last = (
            _centred(side[_scores_hook(layer)][:, heads].float(), queries) for side in (bare, run)
        )
        sums |= {"score_error": (last - first).square(), "score_norm": first.square()}
    return {name: float(values.double().sum()) for name, values in sums.items()}


def _effect(sums: Mapping[str, float]) -> dict[str, float]:
    """Return the scores of the replacement from sums over all batches."""
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


def _scores_hook(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_attn_scores"


def _centred(
    scores: Float[Tensor, "batch head query key"], real: Bool[Tensor, "batch query"]
) -> Float[Tensor, "batch head query key"]:
    """Return scores less their mean over the visible keys, and 0 at others and at padding."""
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.where(seen, 0.0)
    scores = scores - scores.sum(-1, keepdim=True) / seen.sum(-1)[:, None]
    return scores.where(seen & real[:, None, :, None], 0.0)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 1e-9 else float("nan")
