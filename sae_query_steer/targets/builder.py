"""`CentroidTargetBuilder`: where each class of text lies in the latent space of each site."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from sae_query_steer.data.examples import LabelledExample, check_classes, ordered_classes
from sae_query_steer.data.tokenized import TokenizedExample, TokenizedExamples, tokenize_examples
from sae_query_steer.models.activations import read_activations, read_at_span, without_hooks
from sae_query_steer.models.fingerprint import (
    check_queries,
    check_reconstructions,
    default_tolerance,
    dtype_name,
)
from sae_query_steer.sae.encoders import QueryEncoder, encoded, encoder_sites
from sae_query_steer.scopes.positions import LastPromptToken, Span, check_scope, scope_name
from sae_query_steer.targets.capture import (
    check_devices,
    reconstructions,
    take_fingerprint,
)
from sae_query_steer.targets.centroids import CentroidTargets, ClassMoments


class CentroidTargetBuilder:
    """Streams labelled texts through a model into centroids; builders of equal settings merge.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        saes: encoders by hook name: the SAEs of `train_query_saes`, or `identity_encoders`.
        span: which positions of an example count; every token of the span counts alike.
        classes: names of the classes, where they are to be fixed beforehand, as for builders that
            each see a part of the data; otherwise they are those of the first examples.
        prepend_bos: begin every prompt with BOS, as `generate` does.
        chat_template: put every prompt into the tokenizer's chat template, as the user's turn.
        batch_size: rows of one forward pass.

    Raises:
        ValueError: a site that the model does not have.

    Source: arXiv 2502.18644 steers towards the samples of the desired class; its follow-up
    2605.23040 calls their means prototypes. Which span is right is the user's choice: the
    separability table helps.
    """

    def __init__(
        self,
        model: Any,
        saes: Mapping[str, QueryEncoder],
        *,
        span: Span | None = None,
        classes: Sequence[str] | None = None,
        prepend_bos: bool = True,
        chat_template: bool = False,
        batch_size: int = 32,
    ) -> None:
        self.span = LastPromptToken() if span is None else span
        check_scope(self.span, name="span")
        for site in encoder_sites(saes).values():
            site.check(model)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not allowed: give 1 or more")
        self.model, self.saes = model, saes
        self.prepend_bos, self.chat_template = prepend_bos, chat_template
        self.batch_size = batch_size
        self._classes = None if classes is None else ordered_classes(classes)
        self._n_examples: Counter[str] = Counter()
        self._moments: dict[str, ClassMoments] = {}

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty until they are known."""
        return self._classes or ()

    def fit(self, examples: Iterable[LabelledExample | TokenizedExample]) -> CentroidTargets:
        """Read labelled examples and return the centroids of all that was read so far.

        Raises:
            ValueError: fewer than two classes, fewer than two examples of a class, a label that
                is no class, a text that can't be tokenised exactly or has no token in the span.
        """
        tokenized = self._tokenized(examples)
        classes = self._classes_of(tokenized)
        seen = self._n_examples + Counter(example.label for example in tokenized)
        _check_enough(classes, seen)  # before the model runs
        return self.update(tokenized).targets()

    def update(
        self, examples: Iterable[LabelledExample | TokenizedExample]
    ) -> "CentroidTargetBuilder":
        """Read labelled examples; may be called again with more."""
        tokenized = self._tokenized(examples)
        classes = self._classes_of(tokenized)
        for index, example in enumerate(tokenized):
            if example.label not in classes:
                raise ValueError(
                    f"example {index} has the label {example.label!r}, which is no class: the "
                    f"classes are {list(classes)}; name them all with classes=[...]"
                )
        label_index = torch.tensor([classes.index(example.label) for example in tokenized])
        # Read into moments of their own first: what fails half-way leaves nothing half done.
        moments = self._new_moments(classes)
        with torch.no_grad():
            read = TokenizedExamples(examples=tokenized, span=self.span, batch_size=self.batch_size)
            for batch in read_at_span(self.model, read, list(self.saes)):
                for name, queries in batch.activations.items():
                    latents = encoded(self.saes[name], queries)
                    moments[name].update(latents, label_index[batch.row])
        self._classes = classes
        self._n_examples.update(example.label for example in tokenized)
        self._add(moments)
        return self

    def merge(self, other: "CentroidTargetBuilder") -> "CentroidTargetBuilder":
        """Add all that another builder has read; both must measure the same.

        Raises:
            ValueError: they differ in model, SAEs, span, classes or tokenising, or one of them has
                read nothing.
        """
        if self._classes is None or other._classes is None:
            raise ValueError("both builders must have read examples before they are merged")
        for what, mine, theirs in (
            ("classes", self._classes, other._classes),
            ("span", self.span, other.span),
            ("sites", list(self.saes), list(other.saes)),
            ("prepend_bos", self.prepend_bos, other.prepend_bos),
            ("chat_template", self.chat_template, other.chat_template),
        ):
            if mine != theirs:
                raise ValueError(f"builders with different {what} can't merge: {mine} and {theirs}")
        mine, theirs = (take_fingerprint(b.model, b.saes) for b in (self, other))
        tolerance = default_tolerance(mine.dtype, theirs.dtype)
        check_queries(mine, theirs.queries, tolerance=tolerance)
        check_reconstructions(mine, theirs.reconstructions, tolerance=tolerance)
        self._n_examples.update(other._n_examples)
        self._add(other._moments)
        return self

    def targets(self) -> CentroidTargets:
        """Return the centroids of all that was read so far.

        Raises:
            ValueError: nothing was read, or fewer than two examples of a class.
        """
        if self._classes is None:
            raise ValueError("no examples were read yet: call fit or update with some")
        _check_enough(self._classes, self._n_examples)
        counts = next(iter(self._moments.values())).count
        return CentroidTargets(
            classes=self._classes,
            means={name: m.mean.float() for name, m in self._moments.items()},
            variances={name: m.variance().float() for name, m in self._moments.items()},
            counts=counts.clone(),
            span=scope_name(self.span),
            fingerprint=take_fingerprint(self.model, self.saes),
        )

    def _tokenized(
        self, examples: Iterable[LabelledExample | TokenizedExample]
    ) -> list[TokenizedExample]:
        return as_tokenized(
            examples,
            self.model,
            prepend_bos=self.prepend_bos,
            chat_template=self.chat_template,
        )

    def _classes_of(self, examples: Sequence[TokenizedExample]) -> tuple[str, ...]:
        return self._classes or ordered_classes(check_classes(e.label for e in examples))

    def _new_moments(self, classes: Sequence[str]) -> dict[str, ClassMoments]:
        return {
            name: ClassMoments(len(classes), (sae.n_heads, sae.d_latent))
            for name, sae in self.saes.items()
        }

    def _add(self, moments: Mapping[str, ClassMoments]) -> None:
        if not self._moments:
            self._moments = self._new_moments(self.classes)
        for name, moment in moments.items():
            self._moments[name].merge(moment)


