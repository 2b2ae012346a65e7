"""The achieved effect: what the interchange effect asks, of a steer in place of real queries."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from sae_query_steer.data.batches import TokenBatch
from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.data.tokenized import TokenizedExample
from sae_query_steer.descent.objectives import Objective, SquaredDistance
from sae_query_steer.descent.places import TokenPlaces
from sae_query_steer.diagnostics.interchange_pairs import Pair
from sae_query_steer.diagnostics.query_patches import Patch, prepared
from sae_query_steer.models.activations import read_activations
from sae_query_steer.sae.encoders import QueryEncoder, encoder_sites
from sae_query_steer.scopes.positions import Span
from sae_query_steer.steering.steerer import LatentGradientSteerer
from sae_query_steer.targets.centroids import CentroidTargets


def achieved_effect(
    model: Any,
    saes: Mapping[str, QueryEncoder],
    targets: CentroidTargets,
    examples: Sequence[LabelledExample | TokenizedExample],
    *,
    objective: Objective | None = None,
    n_steps: int = 1,
    step_size: float = 1.0,
    counterparts: Sequence[LabelledExample | TokenizedExample] | None = None,
    span: Span | None = None,
    n_pairs: int = 64,
    per_head: bool = True,
    seed: int = 0,
    prepend_bos: bool = True,
    chat_template: bool = False,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Return how far a steer moves the next token towards another class, at each site and head.

    The pairs, the aims and the columns are those of `interchange_effect` for equal examples and an
    equal seed, so the two can be laid side by side; but where that patches in the queries of the
    donor, this steers the receiver's own queries towards the donor's class, and, for the control,
    towards the class that the receiver has already. Nothing is generated: two forward passes a
    pair, site and head.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        saes: encoders by hook name: these sites are steered, one at a time.
        targets: their centroids, best of other texts than the examples.
        examples: labelled examples, two or more of each class.
        objective: of the descent; None means `SquaredDistance()`, of which one step of size 1 goes
            to the centroid.
        n_steps: see `LatentGradientSteerer`.
        step_size: see `LatentGradientSteerer`.
        counterparts: see `interchange_effect`.
        span: which positions are steered; None means the last prompt token.
        n_pairs: see `interchange_effect`.
        per_head: also steer every head alone, not only all heads of a layer.
        seed: of the pairs.
        prepend_bos: begin every prompt with BOS.
        chat_template: put every prompt into the tokenizer's chat template.
        batch_size: rows of one forward pass.

    Returns:
        A row for each layer, with head "all", and with `per_head` for each of its heads, with the
        columns of `interchange_effect`.

    Raises:
        ValueError: too few examples of a class, a class without a centroid, or centroids of
            another model or other SAEs.

    Source: our choice.
    """
    trial = prepared(
        model,
        list(encoder_sites(saes).values()),
        examples,
        counterparts,
        span=span,
        n_pairs=n_pairs,
        per_head=per_head,
        seed=seed,
        prepend_bos=prepend_bos,
        chat_template=chat_template,
        batch_size=batch_size,
    )
    steerers = {
        label: LatentGradientSteerer(
            saes,
            targets,
            target=label,
            objective=SquaredDistance() if objective is None else objective,
            n_steps=n_steps,
            step_size=step_size,
        )
        for label in dict.fromkeys(example.label for example in trial.examples)
    }
    next(iter(steerers.values())).check_model(model)

    def patches(batch: TokenBatch, mask: Tensor, pairs: Sequence[Pair]) -> tuple[Patch, Patch]:
        rows, columns = mask.nonzero(as_tuple=True)
        queries = {
            name: q[rows.to(q.device), columns.to(q.device)]
            for name, q in read_activations(model, batch.tokens, list(saes)).items()
        }
        places = TokenPlaces(
            row=rows,
            position=columns,
            n_rows=len(mask),
            prompt_lengths=batch.prompt_lengths,
        )
        labels = [
            [trial.examples[i].label for i in chosen]
            for chosen in zip(*((pair.other, pair.receiver) for pair in pairs), strict=True)
        ]
        other, control = (
            {name: _steered(name, q, own, steerers, places) for name, q in queries.items()}
            for own in labels
        )
        return Patch(rows, columns, other), Patch(rows, columns, control)

    return trial.table(patches, "Steering queries")


def _steered(
    hook_name: str,
    queries: Tensor,
    labels: Sequence[str],
    steerers: Mapping[str, LatentGradientSteerer],
    places: TokenPlaces,
) -> Tensor:
    """Return queries that are steered, those of each row towards a class of its own."""
    steered = queries.clone()
    for label, steerer in steerers.items():
        chosen = torch.tensor([labels[row] == label for row in places.row.tolist()]).nonzero()[:, 0]
        if len(chosen):
            own = chosen.to(queries.device)
            change = steerer.change(hook_name, queries[own], places.at(chosen), record=False)
            steered[own] += change.delta.to(steered)
    return steered
