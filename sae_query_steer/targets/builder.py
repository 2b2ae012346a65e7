"""`CentroidTargetBuilder`: the mean of each class of text in the latent space of each site."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.data.examples import check_classes, ordered_classes
from sae_query_steer.data.tokenized import TokenizedExamples, check_tokenized
from sae_query_steer.models.activations import read_at_span
from sae_query_steer.sae.encoders import QueryEncoder, encoded
from sae_query_steer.scopes.joins import scope_name
from sae_query_steer.targets.centroids import CentroidTargets
from sae_query_steer.targets.fingerprint import check_encoders, take_fingerprint


class CentroidTargetBuilder:
    """Streams labelled examples through a model into centroids.

    The constructor checks the sites; `fit` starts afresh and `partial_fit` continues. Beside
    queries the sites may be any hook point of attention or the residual stream, with an
    `IdentityEncoder` of its size.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        saes: encoders by hook name: the SAEs of `train_query_saes`, or `identity_encoders`.
        classes: names of the classes, if the first examples lack some; None takes theirs.

    Raises:
        ValueError: the model has no such site.

    Source: arXiv 2502.18644 steers towards the samples of the desired class; its follow-up
    2605.23040 calls their means prototypes.
    """

    def __init__(
        self, model: Any, saes: Mapping[str, QueryEncoder], *, classes: Sequence[str] | None = None
    ) -> None:
        check_encoders(model, saes)
        self.model, self.saes = model, saes
        self._given = None if classes is None else ordered_classes(classes)
        self._start()

    def _start(self) -> None:
        self._classes = self._given
        self._settings: dict[str, Any] = {}
        self._n_examples: Counter[str] = Counter()
        self._moments: dict[str, ClassMoments] = {}

    def fit(self, examples: TokenizedExamples) -> CentroidTargets:
        """Return the centroids of some examples; what was read before is forgotten.

        Raises:
            ValueError: fewer than two classes, fewer than two examples of a class, a label that
                is not a class, an example without a token in the span, or activations that are
                not finite.
        """
        check_tokenized(examples)
        classes = self._given or tuple(check_classes(examples.labels))
        _check_enough(classes, Counter(examples.labels))  # before the model runs
        self._read(examples, classes, afresh=True)
        return self.targets_

    def partial_fit(self, examples: TokenizedExamples) -> "CentroidTargetBuilder":
        """Read more examples; `targets_` holds the centroids of all.

        Raises:
            ValueError: as for `fit`, or a span or tokenisation other than that of the examples
                before. The builder is then as it was.
        """
        check_tokenized(examples)
        settings = _settings(examples)
        for name, value in self._settings.items():
            if value != settings[name]:
                raise ValueError(
                    f"examples read with different {name} cannot be combined: {value} and "
                    f"{settings[name]}"
                )
        classes = self._classes or tuple(check_classes(examples.labels))
        self._read(examples, classes)
        return self

    @property
    def targets_(self) -> CentroidTargets:
        """The centroids of all examples that were read.

        Raises:
            ValueError: fewer than two examples of a class were read.
        """
        if self._classes is None:
            raise ValueError("no examples were read: call fit or partial_fit")
        _check_enough(self._classes, self._n_examples)
        counts = next(iter(self._moments.values())).count
        return CentroidTargets(
            classes=self._classes,
            means={name: m.mean.float() for name, m in self._moments.items()},
            variances={name: m.variance().float() for name, m in self._moments.items()},
            counts=counts.clone(),
            span=str(self._settings["span"]),
            fingerprint=take_fingerprint(self.model, self.saes),
            prepend_bos=bool(self._settings["prepend_bos"]),
            chat_template=self._settings["chat_template"],
        )

    @torch.no_grad()
    def _read(
        self, examples: TokenizedExamples, classes: tuple[str, ...], *, afresh: bool = False
    ) -> None:
        """Add examples to those before, or `afresh` forget these; an error changes nothing."""
        for index, label in enumerate(examples.labels):
            if label not in classes:
                raise ValueError(
                    f"example {index} has the label {label!r}, which is not a class: the classes "
                    f"are {list(classes)}; name them all with classes=[...]"
                )
        index = torch.tensor([classes.index(label) for label in examples.labels])
        moments = {
            name: ClassMoments(len(classes), (sae.n_heads, sae.d_latent))
            for name, sae in self.saes.items()
        }
        for batch in read_at_span(self.model, examples, list(self.saes)):
            for name, values in batch.activations.items():
                moments[name].update(encoded(self.saes[name], values), index[batch.row])
        if afresh:
            self._start()
        self._classes, self._settings = classes, _settings(examples)
        self._n_examples.update(examples.labels)
        for name, moment in moments.items():
            if name in self._moments:
                self._moments[name].merge(moment)
            else:
                self._moments[name] = moment


def _settings(examples: TokenizedExamples) -> dict[str, Any]:
    return {
        "span": scope_name(examples.span),
        "prepend_bos": examples.prepend_bos,
        "chat_template": examples.chat_template,
    }


def _check_enough(classes: Sequence[str], n_examples: Mapping[str, int]) -> None:
    for label in classes:
        if (n := n_examples.get(label, 0)) < 2:
            raise ValueError(
                f"class {label!r} has {n} example(s): a centroid needs two or more; give more or "
                "leave the class out"
            )


class ClassMoments:
    """Streams the mean and sum of squared deviations of each class; two of them merge exactly.

    Memory is that of the result, in float64. Source: the pairwise update of Chan, Golub and
    LeVeque, stable where sums of squares are not.
    """

    def __init__(self, n_classes: int, shape: Sequence[int]) -> None:
        self.count = torch.zeros(n_classes, dtype=torch.int64)
        self.mean = torch.zeros(n_classes, *shape, dtype=torch.float64)
        self.squares = torch.zeros_like(self.mean)

    def update(self, values: Float[Tensor, "token *shape"], classes: Int[Tensor, " token"]) -> None:
        """Add values, each with the index of its class."""
        values, classes = values.detach().double().cpu(), classes.cpu()
        for k in classes.unique().tolist():
            chosen = values[classes == k]
            mean = chosen.mean(0)
            self._add(k, len(chosen), mean, (chosen - mean).square().sum(0))

    def merge(self, other: "ClassMoments") -> None:
        """Add all that another one has seen; both must have the same shape."""
        for k in range(len(self.count)):
            self._add(k, int(other.count[k]), other.mean[k], other.squares[k])

    def variance(self) -> Float[Tensor, "class *shape"]:
        """Return the population variance of each class (divided by the count)."""
        count = self.count.clamp(min=1).reshape(-1, *[1] * (self.mean.ndim - 1))
        return self.squares / count

    def _add(self, k: int, count: int, mean: Tensor, squares: Tensor) -> None:
        if count == 0:
            return
        before, total = int(self.count[k]), int(self.count[k]) + count
        difference = mean - self.mean[k]
        self.mean[k] += difference * (count / total)
        self.squares[k] += squares + difference.square() * (before * count / total)
        self.count[k] = total
