"""Separability: held-out nearest-centroid accuracy of the classes at each site."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import train_test_split
from sklearn.naive_bayes import CategoricalNB
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor
from torch.nn.functional import one_hot

from sae_query_steer.data.examples import check_classes
from sae_query_steer.data.tokenized import TokenizedExamples, check_tokenized
from sae_query_steer.descent.objectives import class_scores
from sae_query_steer.models.activations import read_at_span
from sae_query_steer.sae.encoders import QueryEncoder, encoded, encoder_sites, identity_encoders
from sae_query_steer.sites import ALL_HEADS
from sae_query_steer.targets.builder import ClassMoments


def separability(
    model: Any,
    saes: Mapping[str, QueryEncoder],
    examples: TokenizedExamples,
    *,
    test_share: float = 0.5,
    seed: int = 0,
) -> pd.DataFrame:
    """Return how well the classes can be told apart at each site, on held-out examples.

    Centroids are taken on one part of the examples; every token of the span in the other part is
    assigned to the class with the nearest centroid. Accuracies are balanced: the mean over the
    classes of the share that is found, so chance is 1/n_classes. Two classifiers that see no
    activation show what else could explain them: a decision tree on the token's position and a
    table of token ids.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        saes: encoders by hook name.
        examples: four or more of each class, with the span to read.
        test_share: share of the examples that is held out, split class by class.
        seed: of the split.

    Returns:
        A row for each layer and head, and one for all heads of a layer together (head "all"), with
        accuracy_latents, accuracy_query (on the queries themselves), accuracy_position,
        accuracy_token, chance, and the number of tokens n_train and n_test.

    Raises:
        ValueError: too few examples of a class, or a share that leaves one side empty.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must be between 0 and 1, got {test_share}")
    check_tokenized(examples)
    labels = list(examples.labels)
    counts = check_classes(labels, at_least=4)
    classes = tuple(counts)
    for label, n in counts.items():
        if min(round(n * test_share), round(n * (1 - test_share))) < 1:
            raise ValueError(
                f"test_share={test_share} leaves class {label!r} with its {n} examples on one side "
                "only: give a share nearer to 0.5, or more examples"
            )
    train, test = (
        examples.subset(part)
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
    seen, held_out = _Tokens(), _Tokens()
    for batch, truth in _read(model, train, list(saes), classes, seen):
        for (kind, name), moment in moments.items():
            moment.update(encoded(encoders[kind][name], batch[name]), truth)

    n_classes = len(classes)
    hits = {
        key: torch.zeros(sites[key[1]].n_heads + 1, n_classes, dtype=torch.int64) for key in moments
    }
    for batch, truth in _read(model, test, list(saes), classes, held_out):
        own = one_hot(truth, n_classes)
        for (kind, name), moment in moments.items():
            latents = encoded(encoders[kind][name], batch[name])
            scores = class_scores(latents, moment.mean.to(latents))
            scores = torch.cat([scores, scores.sum(1, keepdim=True)], dim=1).cpu()
            right = scores.argmax(-1) == truth[:, None]
            hits[kind, name] += right.long().T @ own
    in_class = torch.bincount(torch.tensor(held_out.classes), minlength=n_classes)
    accuracy = {key: (found / in_class).mean(-1).tolist() for key, found in hits.items()}
    by_position, by_token = (
        seen.accuracy_of_position(held_out, seed),
        seen.accuracy_of_token(held_out),
    )
    rows = []
    for name, site in sites.items():
        for index, head in enumerate([*range(site.n_heads), ALL_HEADS]):
            rows.append(
                {
                    "layer": site.layer,
                    "head": head,
                    "accuracy_latents": accuracy["latents", name][index],
                    "accuracy_query": accuracy["query", name][index],
                    "accuracy_position": by_position,
                    "accuracy_token": by_token,
                    "chance": 1 / n_classes,
                    "n_train": len(seen.classes),
                    "n_test": len(held_out.classes),
                }
            )
    return pd.DataFrame(rows)


class _Tokens:
    """Position, id and class of tokens."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.ids: list[int] = []
        self.classes: list[int] = []

    def accuracy_of_position(self, held_out: "_Tokens", seed: int) -> float:
        """Return the held-out balanced accuracy of a decision tree on positions."""
        leaf = max(1, min(5, len(self.classes) // (4 * len(set(self.classes)))))
        tree = DecisionTreeClassifier(
            min_samples_leaf=leaf, class_weight="balanced", random_state=seed
        )
        tree.fit([[p] for p in self.positions], self.classes)
        guess = tree.predict([[p] for p in held_out.positions])
        return float(balanced_accuracy_score(held_out.classes, guess))

    def accuracy_of_token(self, held_out: "_Tokens") -> float:
        """Return the held-out balanced accuracy of a table from token id to class."""
        table = CategoricalNB(
            alpha=1e-9, fit_prior=False, min_categories=1 + max(self.ids + held_out.ids)
        )
        table.fit([[i] for i in self.ids], self.classes)
        guess = table.predict([[i] for i in held_out.ids])
        return float(balanced_accuracy_score(held_out.classes, guess))


def _read(
    model: Any,
    examples: TokenizedExamples,
    hook_names: Sequence[str],
    classes: Sequence[str],
    seen: _Tokens,
) -> Iterator[tuple[Mapping[str, Tensor], Int[Tensor, " token"]]]:
    """Yield queries by hook name with the class index of every token, and note the tokens."""
    index = torch.tensor([classes.index(label) for label in examples.labels])
    for batch in read_at_span(model, examples, hook_names):
        truth = index[batch.row]
        seen.positions += batch.position.tolist()
        seen.ids += batch.token.tolist()
        seen.classes += truth.tolist()
        yield batch.activations, truth
