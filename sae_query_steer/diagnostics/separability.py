"""Separability: can the classes be told apart at a site? Needed for steering, and not enough."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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

from sae_query_steer.data.examples import LabelledExample, check_classes, ordered_classes
from sae_query_steer.data.tokenized import TokenizedExample, TokenizedExamples
from sae_query_steer.descent.objectives import class_scores
from sae_query_steer.models.activations import read_at_span
from sae_query_steer.sae.encoders import QueryEncoder, encoded, encoder_sites, identity_encoders
from sae_query_steer.scopes.positions import LastPromptToken, Span
from sae_query_steer.sites import ALL_HEADS
from sae_query_steer.targets.builder import as_tokenized
from sae_query_steer.targets.centroids import ClassMoments


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
    queries, and two that say what could explain them without any class: a decision tree that sees
    nothing but the token's position, and a table that knows nothing but which token it is. All are
    balanced: the mean over the classes of the share that is found, so that chance is 1/n_classes
    however many texts a class has.

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
        accuracy_latents, accuracy_query, accuracy_position, accuracy_token, chance, and the number
        of tokens n_train and n_test.

    Raises:
        ValueError: too few examples of a class, or a share that leaves one side empty.

    Source: nearest-centroid accuracy per site, head and span; the confounds are our choice.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share={test_share} is not allowed: give a share between 0 and 1")
    span = LastPromptToken() if span is None else span
    tokenized = as_tokenized(examples, model, prepend_bos=prepend_bos, chat_template=chat_template)
    labels = [example.label for example in tokenized]
    counts = check_classes(labels, at_least=4)
    classes = ordered_classes(labels)
    for label, n in counts.items():
        if min(round(n * test_share), round(n * (1 - test_share))) < 1:
            raise ValueError(
                f"test_share={test_share} leaves class {label!r} with its {n} examples on one side "
                "only: give a share nearer to 0.5, or more examples"
            )
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
    seen, held_out = _Tokens(), _Tokens()
    for batch, truth in _captured(model, train, list(saes), span, classes, batch_size, seen):
        for (kind, name), moment in moments.items():
            moment.update(encoded(encoders[kind][name], batch[name]), truth)

    n_classes = len(classes)
    hits = {
        key: torch.zeros(sites[key[1]].n_heads + 1, n_classes, dtype=torch.int64) for key in moments
    }
    for batch, truth in _captured(model, test, list(saes), span, classes, batch_size, held_out):
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
    """Position, id and class of tokens: what a classifier sees that sees no query."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.ids: list[int] = []
        self.classes: list[int] = []

    def accuracy_of_position(self, held_out: "_Tokens", seed: int) -> float:
        """Return the balanced accuracy, on tokens held out, of a tree that sees positions alone."""
        leaf = max(1, min(5, len(self.classes) // (4 * len(set(self.classes)))))
        tree = DecisionTreeClassifier(
            min_samples_leaf=leaf, class_weight="balanced", random_state=seed
        )
        tree.fit([[p] for p in self.positions], self.classes)
        guess = tree.predict([[p] for p in held_out.positions])
        return float(balanced_accuracy_score(held_out.classes, guess))

    def accuracy_of_token(self, held_out: "_Tokens") -> float:
        """Return the balanced accuracy, on tokens held out, of a table from token id to class."""
        table = CategoricalNB(
            alpha=1e-9, fit_prior=False, min_categories=1 + max(self.ids + held_out.ids)
        )
        table.fit([[i] for i in self.ids], self.classes)
        guess = table.predict([[i] for i in held_out.ids])
        return float(balanced_accuracy_score(held_out.classes, guess))


def _captured(
    model: Any,
    examples: Sequence[TokenizedExample],
    hook_names: Sequence[str],
    span: Span,
    classes: Sequence[str],
    batch_size: int,
    seen: _Tokens,
) -> Iterator[tuple[Mapping[str, Tensor], Int[Tensor, " token"]]]:
    """Yield queries by hook name with the class index of every token, and note the tokens."""
    index = torch.tensor([classes.index(example.label) for example in examples])
    read = TokenizedExamples(examples=examples, span=span, batch_size=batch_size)
    for batch in read_at_span(model, read, hook_names):
        truth = index[batch.row]
        seen.positions += batch.position.tolist()
        seen.ids += batch.token.tolist()
        seen.classes += truth.tolist()
        yield batch.activations, truth
