"""Which latents did it: how far a steer moved each, its share, and the attention it caused."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.arguments import check_kind, check_number
from sae_query_steer.descent.control import ExceptLatents, GivenLatents
from sae_query_steer.sae.core import QueryHeadSAE
from sae_query_steer.sae.encoders import IdentityEncoder, QueryEncoder, device_of, in_32_bits
from sae_query_steer.steering.latent_descent import (
    LatentDescent,
    LatentGradientSteerer,
    LatentMove,
)
from sae_query_steer.steering.latent_edit import partial_steerer
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.trace import SteeringTrace, TraceRecord
from sae_query_steer.steering.where import SiteHeads

ByHead = dict[str, dict[int, list[int]]]
"""Latents by hook name and head, as `GivenLatents` and `ExceptLatents` take them."""


def moved_latents(steerer: Steerer, trace: SteeringTrace) -> pd.DataFrame:
    """Return which latents a steer moved, those that made most of its change first.

    The descents of the trace are run again on the queries that it recorded. A position that is
    computed again, as in every step of `generate` without a KV cache, counts once.

    With dz_i how far latent i of a head moved at a token, w_i its decoder row and
    dq = sum_i dz_i w_i the change of the query (before `max_relative_change` or `keep_norm`
    shorten it), summed over tokens t:

        share_i      = sum_t |dz_i| ||w_i|| / sum_t sum_j |dz_j| ||w_j||
        projection_i = sum_t dz_i <w_i, dq> / sum_t ||dq||^2

    Both sum to 1 over the latents of a head. A share tells how much a latent moved the query, be it
    with the others or against them; a projection, what of the sum is its work, below 0 where
    it led back. Where decoder rows overlap the two differ.

    Args:
        steerer: the one that made the trace.
        trace: of `with steerer.apply(model, record=True) as trace`.

    Returns:
        A row for each latent that moved, by site, head and target, with the columns hook_name,
        layer, head, target; rank (from 1, by share), latent, share, projection; moved (share of
        the tokens at which it moved), change, before and after (means over the tokens, in units of
        the latent), centroid (where the target lies; NaN where the target's weights do not sum to
        more than 0), n_tokens. A head of which nothing moved has none.

    Raises:
        TypeError: an encoder without decoder rows.
        ValueError: the trace was not recorded, holds no token, or is that of another steerer.

    Source: our choice.
    """
    check_kind("steerer", steerer, Steerer, "give moved_latents(steerer, trace)")
    check_kind("trace", trace, SteeringTrace, "give moved_latents(steerer, trace)")
    if not trace.recording or not trace.records:
        raise ValueError(
            "the trace holds no steered token: use `with steerer.apply(model, record=True) as "
            "trace`, and call model.generate inside the block"
        )
    edit = steerer.edit
    if not isinstance(edit, LatentDescent):
        raise TypeError(
            f"the edit of the steerer must move latents, got {type(edit).__name__}: give a "
            "LatentGradientSteerer or a partial_steerer"
        )
    at_layer = {at.site.layer: at for at in steerer.where.chosen.values()}
    sums: dict[tuple[str, str], dict[str, Tensor]] = {}
    seen: set[tuple[int, int, int, int]] = set()
    for record in trace.records:
        move, at = _again(edit, at_layer.get(record.layer), record)
        weights = decoder_rows(edit.saes[at.hook_name], at.heads)
        for target, tokens in _new_tokens(trace, record, seen).items():
            parts = _sums(move, weights, tokens)
            before = sums.get((at.hook_name, str(target)), {})
            sums[at.hook_name, str(target)] = {k: v + before.get(k, 0) for k, v in parts.items()}
    table = pd.concat(
        [_table(own, target, steerer.where.chosen[name]) for (name, target), own in sums.items()]
    )
    keys = ["layer", "head", "target"]
    table = table[table["moved"] > 0].sort_values(
        [*keys, "share"], ascending=[True, True, True, False], kind="stable", ignore_index=True
    )
    table.insert(4, "rank", table.groupby(keys).cumcount() + 1)
    return table


def most_moved(table: pd.DataFrame, m: int, *, target: str | None = None) -> ByHead:
    """Return the m latents of each head that made most of a steer's change.

    Args:
        table: of `moved_latents`.
        m: of each head, 1 or more; a head of which fewer moved gives these.
        target: whose rows; needed where the table has several.

    Returns:
        The latents by hook name and head, as `GivenLatents` and `ExceptLatents` take them.

    Raises:
        ValueError: m below 1, a target that the table does not have, or several and none named.
    """
    check_kind("table", table, pd.DataFrame, "give what moved_latents returns")
    check_number("m", m, whole=True, least=1)
    targets = table["target"].unique().tolist()
    if target is None and len(targets) > 1:
        raise ValueError(f"the table has the targets {targets}: name one with target")
    if target is not None and str(target) not in targets:
        raise ValueError(f"the table has no target {str(target)!r}: it has {targets}")
    own = table["target"] == str(targets[0] if target is None else target)
    chosen: ByHead = {}
    rows = table[own & (table["rank"] <= m)].sort_values("rank")
    for name, head, latent in rows[["hook_name", "head", "latent"]].to_numpy().tolist():
        chosen.setdefault(name, {}).setdefault(head, []).append(latent)
    return chosen


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


def decoder_rows(
    encoder: QueryEncoder, heads: Sequence[int]
) -> Float[Tensor, "head d_latent d_head"]:
    """Return what one unit of each latent of some heads adds to the query.

    Raises:
        TypeError: an encoder without decoder rows.
    """
    if isinstance(encoder, QueryHeadSAE):
        return encoder.W_dec.detach()[list(heads)]
    if isinstance(encoder, IdentityEncoder):
        return torch.eye(encoder.d_head).expand(len(heads), -1, -1)
    raise TypeError(
        f"the encoder is a {type(encoder).__name__}: only query-head SAEs and IdentityEncoder have "
        "decoder rows"
    )


def _again(
    edit: LatentDescent, at: SiteHeads | None, record: TraceRecord
) -> tuple[LatentMove, SiteHeads]:
    """Return the move of a record; raise if this steerer would have made another change."""
    if record.query is not None and at is not None:
        query = record.query.to(device_of(edit.saes[at.hook_name]) or record.query.device)
        query = in_32_bits(query)
        if tuple(record.heads.tolist()) == at.heads:
            move = edit.descended(query, at, record.places)
            delta = edit.decoded(query, at, move).detach().cpu()
            recorded = record.change.delta
            if float((delta - recorded).norm()) <= 1e-3 * float(recorded.norm()):
                return move, at
    raise ValueError(
        f"the trace is that of another steerer: at layer {record.layer} this one would have "
        "changed the queries otherwise; give the steerer that was applied"
    )


def _new_tokens(
    trace: SteeringTrace, record: TraceRecord, seen: set[tuple[int, int, int, int]]
) -> dict[str, list[int]]:
    """Return by target the tokens of a record that were not seen before, and note them."""
    tokens: dict[str, list[int]] = {}
    pairs = zip(record.places.row.tolist(), record.places.position.tolist(), strict=True)
    for index, (row, position) in enumerate(pairs):
        key = (record.run, record.layer, row, position)
        if key not in seen:
            seen.add(key)
            target = trace.row_targets[row] if trace.row_targets else trace.target
            tokens.setdefault(target, []).append(index)
    return tokens


@torch.no_grad()
def _sums(
    move: LatentMove, weights: Float[Tensor, "head d_latent d_head"], tokens: list[int]
) -> dict[str, Tensor]:
    """Return sums over tokens of what `_table` needs, [head d_latent] or one number a head."""
    before, after = move.before[tokens].double(), move.after[tokens].double()
    weights = weights.to(before)
    change = after - before
    whole = torch.einsum("thi,hid->thd", change, weights)
    led = torch.einsum("thd,hid->thi", whole, weights) * change
    point = torch.where(move.goal.total > 0, move.goal.point, torch.nan).double()
    parts = {
        "length": change.abs() * weights.norm(dim=-1),
        "led": led,
        "square": whole.square().sum(-1, keepdim=True),
        "moved": (change != 0).double(),
        "change": change,
        "before": before,
        "after": after,
        "centroid": point[tokens] if point.ndim == 3 else point.expand_as(before),
    }
    sums = {name: part.sum(0).cpu() for name, part in parts.items()}
    return sums | {"n_tokens": torch.tensor(len(tokens))}


def _table(sums: dict[str, Tensor], target: str, at: SiteHeads) -> pd.DataFrame:
    length, n_tokens = sums["length"].sum(-1, keepdim=True), int(sums["n_tokens"])
    columns = {
        "share": torch.where(length > 0, sums["length"] / length, 0.0),
        "projection": torch.where(sums["square"] > 0, sums["led"] / sums["square"], 0.0),
        **{key: sums[key] / n_tokens for key in ("moved", "change", "before", "after", "centroid")},
    }
    index = pd.MultiIndex.from_product(
        [[at.hook_name], [at.site.layer], at.heads, [target], range(sums["moved"].shape[-1])],
        names=["hook_name", "layer", "head", "target", "latent"],
    )
    table = pd.DataFrame({name: v.flatten().numpy() for name, v in columns.items()}, index=index)
    return table.reset_index().assign(n_tokens=n_tokens)
