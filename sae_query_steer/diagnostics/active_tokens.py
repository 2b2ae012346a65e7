"""`TopTokens`: the tokens at which each latent is most active, with the text around them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.data.batches import PAD


@dataclass(frozen=True, kw_only=True, eq=False)
class TopTokens:
    """The k tokens at which each latent of some heads is most active, in texts that are kept."""

    rows: Int[Tensor, "row pos"]
    """The texts' token ids, one text a row, -1 after its end."""

    heads: Mapping[str, tuple[int, ...]]
    """The heads, by hook name."""

    activations: Mapping[str, Float[Tensor, "head d_latent k"]]
    """By hook name, largest first; 0 where a latent fires at fewer than k tokens."""

    places: Mapping[str, Int[Tensor, "head d_latent k"]]
    """Where: row * rows.shape[1] + position; -1 where the activation is 0."""

    n_fired: Mapping[str, Int[Tensor, "head d_latent"]]
    """At how many of the tokens each latent fires."""

    n_tokens: int
    """Tokens that were looked at."""

    tokenizer: Any
    """Turns ids into text."""

    def table(
        self,
        hook_name: str,
        head: int,
        latents: Sequence[int] | None = None,
        *,
        k: int | None = None,
        context: int = 10,
    ) -> pd.DataFrame:
        """Return the top tokens of latents of a head, with the text on both sides.

        Args:
            hook_name: the site.
            head: the head.
            latents: which, in this order; None means all that fire.
            k: tokens of each latent; None means all that are kept.
            context: tokens of text on either side, without the row's BOS.

        Returns:
            A row for each latent and token, the most active first, with hook_name, head, latent,
            rank (from 1), activation, frequency (share of all tokens at which the latent fires),
            row and position of the token (absolute; BOS counts), token (its id), left, text,
            right. left + text + right is the text as it is there. A latent that never fires has
            no rows.

        Raises:
            ValueError: a site, head or latent that was not read, or a number out of range.
        """
        if hook_name not in self.heads or head not in self.heads[hook_name]:
            raise ValueError(
                f"head {head} at {hook_name} was not read: there are "
                f"{ {name: list(heads) for name, heads in self.heads.items()} }"
            )
        kept = self.activations[hook_name].shape[-1]
        k = kept if k is None else k
        if not 1 <= k <= kept or context < 0:
            raise ValueError(
                f"k must be 1 to {kept} and context 0 or more, got k={k} and context={context}"
            )
        place = self.heads[hook_name].index(head)
        activations = self.activations[hook_name][place, :, :k]
        d_latent = len(activations)
        chosen = list(range(d_latent)) if latents is None else list(latents)
        for latent in chosen:
            if not 0 <= latent < d_latent:
                raise ValueError(
                    f"no latent {latent} at {hook_name} head {head}: the latents are 0 to "
                    f"{d_latent - 1}"
                )
        activations = activations[chosen]
        index, rank = (activations > 0).nonzero(as_tuple=True)
        where = self.places[hook_name][place, chosen][index, rank]
        row, position = where // self.rows.shape[1], where % self.rows.shape[1]
        latent = torch.tensor(chosen, dtype=torch.long)[index]
        fired = self.n_fired[hook_name][place, latent].double()
        spots = zip(row.tolist(), position.tolist(), strict=True)
        around = [_around(self.tokenizer, self.rows[r], p, context) for r, p in spots]
        return pd.DataFrame(
            {
                "hook_name": hook_name,
                "head": head,
                "latent": latent.numpy(),
                "rank": rank.numpy() + 1,
                "activation": activations[index, rank].double().numpy(),
                "frequency": (fired / max(1, self.n_tokens)).numpy(),
                "row": row.numpy(),
                "position": position.numpy(),
                "token": self.rows[row, position].numpy(),
                **{
                    name: pd.Series([texts[i] for texts in around], dtype=object)
                    for i, name in enumerate(("left", "text", "right"))
                },
            }
        )


def _around(tokenizer: Any, row: Tensor, at: int, context: int) -> tuple[str, str, str]:
    """Return the text before a token, its own and the text after it.

    A token decoded alone can differ from its part of the text: its leading space is lost, or it is
    part of a character. So the pieces are differences of longer and longer decoded texts.
    """
    ids = row[row != PAD].tolist()
    begins = 1 if ids[0] == tokenizer.bos_token_id and at > 0 else 0
    first = max(begins, at - context)
    ends = (at, at + 1, at + 1 + context)
    pieces = [tokenizer.decode(ids[first:end], clean_up_tokenization_spaces=False) for end in ends]
    left, upto, whole = pieces
    text_from = len(commonprefix([left, upto]))
    right_from = max(text_from, len(commonprefix([upto, whole])))
    return whole[:text_from], whole[text_from:right_from], whole[right_from:]
