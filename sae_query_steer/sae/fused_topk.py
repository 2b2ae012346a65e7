"""One training step of TopK without autograd: loss, gradients and firing counts, tile by tile.

Autograd keeps several tensors as large as all latents of a batch, and on a CPU most of a step is
the memory they are written to. Here a tile of tokens of one head goes all the way from query to
gradient while it is in the cache; on a GPU one tile holds everything.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

CPU_TILE_TOKENS = 512
"""Tokens of a tile on a CPU: with 512 latents in 32 bits a tile is 1 MB."""


@torch.no_grad()
def fused_topk(
    x: Float[Tensor, "head batch d_head"],
    W_enc: Float[Tensor, "head d_head d_sae_per_head"],
    b_enc: Float[Tensor, "head d_sae_per_head"],
    W_dec: Float[Tensor, "head d_sae_per_head d_head"],
    b_dec: Float[Tensor, "head d_head"],
    *,
    k: int,
    apply_b_dec_to_input: bool,
    rescale_by_decoder_norm: bool,
) -> tuple[
    Float[Tensor, ""],
    Float[Tensor, "head batch d_head"],
    Float[Tensor, "head d_sae_per_head"],
    dict[str, Tensor],
]:
    """Return loss and gradients of a TopK SAE's squared error, each head on its own.

    Scaling latents by the decoder norms before the choice and back before the decoding leaves the
    value and the gradient of every chosen latent as they were: the norms only choose.

    Args:
        x: queries.
        W_enc: encoder weights.
        b_enc: encoder bias.
        W_dec: decoder weights.
        b_dec: decoder bias.
        k: latents of a head that may fire at a token.
        apply_b_dec_to_input: subtract the decoder bias before encoding.
        rescale_by_decoder_norm: choose as if every decoder row had norm 1.

    Returns:
        The squared error, summed over heads and dimensions, mean over tokens; the residual, query
        minus reconstruction; at how many tokens each latent fired; the gradients by name.
    """
    n_heads, n_tokens, _ = x.shape
    norms = W_dec.norm(dim=-1) if rescale_by_decoder_norm else torch.ones_like(b_enc)
    encoder, bias, decoder = W_enc * norms[:, None], b_enc * norms, W_dec / norms[..., None]
    scale = -2 / n_tokens  # of the gradient of the residual
    back = (W_dec * scale).mT
    on_cpu = x.device.type == "cpu"
    heads, tokens = (1, min(CPU_TILE_TOKENS, n_tokens)) if on_cpu else (n_heads, n_tokens)
    buffers = [x.new_empty(heads, tokens, size) for size in (*[W_enc.shape[-1]] * 2, x.shape[-1])]
    weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    grads = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    residual, fired = x.new_empty(x.shape), torch.zeros_like(b_enc, dtype=torch.float32)
    for h in range(0, n_heads, heads):
        rows = slice(h, h + heads)
        own = {name: grad[rows] for name, grad in grads.items()}
        for start in range(0, n_tokens, tokens):
            part, left = (of[rows, start : start + tokens] for of in (x, residual))
            latents, mask, centred = (buffer[:, : part.shape[1]] for buffer in buffers)
            torch.sub(part, b_dec[rows, None], out=centred)
            given = centred if apply_b_dec_to_input else part
            torch.baddbmm(bias[rows, None], given, encoder[rows], out=latents)
            _choose(latents, k, out=mask)
            latents *= mask
            torch.baddbmm(centred, latents, decoder[rows], alpha=-1, out=left)
            own["W_dec"].baddbmm_(latents.mT, left, alpha=scale)
            torch.bmm(left, back[rows], out=latents)
            latents *= mask
            fired[rows] += mask.sum(1, dtype=torch.float32)
            own["b_enc"] += latents.sum(1)
            own["W_enc"].baddbmm_(given.mT, latents)
    grads["W_dec"] /= norms[..., None]
    grads["b_dec"] = residual.sum(1) * scale
    if apply_b_dec_to_input:
        grads["b_dec"] -= torch.einsum("hs,hds->hd", grads["b_enc"], W_enc)
    return residual.norm().square() / n_tokens, residual, fired, grads


def _choose(pre: Tensor, k: int, *, out: Tensor) -> None:
    """Write 1 where a pre-activation is positive and among the k largest of its row, else 0."""
    tiny = torch.finfo(pre.dtype).tiny
    if pre.device.type == "cpu" and pre.dtype in (torch.float32, torch.float64):
        # Faster than torch.topk, which also finds where they are; NumPy knows no bfloat16.
        kth, values = pre.shape[-1] - k, out.copy_(pre).numpy()
        values.partition(kth, axis=-1)
        least = torch.from_numpy(np.maximum(values[..., kth], tiny))
    else:
        least = pre.topk(k, dim=-1, sorted=False).values.amin(-1).clamp(min=tiny)
    torch.ge(pre, least[..., None], out=out)
    if float(out.sum(-1).amax()) > k:  # equal values: let topk break the tie, as SAELens does
        top = pre.topk(k, dim=-1, sorted=False)
        out.zero_().scatter_(-1, top.indices, (top.values > 0).to(out))
