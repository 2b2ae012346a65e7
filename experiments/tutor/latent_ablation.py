"""Do the latents that move most do the work? The steer without them, without others, by them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import fmean
from typing import Any, Literal

import numpy as np
import pandas as pd

from experiments.tutor.rowwise import rowwise
from sae_query_steer.compare.methods import Method
from sae_query_steer.descent.control import ExceptLatents, GivenLatents
from sae_query_steer.diagnostics.moved import ByHead, most_moved
from sae_query_steer.sae.encoders import encoder_sites
from sae_query_steer.steering.latent_descent import LatentGradientSteerer
from sae_query_steer.steering.latent_edit import partial_steerer
from sae_query_steer.steering.steerer import Steerer

Way = Literal["held", "taken out", "only"]
"""Held: the descent may not move them. Taken out: they move, and the query does not learn of it,
so that nothing makes up for them. Only: the descent may move no others."""

Which = Literal["top", "as many others", "as much of others"]
"""The m latents of each head that made most of the change; m others that move too, drawn at random;
or others, drawn at random, until they make as large a share of the change as the top m."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentAblation:
    """A steer in which some latents of each head are set apart, as a method."""

    way: Way
    """What is done with them."""

    which: Which
    """Which latents: the m that move most, or others that move too."""

    m: int
    """How many of each head; of "as much of others", whose share they are to reach."""

    seed: int | None
    """Of the draw of others; None where nothing is drawn."""

    latents: Mapping[str, ByHead]
    """The latents of each target."""

    share: float
    """How much of the whole steer's change they make: mean over targets and heads."""

    method: Method
    """The method, over cases that have a target, at the last prompt token."""


def latent_ablations(
    steerers: Mapping[str, LatentGradientSteerer],
    moved: pd.DataFrame,
    *,
    ms: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: Sequence[int] = (0, 1, 2),
    ways: Sequence[Way] = ("held", "taken out", "only"),
    others: Sequence[Which] = ("as many others", "as much of others"),
) -> list[LatentAblation]:
    """Return steers without the latents that move most, without random others, and by them alone.

    The others are drawn among the latents that the steer moves too: to hold what does not move
    would be no ablation. As many others make less of the change, for else they would be the top
    ones; so there is a second control, in which they make as much of it. Where nothing but the top
    ones moves there are no others, and no control.

    Args:
        steerers: one for each target, all of the same sites and heads, scope the last prompt token.
        moved: what `moved_latents` says of each of them, joined; of other prompts than the cases.
        ms: how many latents of each head are set apart.
        seeds: of the draws.
        ways: what is done with the latents.
        others: the controls.

    Raises:
        ValueError: a target of which the table says nothing, an m below 1, or a steerer that
            chooses latents already.

    Source: our choice.
    """
    for target, steerer in steerers.items():
        if steerer.latents is not None:
            raise ValueError(
                f"the steerer towards {target} has latents={steerer.latents!r}: give one that may "
                "move them all"
            )
    ablations = []
    for way in ways:
        for m in ms:
            top = {target: most_moved(moved, m, target=target) for target in steerers}
            ablations.append(_ablation(way, "top", m, None, steerers, top, moved))
            for which, seed in product(others, seeds):
                much = which == "as much of others"
                drawn = {
                    target: _others(moved, target, latents, m, seed, much=much)
                    for target, latents in top.items()
                }
                if any(
                    some
                    for names in drawn.values()
                    for heads in names.values()
                    for some in heads.values()
                ):
                    ablations.append(_ablation(way, which, m, seed, steerers, drawn, moved))
    return ablations


def _ablation(
    way: Way,
    which: Which,
    m: int,
    seed: int | None,
    steerers: Mapping[str, LatentGradientSteerer],
    latents: Mapping[str, ByHead],
    moved: pd.DataFrame,
) -> LatentAblation:
    first = next(iter(steerers.values()))
    made = {target: _without(way, own, latents[target]) for target, own in steerers.items()}
    drawn = "" if seed is None else f", seed {seed}"

    def steerer(cases: Sequence[Any], strength: float) -> Steerer:
        del strength
        return rowwise([made[case.target] for case in cases])

    return LatentAblation(
        way=way,
        which=which,
        m=m,
        seed=seed,
        latents=latents,
        share=_share(moved, latents),
        method=Method(
            name=f"m={m}: {which} {way}{drawn}",
            objective=repr(first.objective),
            layers=tuple(site.layer for site in encoder_sites(first.saes).values()),
            n_steps=first.n_steps if isinstance(first.n_steps, int) else None,
            scope="last prompt token",
            steerer=steerer,
        ),
    )


def _without(way: Way, steerer: LatentGradientSteerer, latents: ByHead) -> Steerer:
    match way:
        case "held":
            return replace(steerer, latents=ExceptLatents(latents))
        case "only":
            return replace(steerer, latents=GivenLatents(latents))
        case "taken out":
            return partial_steerer(steerer, latents=ExceptLatents(latents))


def _others(
    moved: pd.DataFrame, target: str, latents: ByHead, m: int, seed: int, *, much: bool
) -> ByHead:
    """Return others than some latents of each head: m, or as many as make as large a share.

    Fewer where no more move.
    """
    drawn: ByHead = {}
    for name, heads in latents.items():
        for head, some in heads.items():
            shares = _shares(moved, target, name, head)
            rest = shares.drop(some).sort_index()
            key = [seed, m, head, *f"{target} {name}".encode()]
            rest = rest.iloc[np.random.default_rng(key).permutation(len(rest))]
            n = 1 + int((rest.cumsum() < shares[some].sum()).sum()) if much else m
            drawn.setdefault(name, {})[head] = rest.index[:n].tolist()
    return drawn


def _share(moved: pd.DataFrame, latents: Mapping[str, ByHead]) -> float:
    return fmean(
        float(_shares(moved, target, name, head)[some].sum())
        for target, names in latents.items()
        for name, heads in names.items()
        for head, some in heads.items()
    )


def _shares(moved: pd.DataFrame, target: str, name: str, head: int) -> pd.Series:
    """Return the shares of a head's latents, by latent."""
    here = (moved["target"] == str(target)) & (moved["hook_name"] == name) & (moved["head"] == head)
    return pd.Series(moved.loc[here].set_index("latent")["share"])
