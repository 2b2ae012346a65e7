"""What the hosts hand to a block beside its input: the cache and the mask, each in its own way."""

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor


def cache_of(arguments: dict[str, Any]) -> Any:
    """Return a layer's cache on HookedTransformer, or all layers' on the bridge; None without."""
    entry = arguments.get("past_kv_cache_entry")
    return arguments.get("past_key_values") if entry is None else entry


def cached_length(cache: Any, layer: int) -> int:
    """Return how many columns the cache holds for a layer that is about to run."""
    if hasattr(cache, "past_keys"):  # HookedTransformer
        return int(cache.past_keys.shape[1])
    return 0 if cache is None else int(cache.get_seq_length(layer))  # Hugging Face's cache


def own_columns(
    mask: Any, batch: int, n_pos: int, past: int, device: torch.device
) -> Bool[Tensor, "batch pos"]:
    """Return which columns of this forward pass are real: those that may attend to themselves.

    HookedTransformer hands its blocks a mask [batch total] of 0 and 1; the bridge hands them
    Hugging Face's [batch 1 pos total], additive or boolean, or nothing where nothing is masked.
    """
    if not isinstance(mask, Tensor):
        return torch.ones(batch, n_pos, dtype=torch.bool, device=device)
    if mask.ndim == 2:
        return mask[:, mask.shape[1] - n_pos :].bool().to(device)
    allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > -1.0
    # A sliding window's cache is shorter than what was seen, a preallocated one is longer.
    own = min(past, allowed.shape[-1] - n_pos) + torch.arange(n_pos, device=allowed.device)
    diagonal = allowed[:, torch.arange(n_pos, device=allowed.device), own]
    return diagonal.expand(batch, n_pos).to(device)


def past_columns(
    mask: Any, valid: Bool[Tensor, "batch pos"], past: int, window: int | None
) -> Bool[Tensor, "batch past"] | None:
    """Return which columns before this forward pass are real; None where a mask does not tell.

    Args:
        mask: what the bridge hands to a block.
        valid: which columns of this pass are real.
        past: columns in the cache.
        window: of a sliding window, whose mask hides real columns too; None without one.
    """
    total = past + valid.shape[1]
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-1] != total:
        return None
    if window is not None and total > window:
        return None
    allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > -1.0
    return (allowed[..., :past].to(valid.device) & valid[..., None]).any(1)
