"""Separability: can the classes be told apart at a site? Needed for steering, and not enough."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from sklearn.model_selection import train_test_split
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor

from sae_query_steer.capture import capture
from sae_query_steer.centroids import ClassMoments
from sae_query_steer.data import (
    LabelledExample,
    TokenizedExample,
    check_classes,
    ordered_classes,
)
from sae_query_steer.objectives import class_scores
from sae_query_steer.positions import LastPromptToken, Span
from sae_query_steer.sae.encoders import QueryEncoder, encoder_sites, identity_encoders
from sae_query_steer.targets import as_tokenized

ALL_HEADS = "all"
"""Stands in the column `head` for all heads of a layer together."""


def separability(
    model: Any,
    saes: Mapping[str, QueryEncoder],
    examples: Iterable[LabelledExample | TokenizedExample],
    *,
    span: Span | None = None,
    test_share: float = 0.5,
    seed: int = 0,
    prepend_bos: bool = True,
    chat_template: bool = False,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Return how well the classes can be told apart at each site, on examples held out.

    Centroids are taken on one part of the examples; every token of the span in the other part
    goes to the class with the nearest centroid. Beside the accuracy on latents stand that on raw
    queries and that of a decision tree which sees nothing but the token's position.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        saes: encoders by hook name.
        examples: labelled examples, four or more of each class.
        span: which positions count; None means the last prompt token.
        test_share: share of the examples that is held out, split class by class.
        seed: of the split.
        prepend_bos: begin every prompt with BOS.
        chat_template: put every prompt into the tokenizer's chat template.
        batch_size: rows of one forward pass.

    Returns:
        A row for each layer and head, and one for all heads of a layer together (head "all"), with
        accuracy_latents, accuracy_query, accuracy_position, chance (share of the commonest class)
        and the number of tokens n_train and n_test.

    Raises:
        ValueError: too few examples of a class, or a share that leaves one side empty.

    Source: nearest-centroid accuracy per site, head and span; the position confound is our choice.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share={test_share} is not allowed: give a share between 0 and 1")
    span = LastPromptToken() if span is None else span
    tokenized = as_tokenized(examples, model, prepend_bos=prepend_bos, chat_template=chat_template)
    labels = [example.label for example in tokenized]
    check_classes(labels, at_least=4)
    classes = ordered_classes(labels)
    train, test = (
        [tokenized[i] for i in part]
        for part in train_test_split(
            range(len(labels)), test_size=test_share, stratify=labels, random_state=seed
        )
    )
    sites = encoder_sites(saes)
    encoders = {"latents": saes, "query": identity_encoders(sites.values())}

    moments = {
        (kind, name): ClassMoments(len(classes), (encoder.n_heads, encoder.d_latent))
        for kind, group in encoders.items()
        for name, encoder in group.items()
    }
    seen = _LabelledPositions()
    for batch, truth in _captured(model, train, list(saes), span, classes, batch_size, seen):
        for (kind, name), moment in moments.items():
            moment.update(encoders[kind][name].encode(batch[name]), truth)

    held_out = _LabelledPositions()
    hits = {key: torch.zeros(sites[key[1]].n_heads + 1, dtype=torch.int64) for key in moments}
    for batch, truth in _captured(model, test, list(saes), span, classes, batch_size, held_out):
        for (kind, name), moment in moments.items():
            latents = encoders[kind][name].encode(batch[name])
            scores = class_scores(latents, moment.mean.to(latents))
            scores = torch.cat([scores, scores.sum(1, keepdim=True)], dim=1).cpu()
            hits[kind, name] += (scores.argmax(-1) == truth[:, None]).sum(0)

    tree = DecisionTreeClassifier(min_samples_leaf=5, random_state=seed)
    tree.fit(seen.positions, seen.classes)
    by_position = float(tree.score(held_out.positions, held_out.classes))
    n_test = len(held_out.classes)
    chance = max(held_out.classes.count(k) for k in range(len(classes))) / n_test
    rows = []
    for name, site in sites.items():
        for index, head in enumerate([*range(site.n_heads), ALL_HEADS]):
            rows.append(
                {
                    "layer": site.layer,
                    "head": head,
                    "accuracy_latents": int(hits["latents", name][index]) / n_test,
                    "accuracy_query": int(hits["query", name][index]) / n_test,
                    "accuracy_position": by_position,
                    "chance": chance,
                    "n_train": len(seen.classes),
                    "n_test": n_test,
                }
            )
    return pd.DataFrame(rows)


class _LabelledPositions:
    """Positions and class indices of tokens, for the classifier that sees positions alone."""

    def __init__(self) -> None:
        self.positions: list[list[int]] = []
        self.classes: list[int] = []


def _captured(
    model: Any,
    examples: Sequence[TokenizedExample],
    hook_names: Sequence[str],
    span: Span,
    classes: Sequence[str],
    batch_size: int,
    seen: _LabelledPositions,
) -> Iterator[tuple[Mapping[str, Tensor], Int[Tensor, " token"]]]:
    """Yield queries by hook name with the class index of every token, and note positions."""
    index = torch.tensor([classes.index(example.label) for example in examples])
    for batch in capture(model, examples, hook_names, span, batch_size=batch_size):
        truth = index[batch.row]
        seen.positions += [[p] for p in batch.position.tolist()]
        seen.classes += truth.tolist()
        yield batch.queries, truth
