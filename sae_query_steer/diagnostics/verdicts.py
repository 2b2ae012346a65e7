"""Decide at which sites to steer, from the interchange effect, separability and reach."""

import math
from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

from sae_query_steer.sites import ALL_HEADS

MIN_MOVED = 0.05
"""Smallest total variation of the next token, beyond that of the control, to steer at a site.

In probability and not in nats, because a divergence also counts how unlikely the unlikely tokens
are: at layer 3 of a tutor, queries of the same prompt with another request bring the next token 0.3
nats nearer to that prompt's, with a total variation of 0.3 %. Source: our choice."""

MIN_REACH = 0.3
"""Smallest share of the divergence that a learned move must remove, to steer at a site. Source: our
choice: of SmolLM2's layers, the two that steer a text alone had 0.31 and 0.45, four others 0.15 to
0.29."""

FALSE_ALARMS = 0.05
"""Probability that any of the sites passes by chance (Bonferroni over the sites)."""


def site_verdicts(table: pd.DataFrame, *, n_sites: int | None = None) -> pd.DataFrame:
    """Return a table of sites with two more columns: whether to steer there, and why.

    A site passes if queries of another class move the next token towards their class further than
    queries of the own class, significantly over all sites, and by at least `MIN_MOVED` of its
    probability. If the table has separability, the latents must also separate the classes. If it
    has `reach`, a site passes too where a learned move removes more than `MIN_REACH`, and by 0.05
    more than `reach_control` if that is there, significantly over all sites where the standard
    errors are there. What the measures can tell, and cannot:

    - the interchange effect: what real queries of the class do. A steerer can do more, so a small
      one rules out nothing that is learned.
    - separability: whether latents tell the classes apart, and not whether the model uses it.
    - `reach`: what the best constant change found within a budget does, a guide to learned targets.
      It says nothing about centroids. `reach_control` is what the moves of other classes do.

    A verdict is about one site at a time, at the span of the table: it does not see the joint
    effect of several layers, nor what appears only later in the text.

    Args:
        table: of `interchange_effect`, alone or merged with those of `separability` and `reach` by
            layer and head.
        n_sites: number of sites that were tested; None means the rows of the table.

    Returns:
        The table with `steer_here` and `verdict`, the first reason in at most 48 characters, which
        pandas prints whole. A site without a standard error has no verdict: add examples. Where the
        latents do not separate the classes, train other SAEs.

    Raises:
        ValueError: missing columns, or no sites.
    """
    needed = {"class_effect", "class_effect_se", "moved", "moved_control"}
    if missing := sorted(needed - set(table.columns)):
        raise ValueError(
            f"table must have the columns of interchange_effect, {missing} are missing"
        )
    n_sites = len(table) if n_sites is None else n_sites
    if n_sites < 1:
        raise ValueError(f"n_sites must be 1 or more, got {n_sites}")
    n_errors = float(norm.ppf(1 - FALSE_ALARMS / n_sites))
    judged = [_judged(row, n_errors) for row in table.to_dict("records")]
    return table.assign(
        steer_here=[steer for steer, _ in judged], verdict=[why for _, why in judged]
    )


def closing_sentence(table: pd.DataFrame) -> str:
    """Return the verdicts of `site_verdicts` as a sentence, ranked by total variation.

    By total variation and not by class effect: on three tutors a head that hardly changed a text
    had a larger class effect than all heads together.
    """
    shifts = (table["moved"] - table["moved_control"]).fillna(-math.inf)
    order = table.assign(shift=shifts).sort_values("shift", ascending=False, kind="stable")
    good = pd.DataFrame(order[order["steer_here"]]).to_dict("records")
    if good:
        shown, also = "({shift:.0%})", ""
        if "reach" in table:
            shown, also = "({shift:.0%}, {reach:.0%})", ", and reach"
        named = "; ".join(
            f"{_name(row)} {shown.format(shift=row['shift'], reach=row.get('reach'))}"
            for row in good
        )
        return (
            f"Steer here: {named}. In brackets: total variation beyond that of the control{also}."
        )
    where = "this site" if len(table) == 1 else f"any of these {len(table)} sites"
    if not np.isfinite(table["class_effect_se"]).any():
        return f"No verdict at {where}: too few examples for a standard error. Add examples."
    best = order.iloc[0].to_dict()
    numbers = (
        f"class effect {best['class_effect']:.3f} ± {best['class_effect_se']:.3f} nats, total "
        f"variation {best['moved']:.1%}, control {best['moved_control']:.1%}"
    )
    if "accuracy_latents" in best:
        numbers += f", separability {best['accuracy_latents']:.2f}, chance {best['chance']:.2f}"
    reason = best["verdict"].split(": ", 1)[1]
    return (
        f"Nothing to steer at {where}. Largest total variation at {_name(best)}: {reason} "
        f"({numbers})."
    )


def _judged(row: dict[Hashable, Any], n_errors: float) -> tuple[bool, str]:
    steer, why = _judged_by_queries(row, n_errors)
    removed, shared = row.get("reach", 0.0), row.get("reach_control", 0.0)
    error = row.get("reach_control_se", row.get("reach_se", 0.0))
    own = removed - shared > max(MIN_MOVED, n_errors * error)
    if not steer and removed > MIN_REACH and own:
        return True, f"steer here: a learned move removes {removed:.0%}"
    return steer, why


def _judged_by_queries(row: dict[Hashable, Any], n_errors: float) -> tuple[bool, str]:
    effect, error = row["class_effect"], row["class_effect_se"]
    beyond, none = row["moved"] - row["moved_control"], "nothing to steer here"
    if not math.isfinite(error):
        return False, "no verdict: too few examples"
    if not effect > n_errors * error:
        return False, f"{none}: class effect < {n_errors:.1f} s.e."
    if beyond < MIN_MOVED:
        return False, f"{none}: moves less than {MIN_MOVED:.0%}"
    if "accuracy_latents" in row:
        accuracy, chance = row["accuracy_latents"], row["chance"]
        # The lower end of Wilson's interval is above chance.
        if not accuracy > chance + n_errors * math.sqrt(chance * (1 - chance) / row["n_test"]):
            return False, f"{none}: latents do not separate"
    return True, f"steer here: moves {beyond:.0%} more than the control"


def _name(row: dict[Hashable, Any]) -> str:
    head = row.get("head", ALL_HEADS)
    return f"layer {row['layer']}" + ("" if head == ALL_HEADS else f", head {head}")