def _check_enough(classes: Iterable[str], n_examples: Mapping[str, int]) -> None:
    for label in classes:
        if (n := n_examples.get(label, 0)) < 2:
            raise ValueError(
                f"class {label!r} has {n} example(s): a centroid needs two or more; give more or "
                "leave the class out"
            )


def as_tokenized(
    examples: Iterable[LabelledExample | TokenizedExample],
    model: Any,
    *,
    prepend_bos: bool = True,
    chat_template: bool = False,
) -> list[TokenizedExample]:
    """Return examples tokenised for a model; those that already are stay as they are.

    Raises:
        ValueError: there are none, or one can't be tokenised or is longer than the context.
    """
    given = list(examples)
    ready = [example for example in given if isinstance(example, TokenizedExample)]
    if given and len(ready) == len(given):
        return ready
    texts = [example for example in given if isinstance(example, LabelledExample)]
    if len(texts) != len(given):
        raise TypeError(
            "examples must all be LabelledExample, or all TokenizedExample; got "
            f"{sorted({type(example).__name__ for example in given})}"
        )
    return list(
        tokenize_examples(model, texts, prepend_bos=prepend_bos, chat_template=chat_template)
    )


def check_shapes(targets: CentroidTargets, saes: Mapping[str, QueryEncoder]) -> None:
    """Raise unless there are centroids for every encoder, of its heads and latents.

    Raises:
        ValueError: the message names the site.
    """
    for name, sae in saes.items():
        if name not in targets.means:
            raise ValueError(
                f"no centroids at {name}: there are some at {list(targets.means)}; build "
                "them with the same SAEs"
            )
        have, want = tuple(targets.means[name].shape[1:]), (sae.n_heads, sae.d_latent)
        if have != want:
            raise ValueError(
                f"centroids of another SAE at {name}: they are for {have[0]} heads of "
                f"{have[1]} latents, the SAE has {want[0]} heads of {want[1]}"
            )


def check_belongs(model: Any, saes: Mapping[str, QueryEncoder], targets: CentroidTargets) -> None:
    """Raise unless centroids belong to this model and these encoders, by their fingerprint.

    Raises:
        ValueError: another model or another SAE; the message names the site.
    """
    check_devices(model, saes)
    stored_tokens, d_vocab = targets.fingerprint.tokens, int(model.cfg.d_vocab)
    if int(stored_tokens.min()) < 0 or int(stored_tokens.max()) >= d_vocab:
        raise ValueError(
            f"another model: the fingerprint's tokens go up to {int(stored_tokens.max())}, the "
            f"model's vocabulary has {d_vocab}"
        )
    with without_hooks(model):
        queries = read_activations(model, stored_tokens, list(saes))
    tolerance = default_tolerance(dtype_name(model), targets.fingerprint.dtype)
    check_queries(targets.fingerprint, queries, tolerance=tolerance)
    device = next(iter(queries.values())).device
    stored = {name: targets.fingerprint.queries[name].to(device) for name in saes}
    check_reconstructions(targets.fingerprint, reconstructions(saes, stored), tolerance=tolerance)
