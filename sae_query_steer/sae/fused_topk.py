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
    decoder = W_dec / norms[..., None]
    shift = b_dec if apply_b_dec_to_input else torch.zeros_like(b_dec)
    on_cpu = x.device.type == "cpu"
    heads, tokens = (1, min(CPU_TILE_TOKENS, n_tokens)) if on_cpu else (n_heads, n_tokens)
    buffers = [x.new_empty(heads, tokens, W_enc.shape[-1]) for _ in range(3)]
    weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    grads = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    residual, fired = torch.empty_like(x), torch.zeros_like(b_enc, dtype=torch.float32)
    loss = x.new_zeros(())
    for h in range(0, n_heads, heads):
        rows = slice(h, h + heads)
        for start in range(0, n_tokens, tokens):
            part = x[rows, start : start + tokens] - shift[rows, None]
            latents, mask, back = (buffer[:, : part.shape[1]] for buffer in buffers)
            torch.baddbmm(b_enc[rows, None], part, W_enc[rows], out=latents)
            latents *= norms[rows, None]
            _chosen(latents, k, out=mask)
            latents *= mask
            error = torch.baddbmm((b_dec - shift)[rows, None] - part, latents, decoder[rows])
            residual[rows, start : start + tokens] = -error
            loss += error.square().sum()
            error *= 2 / n_tokens
            torch.bmm(error, W_dec[rows].mT, out=back)
            back *= mask
            grads["W_dec"][rows].baddbmm_(latents.mT, error)
            grads["W_enc"][rows].baddbmm_(part.mT, back)
            grads["b_enc"][rows] += back.sum(1)
            grads["b_dec"][rows] += error.sum(1)
            fired[rows] += mask.sum(1, dtype=torch.float32)
    grads["W_dec"] /= norms[..., None]
    if apply_b_dec_to_input:
        grads["b_dec"] -= torch.einsum("hs,hds->hd", grads["b_enc"], W_enc)
    return loss / n_tokens, residual, fired, grads


def _chosen(pre: Tensor, k: int, *, out: Tensor) -> None:
    """Write 1 where a pre-activation is positive and among the k largest of its row, else 0."""
    if pre.device.type == "cpu" and pre.dtype in (torch.float32, torch.float64):
        # Faster than torch.topk, which also finds where they are; NumPy knows no bfloat16.
        kth = pre.shape[-1] - k
        least = torch.from_numpy(np.partition(pre.numpy(), kth, axis=-1)[..., kth].copy())
    else:
        least = pre.topk(k, dim=-1, sorted=False).values.amin(-1)
    torch.ge(pre, least.clamp(min=torch.finfo(pre.dtype).tiny)[..., None], out=out)
    if bool((out.sum(-1) > k).any()):  # equal values: let topk break the tie, as SAELens does
        top = pre.topk(k, dim=-1, sorted=False)
        out.zero_().scatter_(-1, top.indices, (top.values > 0).to(out))
