"""Reach: the effect of the best constant change of queries that is found within a budget."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.arguments import check_number
from sae_query_steer.data.examples import ordered_classes
from sae_query_steer.data.tokenized import TokenizedExamples, check_tokenized
from sae_query_steer.descent.objectives import FixedMove
from sae_query_steer.diagnostics.patches import check_other_class
from sae_query_steer.learning.learner import TargetLearner, no_moves
from sae_query_steer.learning.rows import LearningRows, check_counterparts, frozen, split_rows
from sae_query_steer.learning.run import LearningRun
from sae_query_steer.models.loading import check_not_steered
from sae_query_steer.progress import progress_bar
from sae_query_steer.sae.encoders import identity_encoders
from sae_query_steer.sites import ALL_HEADS, QuerySite, check_sites
from sae_query_steer.steering.latent_descent import LatentGradientSteerer

TRAVEL = 4.0
"""How far Adam can go in all updates, in budgets. Source: our choice; on SmolLM2, 2 to 8 reach
nearly equally far in 15 updates."""


def reach(
    model: Any,
    sites: Sequence[QuerySite],
    examples: TokenizedExamples,
    *,
    counterparts: TokenizedExamples,
    budget: float = 0.5,
    n_updates: int = 20,
    per_head: bool = False,
    control: bool = False,
    held_out: Sequence[int] | None = None,
    batch_size: int = 24,
    seed: int = 0,
) -> pd.DataFrame:
    """Return how far a learned constant change of queries moves the next token, at each site.

    At each site alone, and with `per_head` at each head alone, one dense vector for each class is
    learned by gradient through the frozen model and added to the queries at the span. The goal is
    the model's own next-token distribution after the counterpart. The number of updates is fixed,
    so no update is chosen on the examples that are held out; the effect is reported on these. The
    prompts run once for all sites.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        sites: where, from `query_sites`.
        examples: prompts, with the span to change. Where they have responses, the KL is averaged
            over the tokens of the response and the one after it; otherwise it is that of the next
            token.
        counterparts: for each example the same prompt made for another class, such as one with a
            request, labelled with that class; the responses are those of the examples.
        budget: ||change of q|| / ||q|| of a head at most, above 0.
        n_updates: updates of Adam.
        per_head: also learn every head alone, not only all heads of a layer.
        control: also report what the changes learned with exchanged classes do: each held-out
            example gets the change of every other class in turn. Nothing more is learned.
        held_out: indices of the examples on which the effect is reported; choose those of other
            topics. None means every fourth counterpart of each class.
        batch_size: examples of a forward pass.
        seed: of the order of the examples.

    Returns:
        A row for each layer, with head "all", and with `per_head` for each of its heads, with

        - reach: the share of the KL(counterpart || model) held out that is removed, 0 where nothing
          is removed, 1 at most
        - reach_se: its standard error over the examples held out, as if they were independent; NaN
          of one
        - reach_kl_before, reach_kl_after: mean KL in nats a token, without and with the change
        - reach_control: the same share for the changes of the other classes, with `control`: what
          the counterparts of all classes share, such as having a request at all. What reach has
          beyond it is the class's own
        - reach_control_se: standard error of reach - reach_control, paired by example
        - relative_change: mean ||change of q|| / ||q||
        - n_held_out

        It is a guide to what learned targets can do at a site: more updates or data may find more.
        It says nothing about centroids, nor about several layers together.

    Raises:
        ValueError: counterparts that do not fit or are of a single class, a class without examples
            to learn from or held out, a number that is not allowed, or a model that is being
            steered.

    Source: our choice.
    """
    check_sites(model, sites)
    check_number("budget", budget, above=0)
    check_number("n_updates", n_updates, whole=True, least=1)
    check_number("batch_size", batch_size, whole=True, least=1)
    check_tokenized(examples)
    check_not_steered(model)
    check_other_class(examples, counterparts)
    classes = ordered_classes(counterparts.labels)
    labelled = zip(examples, counterparts.labels, strict=True)
    wanted = replace(examples, examples=[replace(e, label=label) for e, label in labelled])
    check_counterparts(wanted, counterparts)
    settings: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
    cases = [(s, h) for s in sites for h in [*(range(s.n_heads) if per_head else ()), ALL_HEADS]]
    encoders = identity_encoders(sites)
    start = no_moves(model, encoders, classes)
    rows = []
    with frozen([model]):
        batches, kept, _ = split_rows(
            *(model, wanted, counterparts),
            classes=classes,
            scope=examples.span,
            held_out=held_out,
            **settings,
        )
        for batch in filter(None, (*batches, *kept)):
            batch.begin_at(site.layer for site in sites)
        with torch.no_grad():
            before = torch.cat([batch.losses() for batch in kept]).double().cpu()
        for site, head in progress_bar(cases, desc="Learning moves", unit="site"):
            steerer = LatentGradientSteerer(
                {site.hook_name: encoders[site.hook_name]},
                start,
                target=classes[0],
                objective=FixedMove(),
                n_steps=1,
                step_size=1.0,
                max_relative_change=budget,
                scope=examples.span,
                heads=None if head == ALL_HEADS else [int(head)],
            )
            # Two evaluations, before the first update and after the last: nothing is chosen.
            learner = TargetLearner(
                *(model, steerer),
                n_updates=n_updates,
                every=n_updates,
                learning_rate=TRAVEL * budget / n_updates,
                **settings,
            )
            run = LearningRun(learner, batches, kept)
            run.run()
            after, change = (
                torch.cat(parts).double().cpu() for parts in zip(*run.held_out, strict=True)
            )
            row = {"layer": site.layer, "head": head, **_removed(before, after)}
            if control:
                others = _with_other_classes(run, kept, classes)
                row["reach_control"] = _removed(before, others)["reach"]
                row["reach_control_se"] = _share_error(others - after, before)
            rows.append(row | {"relative_change": float(change.mean()), "n_held_out": len(before)})
    return pd.DataFrame(rows)


@torch.no_grad()
def _with_other_classes(
    run: LearningRun, batches: Sequence[LearningRows], classes: Sequence[str]
) -> Float[Tensor, " example"]:
    """Return the loss of each row with the change of another class, averaged over the others.

    Classes are learned independently of each other, so this is what learning from counterparts of
    exchanged classes gives.
    """
    found = []
    for shift in range(1, len(classes)):
        other = {k: classes[(i + shift) % len(classes)] for i, k in enumerate(classes)}
        rows = [replace(b, labels=tuple(other[k] for k in b.labels)) for b in batches]
        found.append(torch.cat([run.losses(batch)[0] for batch in rows]))
    return torch.stack(found).mean(0).double().cpu()


def _removed(
    before: Float[Tensor, " example"], after: Float[Tensor, " example"]
) -> dict[str, float]:
    """Return the share of a divergence that is removed, with its error."""
    first, last = float(before.mean()), float(after.mean())
    return {
        "reach": max(0.0, 1 - last / first) if first > 0 else 0.0,
        "reach_se": _share_error(after, before),
        "reach_kl_before": first,
        "reach_kl_after": last,
    }


def _share_error(part: Float[Tensor, " example"], whole: Float[Tensor, " example"]) -> float:
    """Return the standard error of mean(part) / mean(whole) by the delta method; NaN of one."""
    mean = float(whole.mean())
    if len(whole) < 2 or mean <= 0:
        return torch.nan
    share = float(part.mean()) / mean
    return float((part - share * whole).std()) / len(whole) ** 0.5 / mean
