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
    seed: int = 0,
) -> pd.DataFrame:
    """Return how well the classes can be told apart at each site, on held-out examples.

    Centroids are taken on one half of each class; every token of the span in the other half is
    assigned to the class with the nearest centroid. Accuracies are balanced: the mean over the
    classes of the share that is found, so chance is 1/n_classes. Two classifiers that see no
    activation show what else could explain them: a decision tree on the token's position and a
    table of token ids.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        saes: encoders by hook name.
        examples: four or more of each class.
        seed: of the split.

    Returns:
        A row for each layer and head, and one for all heads of a layer together (head "all"), with
        accuracy_latents, accuracy_query (on the queries themselves), accuracy_position,
        accuracy_token, chance, and the number of tokens n_train and n_test.

    Raises:
        ValueError: a class with fewer than four examples.
    """
    check_tokenized(examples)
    labels = list(examples.labels)
    classes = tuple(check_classes(labels, at_least=4))
    train, test = (
        examples.subset(part)
        for part in train_test_split(
            range(len(labels)), test_size=0.5, stratify=labels, random_state=seed
        )
    )
    sites = encoder_sites(saes)
    encoders = {
        (kind, name): encoder
        for kind, group in (("latents", saes), ("query", identity_encoders(sites.values())))
        for name, encoder in group.items()
    }
    moments = {
        key: ClassMoments(len(classes), (encoder.n_heads, encoder.d_latent))
        for key, encoder in encoders.items()
    }
    parts: list[pd.DataFrame] = []
    for batch, truth in _read(model, train, list(saes), classes, parts):
        for key, encoder in encoders.items():
            moments[key].update(encoded(encoder, batch[key[1]]), truth)
    seen, parts = pd.concat(parts), []
    hits: dict[tuple[str, str], list[Tensor]] = {key: [] for key in encoders}
    for batch, truth in _read(model, test, list(saes), classes, parts):
        for key, encoder in encoders.items():
            latents = encoded(encoder, batch[key[1]])
            scores = class_scores(latents, moments[key].mean.to(latents))
            scores = torch.cat([scores, scores.sum(1, keepdim=True)], dim=1).cpu()
            hits[key].append(scores.argmax(-1) == truth[:, None])
    held_out = pd.concat(parts)
    tree = DecisionTreeClassifier(
        min_samples_leaf=max(1, min(5, len(seen) // (4 * seen["class"].nunique()))),
        class_weight="balanced",
        random_state=seed,
    )
    n_ids = 1 + int(max(seen["token"].max(), held_out["token"].max()))
    by_token = CategoricalNB(alpha=1e-9, fit_prior=False, min_categories=n_ids)
    common = {
        "accuracy_position": _accuracy(tree, "position", seen, held_out),
        "accuracy_token": _accuracy(by_token, "token", seen, held_out),
        "chance": 1 / len(classes),
        "n_train": len(seen),
        "n_test": len(held_out),
    }
    # By site and head: the mean over the classes of the share that is found.
    truth = held_out["class"].to_numpy()
    found = {
        key: pd.DataFrame(torch.cat(own).float().numpy()).groupby(truth).mean().mean().tolist()
        for key, own in hits.items()
    }
    return pd.DataFrame(
        [
            {
                "layer": site.layer,
                "head": head,
                "accuracy_latents": found["latents", name][i],
                "accuracy_query": found["query", name][i],
                **common,
            }
            for name, site in sites.items()
            for i, head in enumerate([*range(site.n_heads), ALL_HEADS])
        ]
    )


def _accuracy(classifier: Any, column: str, seen: pd.DataFrame, held_out: pd.DataFrame) -> float:
    """Return the held-out balanced accuracy of a classifier that sees one column."""
    classifier.fit(seen[[column]], seen["class"])
    guess = classifier.predict(held_out[[column]])
    return float(balanced_accuracy_score(held_out["class"], guess))


def _read(
    model: Any,
    examples: TokenizedExamples,
    hook_names: Sequence[str],
    classes: Sequence[str],
    seen: list[pd.DataFrame],
) -> Iterator[tuple[Mapping[str, Tensor], Int[Tensor, " token"]]]:
    """Yield queries by hook name with the class index of every token, and note the tokens."""
    index = torch.tensor([classes.index(label) for label in examples.labels])
    for batch in read_at_span(model, examples, hook_names):
        truth = index[batch.row]
        noted = {"position": batch.position, "token": batch.token, "class": truth}
        seen.append(pd.DataFrame({name: values.numpy() for name, values in noted.items()}))
        yield batch.activations, truth
