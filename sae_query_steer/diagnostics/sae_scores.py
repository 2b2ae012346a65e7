"""Scores of query SAEs: reconstruction, and the effect of replacing queries on the model."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from sae_query_steer.arguments import check_number
from sae_query_steer.data.batches import row_batches
from sae_query_steer.data.token_rows import Texts, token_rows
from sae_query_steer.diagnostics.replacement import (
    ConstantEncoder,
    read_run,
    replacement_scores,
    replacement_sums,
)
from sae_query_steer.models.activations import read_activations
from sae_query_steer.models.loading import check_not_steered
from sae_query_steer.sae.encoders import QueryEncoder, encoder_sites
from sae_query_steer.sites import ALL_HEADS, QuerySite
from sae_query_steer.steering.attach import attached_saes
from sae_query_steer.steering.where import chosen_heads
from sae_query_steer.targets.fingerprint import check_devices
from sae_query_steer.training.reconstruction import ReconstructionMoments


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
    replaced = _replaced(sites, heads, per_head=per_head)
    check_devices(model, saes)
    check_not_steered(model)
    check_number("n_tokens", n_tokens, whole=True, least=1)
    check_number("batch_size", batch_size, whole=True, least=1)
    rows = token_rows(model, texts, **reading).long()
    rows = rows[: max(1, n_tokens // rows.shape[1])]
    kept = {name: _Kept(saes[name], rows.shape[1]) for name in replaced}
    for _, tokens, real in row_batches(rows, batch_size, "Reading queries"):
        for name, queries in read_activations(model, tokens, list(kept)).items():
            kept[name].update(queries, real.to(queries.device))
    sums: dict[tuple[str, int | str], Counter[str]]
    sums = {(name, head): Counter() for name in replaced for head in replaced[name]}
    for _, tokens, real in row_batches(rows, batch_size, "Replacing queries"):
        bare = read_run(model, tokens, [sites[name].layer for name in kept])
        for (name, head), found in sums.items():
            layer, n_heads = sites[name].layer, sites[name].n_heads
            chosen = list(range(n_heads)) if head == ALL_HEADS else [int(head)]
            for kind, encoder in {"sae": saes[name], **kept[name].ablations()}.items():
                with attached_saes(model, {name: encoder}, heads=chosen):
                    run = read_run(model, tokens, [layer])
                found.update(replacement_sums(kind, bare, run, tokens, real, layer, chosen))
    return pd.DataFrame(
        [
            {
                "layer": sites[name].layer,
                "head": head,
                **kept[name].row(head),
                **replacement_scores(found),
            }
            for (name, head), found in sums.items()
        ]
    )


def _replaced(
    sites: Mapping[str, QuerySite],
    heads: Sequence[int] | Mapping[int, Sequence[int]] | None,
    *,
    per_head: bool,
) -> dict[str, list[int | str]]:
    """Return the heads that are replaced at each site, one entry for each row of the result."""
    if heads is None:
        return {
            name: [*(range(site.n_heads) if per_head else ()), ALL_HEADS]
            for name, site in sites.items()
        }
    if not per_head:
        raise ValueError(f"heads must be None with per_head=False, got {heads!r}")
    picked = chosen_heads(sites, None, heads)
    return {name: list(picked[name]) for name in sites if name in picked}


class _Kept:
    """Streams the reconstruction scores of one site."""

    def __init__(self, encoder: QueryEncoder, n_positions: int) -> None:
        self.encoder, self.moments = encoder, ReconstructionMoments()
        self._cosine = torch.zeros(encoder.n_heads, dtype=torch.double)
        shape = (n_positions, encoder.n_heads, encoder.d_latent)
        self._sum = torch.zeros(shape, dtype=torch.double)
        self._square = torch.zeros(shape[1:], dtype=torch.double)
        self._count = torch.zeros(n_positions, dtype=torch.double)
        self._query_sum = torch.zeros(encoder.n_heads, encoder.d_head, dtype=torch.double)

    @torch.no_grad()
    def update(
        self, queries: Float[Tensor, "batch pos head d_head"], real: Bool[Tensor, "batch pos"]
    ) -> None:
        latents = self.encoder.encode(queries)
        output = self.encoder.decode(latents)
        self.moments.update(queries[real], output[real], latents[real])
        similar = cosine_similarity(queries[real].float(), output[real].float(), dim=-1)
        self._cosine += similar.double().sum(0).cpu()
        latents = (latents * real[..., None, None]).double()
        width = slice(queries.shape[1])
        self._sum[width] += latents.sum(0).cpu()
        self._square += latents.square().sum((0, 1)).cpu()
        self._count[width] += real.double().sum(0).cpu()
        self._query_sum += queries[real].double().sum(0).cpu()

    def ablations(self) -> dict[str, QueryEncoder]:
        """Return the encoders of the zero and mean ablation."""
        mean = (self._query_sum / self.moments.n_tokens).float()
        return {"zero": ConstantEncoder(torch.zeros_like(mean)), "mean": ConstantEncoder(mean)}

    def row(self, head: int | str) -> dict[str, float]:
        """Return the scores of one head, or of all together."""
        heads = slice(None) if head == ALL_HEADS else slice(int(head), int(head) + 1)
        weights = getattr(self.encoder, "W_dec", None)
        return {
            "l0": float(self.moments.l0()[heads].sum()),
            "explained_variance": float(self.moments.explained_variance(pooled=heads)),
            "dead_share": float(self.moments.dead_share()[heads].mean()),
            "cosine": float(self._cosine[heads].mean()) / self.moments.n_tokens,
            "max_decoder_cosine": math.nan
            if weights is None
            else max_decoder_cosine(weights[heads]),
            "position_share": self._position_share(heads),
        }

    def _position_share(self, heads: slice) -> float:
        n, groups = self._count.sum(), int((self._count > 0).sum())
        here = self._sum[:, heads]
        by_position = (here.square() / self._count.clamp(min=1)[:, None, None]).sum()
        total = self._square[heads].sum() - (here.sum(0).square() / n).sum()
        within = self._square[heads].sum() - by_position
        # Any grouping explains some variance by chance: compare unbiased estimates.
        return float(1 - (within / (n - groups).clamp(min=1)) / (total / (n - 1).clamp(min=1)))


def max_decoder_cosine(
    weights: Float[Tensor, "head d_latent d_head"] | None, heads: slice = slice(None)
) -> float:
    """Return the largest cosine between two decoder rows of the same head; NaN without weights."""
    if weights is None:
        return math.nan
    rows = normalize(weights[heads].detach().float(), dim=-1)
    cosines = rows @ rows.mT
    cosines.diagonal(dim1=-2, dim2=-1).fill_(-1.0)
    return float(cosines.max())
