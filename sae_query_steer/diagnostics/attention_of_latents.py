"""The attention that single latents of a steer cause."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from sae_query_steer.descent.control import ExceptLatents, GivenLatents
from sae_query_steer.steering.latent_descent import LatentGradientSteerer
from sae_query_steer.steering.partial import partial_steerer


def latent_attention(
    model: Any,
    steerer: LatentGradientSteerer,
    prompts: Sequence[str],
    latents: Mapping[str, Mapping[int, Sequence[int]]],
    *,
    without: bool = False,
    max_new_tokens: int = 1,
) -> pd.DataFrame:
    """Return where attention goes if only some latents move, or all but these, as they are steered.

    Each latent moves as the whole steer moves it, or stays where it was, by a `partial_steerer`.
    Attention is no sum of what single latents cause: where another token holds nearly all of it, a
    latent alone may change little, and the whole steer still need it. So look from both sides.
    The heads of one layer do not affect each other, so one call shows a latent of every head.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        steerer: what moves the latents.
        prompts: texts to steer, in one batch; one for each row where the steerer tells rows apart.
        latents: by hook name and head, as `most_moved` gives them; the table has these heads alone.
        without: move all others, and these not.
        max_new_tokens: tokens to write after each prompt, for scopes that reach into the response;
            the last of them is not read, so 1 is enough for the prompt.

    Returns:
        As of `SteeringTrace.attention_change`, a row for each steered token, head and token that it
        can look at, with attention_before, attention_after and change.

    Raises:
        ValueError: no latents, a latent that there is not, or no prompt.

    Source: our choice.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts must be a list of one text or more, got {prompts!r}")
    given = GivenLatents(latents)  # refuses to name none
    chosen = ExceptLatents(latents) if without else given
    with partial_steerer(steerer, latents=chosen).apply(model, record_attention=True) as trace:
        model.generate(
            list(prompts),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
        )
    table = trace.attention_change(model)
    sites = steerer.where.chosen
    named = [
        (sites[n].site.layer, head) for n, own in latents.items() if n in sites for head in own
    ]
    return table[table.set_index(["layer", "head"]).index.isin(named)].reset_index(drop=True)
