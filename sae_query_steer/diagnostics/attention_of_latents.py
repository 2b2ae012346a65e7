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
    latent alone may change nothing that shows, and the same latent may be what the whole steer
    can't do without. So look from both sides. The heads of one layer know
    nothing of each other: where a single layer is steered, one call tells of a latent of every
    head at once. Of several layers the later ones read what the earlier ones made.

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
        raise ValueError(f"prompts={prompts!r} is not allowed: give a list of one text or more")
    given = GivenLatents(latents)  # refuses to name none
    chosen = ExceptLatents(latents) if without else given
    part = partial_steerer(steerer, latents=chosen)
    with part.apply(model, record_attention=True) as trace:
        model.generate(
            list(prompts),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
        )
    table = trace.attention_change(model)
    named = [
        (table["layer"] == steerer.where.chosen[name].site.layer) & table["head"].isin(list(heads))
        for name, heads in latents.items()
        if name in steerer.where.chosen
    ]
    return table.loc[pd.concat(named, axis=1).any(axis=1)].reset_index(drop=True)
