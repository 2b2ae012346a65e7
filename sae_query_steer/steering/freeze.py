"""Hold attention patterns while a steer acts: how much of it works through queries and keys."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sae_query_steer.models.activations import eval_mode, pattern_hook
from sae_query_steer.models.loading import check_eager, check_not_steered
from sae_query_steer.models.placed_hooks import Hook
from sae_query_steer.models.tracking import PositionTracker
from sae_query_steer.scopes.positions import PromptLengths
from sae_query_steer.sites import check_hook_point, query_sites
from sae_query_steer.steering.block import block
from sae_query_steer.steering.engine import warn_unless_heard
from sae_query_steer.steering.steerer import JoinedSteerers, Steerer
from sae_query_steer.steering.where import Heads, SiteHeads, Where


@block
def freeze_attention(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    *,
    of: Steerer | JoinedSteerers | None = None,
    attention_mask: Tensor | None = None,
    prompt_lengths: PromptLengths | None = None,
    layers: Sequence[int] | None = None,
    heads: Heads | None = None,
) -> Iterator[None]:
    """Hold attention patterns at those of another pass over the same tokens, for a `with` block.

    By default the other pass is unsteered. What a steer does inside the block then does not go
    through queries and keys:

    >>> with freeze_attention(model, tokens), steerer.apply(model, prompt_lengths=9):
    ...     logits = model(tokens)

    The reverse patches in nothing but the patterns that the steer changes:

    >>> with freeze_attention(model, tokens, of=steerer, prompt_lengths=9):
    ...     logits = model(tokens)

    Args:
        model: a HookedTransformer or a TransformerBridge.
        tokens: prompt and response; the block takes forward passes over these tokens alone.
        of: the steerer whose patterns are held; None means the unsteered patterns.
        attention_mask: 0 where a column is padding, [batch pos], as the passes in the block get it.
        prompt_lengths: as of `Steerer.apply`, for `of`.
        layers: which layers are held; None means all.
        heads: which heads are held: the same in every layer, or by layer; None means all.

    Raises:
        TypeError: no model of TransformerLens.
        ValueError: the model is compiled, or steered already; a layer or head that there is not. In
            the block: a forward pass over other tokens, such as `generate` or a KV cache.

    Warns:
        SteeringWarning: it is never entered, or no forward pass ran in the block.

    Source: our choice. arXiv 2604.08524 freezes patterns to ask the same about refusal; it was not
    read.
    """
    check_eager(model)
    check_not_steered(model)
    chosen = Where(query_sites(model), layers=layers, heads=heads).chosen.values()
    held = {pattern_hook(at.site.layer): at for at in chosen}
    for name in held:
        check_hook_point(model, name)
    patterns: dict[str, Tensor] = {}

    def keep(pattern: Tensor, hook: Any, name: str) -> None:
        del hook  # its name differs between the backends
        patterns[name] = pattern.clone()

    steering = nullcontext() if of is None else of.apply(model, prompt_lengths=prompt_lengths)
    given = {} if attention_mask is None else {"attention_mask": attention_mask}
    hooks: list[tuple[str, Any]] = [(name, partial(keep, name=name)) for name in held]
    with torch.no_grad(), eval_mode(model), steering, model.hooks(fwd_hooks=hooks):
        model(tokens, **given)
    tracker = PositionTracker(model, [at.site.layer for at in chosen], keep_tokens=True)
    frozen = [(name, _held(at, patterns[name], tokens, tracker)) for name, at in held.items()]
    with tracker.attached(frozen):
        yield
    warn_unless_heard(tracker)


def _held(at: SiteHeads, kept: Tensor, tokens: Tensor, tracker: PositionTracker) -> Hook:
    def hold(pattern: Tensor, hook: Any) -> Tensor | None:
        del hook  # its name differs between the backends
        if tracker.positions is None:  # not in a pass of this model
            return None
        seen = tracker.tokens
        if pattern.shape != kept.shape or seen is None or not torch.equal(seen, tokens.to(seen)):
            raise ValueError(
                f"freeze_attention holds patterns of {list(tokens.shape)} tokens, got a forward "
                f"pass over {'others' if seen is None else list(seen.shape)}: in the block run "
                "model(tokens) with the same tokens, without generate and without a KV cache"
            )
        heads = torch.tensor(at.heads, device=pattern.device)
        return pattern.index_copy(1, heads, kept[:, heads])

    vars(hold)["steers_queries"] = True  # read by models.loading.check_not_steered
    return hold
