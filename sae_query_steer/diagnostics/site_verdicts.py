"""From what was measured of the sites to a word: steer here, or nothing to steer here."""

import math
from collections.abc import Hashable
from typing import Any

import pandas as pd
from scipy.stats import norm

from sae_query_steer.sites import ALL_HEADS

MIN_MOVED = 0.05
"""Least share of the next token's probability that queries of another class must shift, beyond
what queries of the own class do: below it not one token in twenty would come out differently, even
if a steer did all that real queries do. In probability and not in nats, because a divergence also
counts how unlikely the unlikely tokens are: at layer 3 of a tutor, queries of the same prompt with
another request bring the next token 0.3 nats nearer to what that prompt says, and 0.3 % of the
probability changes hands. Source: our choice."""

FALSE_ALARMS = 0.05
"""Chance that any of the sites passes by luck alone, however many there are (Bonferroni)."""


def site_verdicts(table: pd.DataFrame, *, n_sites: int | None = None) -> pd.DataFrame:
    """Return a table of sites with two columns more: whether to steer there, and why.

    Real queries of another class must do two things at a site before it makes sense to steer
    there. They must move the next token towards their class further than queries of the own class
    do, by more errors than luck explains over all the sites that were looked at. And that must be
    more than a trace: `MIN_MOVED` of the next token's probability. Where the table holds
    separability too, the latents must tell the classes apart, or there is no centroid to go to.

    The verdict is about one site at a time, at the span of the table and for the next token there:
    it can't see what only several layers together do, nor what shows only later in the text. A
    steer may do more than real queries do, at the price of leaving what the model knows.

    Args:
        table: what `interchange_effect` returned, alone or merged with that of `separability`.
        n_sites: over how many sites luck had its chance; None means the rows of the table.

    Returns:
        The table with `steer_here` and `verdict`, the reason in words and numbers.

    Raises:
        ValueError: the table has no rows, or columns are missing; or a number of sites below 1.

    Source: our choice.
    """
    needed = {"class_effect", "class_effect_se", "moved", "moved_control"}
    if missing := sorted(needed - set(table.columns)):
        raise ValueError(
            f"the table has no columns {missing}: give what interchange_effect returned, alone or "
            "merged with that of separability"
        )
    n_sites = len(table) if n_sites is None else n_sites
    if n_sites < 1:
        raise ValueError(f"n_sites={n_sites} is not allowed: give a table of one site or more")
    n_errors = float(norm.ppf(1 - FALSE_ALARMS / n_sites))
    judged = [_judged(row, n_errors) for row in table.to_dict("records")]
    return table.assign(
        steer_here=[steer for steer, _ in judged], verdict=[why for _, why in judged]
    )


def closing_sentence(table: pd.DataFrame) -> str:
    """Return the verdicts of all sites in a sentence or two.

    Sites come in the order of the probability that they move, not of their class effect: on three
    tutors a head that hardly changes a text had more of that than all heads together, which do.

    Args:
        table: what `site_verdicts` returned.
    """
    shifts = (table["moved"] - table["moved_control"]).fillna(-math.inf)
    order = table.assign(shift=shifts).sort_values("shift", ascending=False, kind="stable")
    good = pd.DataFrame(order[order["steer_here"]]).to_dict("records")
    if good:
        named = "; ".join(f"{_name(row)} ({row['shift']:.0%})" for row in good)
        return (
            f"Steer here: {named}. In brackets how much of the next token's probability real "
            "queries of another class move, beyond those of the own class."
        )
    best = order.iloc[0].to_dict()
    where = "this site" if len(table) == 1 else f"any of these {len(table)} sites"
    return (
        f"Nothing to steer at {where}. Most is moved at {_name(best)}, and there: "
        f"{best['verdict'].split(': ', 1)[1]}."
    )


def _judged(row: dict[Hashable, Any], n_errors: float) -> tuple[bool, str]:
    effect, error = row["class_effect"], row["class_effect_se"]
    said = f"class effect {effect:.3f} ± {error:.3f} nats"
    shift = row["moved"] - row["moved_control"]
    moved = (
        f"{row['moved']:.1%} of the next token's probability changes hands, "
        f"{row['moved_control']:.1%} with queries of the own class"
    )
    none = "nothing to steer here: "
    if not math.isfinite(error):
        return False, f"{none}{said}, too few examples for an error; give more"
    if not effect > n_errors * error:
        return False, f"{none}{said}, not above {n_errors:.1f} errors"
    if shift < MIN_MOVED:
        return False, f"{none}{said} is there, but a trace: {moved}"
    if "accuracy_latents" in row:
        accuracy, chance = row["accuracy_latents"], row["chance"]
        luck = n_errors * math.sqrt(chance * (1 - chance) / row["n_test"])
        if not accuracy > chance + luck:
            return False, (
                f"nothing to steer with here: {said}, {moved}, but the latents do not tell the "
                f"classes apart ({accuracy:.2f}, chance {chance:.2f}); train other SAEs"
            )
    return True, f"steer here: {said}, {moved}"


def _name(row: dict[Hashable, Any]) -> str:
    head = row.get("head", ALL_HEADS)
    return f"layer {row['layer']}" + ("" if head == ALL_HEADS else f", head {head}")
