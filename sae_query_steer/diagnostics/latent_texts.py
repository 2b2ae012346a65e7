"""The tokens at which latents are most active, for all latents in one pass over the texts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.arguments import check_number
from sae_query_steer.data.batches import PAD, row_batches
from sae_query_steer.data.prompts import tokenizer_of
from sae_query_steer.data.token_rows import Texts, token_rows
from sae_query_steer.models.activations import check_finite, read_activations
from sae_query_steer.models.loading import check_not_steered
from sae_query_steer.sae.encoders import QueryEncoder, at_heads, device_of, encoder_sites
from sae_query_steer.steering.where import chosen_heads
from sae_query_steer.targets.fingerprint import check_devices


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
    """Tokens that were read, without BOS."""

    bos: int
    """Id of the BOS token; -1 if there is none."""

    tokenizer: Any
    """Turns ids into text."""

    def table(
        self,
        hook_name: str,
        head: int,
        latents: Sequence[int] | None = None,
        *,
        context: int = 10,
    ) -> pd.DataFrame:
        """Return the top tokens of latents of a head, with the text on both sides.

        Args:
            hook_name: the site.
            head: the head.
            latents: which, in this order; None means all that fire.
            context: tokens of text on either side, without the row's BOS.

        Returns:
            A row for each latent and token, the most active first, with hook_name, head, latent,
            rank (from 1), activation, frequency (share of all tokens at which the latent fires),
            row and position of the token (absolute; BOS counts), token (its id), left, text,
            right. left + text + right is the text as it is there. A latent that never fires has
            no rows.

        Raises:
            ValueError: a site, head or latent that was not read.
        """
        if head not in self.heads.get(hook_name, ()):
            raise ValueError(f"head {head} at {hook_name} was not read: there are {self.heads}")
        check_number("context", context, whole=True, least=0)
        place = self.heads[hook_name].index(head)
        activations, places = self.activations[hook_name][place], self.places[hook_name][place]
        fired, width = self.n_fired[hook_name][place].double(), self.rows.shape[1]
        chosen = torch.arange(len(fired)) if latents is None else torch.tensor(latents).long()
        for latent in chosen[(chosen < 0) | (chosen >= len(fired))].tolist():
            raise ValueError(
                f"no latent {latent} at {hook_name} head {head}: they are 0 to {len(fired) - 1}"
            )
        index, rank = (activations[chosen] > 0).nonzero(as_tuple=True)
        latent = chosen[index]
        row, position = places[latent, rank] // width, places[latent, rank] % width
        spots = zip(row.tolist(), position.tolist(), strict=True)
        around = [self._around(self.rows[r], p, context) for r, p in spots]
        columns = {
            "latent": latent,
            "rank": rank + 1,
            "activation": activations[latent, rank].double(),
            "frequency": fired[latent] / max(1, self.n_tokens),
            "row": row,
            "position": position,
            "token": self.rows[row, position],
        }
        numbers = {name: values.numpy() for name, values in columns.items()}
        table = pd.DataFrame({"hook_name": hook_name, "head": head, **numbers})
        texts = pd.DataFrame(around, columns=["left", "text", "right"], dtype=object)
        return pd.concat([table, texts], axis=1)

    def _around(self, row: Tensor, at: int, context: int) -> tuple[str, str, str]:
        """Return the text before a token, its own and the text after it.

        A token decoded alone can differ from its part of the text: its leading space is lost, or it
        is part of a character. So the pieces are differences of longer and longer decoded texts.
        """
        ids = row[row != PAD].tolist()
        first = max(int(ids[0] == self.bos), at - context)
        left, upto, whole = (
            self.tokenizer.decode(ids[first:end], clean_up_tokenization_spaces=False)
            for end in (at, at + 1, at + 1 + context)
        )
        text_from = len(commonprefix([left, upto]))
        right_from = max(text_from, len(commonprefix([upto, whole])))
        return whole[:text_from], whole[text_from:right_from], whole[right_from:]


@torch.no_grad()
def top_tokens(
    model: Any,
    saes: Mapping[str, QueryEncoder],
    texts: Texts,
    *,
    k: int = 10,
    heads: Sequence[int] | Mapping[int, Sequence[int]] | None = None,
    n_tokens: int | None = None,
    batch_size: int = 16,
    **reading: Any,
) -> TopTokens:
    """Return the k tokens at which each latent of each head is most active, in one pass.

    Memory grows with latents times k, not with the texts (whose ids are kept, 32 bits a token). Of
    tokens with equal activations the earlier counts as the more active. BOS is left out: it has the
    same activations at the start of every text.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        saes: encoders by hook name.
        texts: in any form that `token_rows` takes.
        k: tokens of each latent, 1 or more.
        heads: which heads: the same in each layer, or by layer; None means all.
        n_tokens: about how many tokens to read, in whole rows; None means all.
        batch_size: rows of one forward pass.
        reading: options of `token_rows`; by default every text stays whole.

    Returns:
        The tokens, on the CPU; `table` shows them with the text around them.

    Raises:
        ValueError: a number below 1, a site, head or layer that does not exist, unusable texts, an
            SAE on another device, a query that is not finite, or a model that is being steered.
    """
    for name, value in (("k", k), ("batch_size", batch_size), ("n_tokens", n_tokens)):
        check_number(name, 1 if value is None else value, whole=True, least=1)
    sites = encoder_sites(saes)
    for site in sites.values():
        site.check(model)
    picked = chosen_heads(sites, None, heads)
    check_devices(model, saes)
    check_not_steered(model)
    tokenizer: Any = tokenizer_of(model)
    reading.setdefault("concat_sequences", False)
    if not reading["concat_sequences"] and reading.get("context_size") is None:
        reading["context_size"] = int(model.cfg.n_ctx)
    rows = token_rows(model, texts, n_tokens=n_tokens, **reading)
    if n_tokens is not None:
        rows = rows[: max(1, n_tokens // rows.shape[1])]
    rows = rows.long()
    bos = -1 if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
    found = {name: _TopK((len(own), saes[name].d_latent), k) for name, own in picked.items()}
    for row, latents, _ in latents_by_row(
        model, saes, picked, rows, skip=bos, batch_size=batch_size
    ):
        for name, own in latents.items():
            found[name].update(own, row * rows.shape[1])
    return TopTokens(
        rows=rows,
        heads=picked,
        activations={name: top.values.cpu() for name, top in found.items()},
        places={name: top.places.cpu() for name, top in found.items()},
        n_fired={name: top.n_fired.cpu() for name, top in found.items()},
        n_tokens=int(((rows != PAD) & (rows != bos)).sum()),
        bos=bos,
        tokenizer=tokenizer,
    )


def latents_by_row(
    model: Any,
    saes: Mapping[str, QueryEncoder],
    heads: Mapping[str, Sequence[int]],
    rows: Int[Tensor, "row pos"],
    *,
    skip: int,
    batch_size: int,
    also: Sequence[str] = (),
) -> Iterator[tuple[int, dict[str, Float[Tensor, "pos head d_latent"]], dict[str, Tensor]]]:
    """Yield of each row its index, its latents above 0 by hook name, and other activations.

    Args:
        model: the model.
        saes: encoders by hook name.
        heads: which heads, by hook name.
        rows: token ids, padded with -1; padding is not in the result.
        skip: id of the token whose latents are given as 0.
        batch_size: rows of a forward pass.
        also: further hook points to read.
    """
    encoders = {
        name: at_heads(saes[name], own, device_of(saes[name]) or "cpu")
        for name, own in heads.items()
    }
    for start, tokens, real in row_batches(rows, batch_size, "Reading latents"):
        found = read_activations(model, tokens, [*heads, *also])
        for i, length in enumerate(real.sum(1).tolist()):
            counted, latents = tokens[i, :length] != skip, {}
            for name, encoder in encoders.items():
                queries = found[name][i, :length, list(heads[name])]
                check_finite(queries, name)
                z = encoder.encode(queries.to(device_of(encoder) or "cpu")).float().relu()
                latents[name] = z * counted[:, None, None].to(z.device)
            yield start + i, latents, {name: found[name][i, :length] for name in also}


class _TopK:
    """The k largest activations above 0 so far of every latent of some heads of a site."""

    def __init__(self, shape: tuple[int, int], k: int) -> None:
        self.values = torch.zeros(*shape, k)
        self.places = torch.full((*shape, k), -1)
        self.n_fired = torch.zeros(shape, dtype=torch.long)

    def update(self, latents: Float[Tensor, "pos head d_latent"], first: int) -> None:
        """Merge the latents of a row whose first token has the place `first`."""
        k, latents = self.values.shape[-1], latents.to(self.values.device)
        self.n_fired += (latents > 0).sum(0)
        larger = (latents > self.values[..., -1]).any(0)
        new = latents[:, larger].T
        values = torch.cat([self.values[larger], new], dim=1)
        places = torch.arange(first, first + len(latents), device=new.device).expand(len(new), -1)
        places = torch.cat([self.places[larger], places], dim=1)
        # Stable, and kept tokens come first: of equals the earlier is kept.
        order = values.argsort(dim=1, descending=True, stable=True)[:, :k]
        self.values[larger], self.places[larger] = values.gather(1, order), places.gather(1, order)
