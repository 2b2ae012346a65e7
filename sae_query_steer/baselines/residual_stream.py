"""The residual stream of labelled texts: the mean of each class after some layers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.data.examples import check_classes
from sae_query_steer.data.tokenized import TokenizedExamples, check_tokenized
from sae_query_steer.models.activations import read_at_span
from sae_query_steer.models.fingerprint import (
    default_tolerance,
    dtype_name,
    read_fingerprint,
    relative_difference,
)
from sae_query_steer.scopes.positions import scope_name
from sae_query_steer.targets.builder import ClassMoments


def residual_hook(layer: int) -> str:
    """Return the hook point of the residual stream after a layer, on both hosts."""
    return f"blocks.{layer}.hook_resid_post"


def check_residual(residual: Tensor, layer: int) -> None:
    """Raise if the residual stream is NaN or infinite.

    Raises:
        ValueError: the message names the hook point.
    """
    if not bool(residual.isfinite().all()):
        raise ValueError(
            f"the residual stream at {residual_hook(layer)} is not finite: look for an overflow "
            "(float16 overflows above 65,504; try bfloat16 or float32), or a strength too large"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ResidualMeans:
    """Where each class of text lies in the residual stream after some layers."""

    classes: tuple[str, ...]
    """Names of the classes; their order is the order of every class axis."""

    means: Mapping[int, Float[Tensor, "class d_model"]]
    """Mean of `blocks.L.hook_resid_post` at the span, by layer."""

    counts: Int[Tensor, " class"]
    """Tokens that each mean is of."""

    span: str
    """The span in which they were taken, as it prints."""

    n_layers: int
    """Layers of the model."""

    fingerprint: Mapping[int, Float[Tensor, "row pos d_model"]]
    """The model's residual stream on `fingerprint_tokens`, by layer: it tells which model."""

    dtype: str = "float32"
    """Number format of the model that they were taken on."""

    def __repr__(self) -> str:
        counts = ", ".join(f"{c} {int(n)}" for c, n in zip(self.classes, self.counts, strict=True))
        return f"ResidualMeans({counts}; span {self.span}; layers {list(self.means)})"

    def check(self, model: Any, layers: Iterable[int]) -> None:
        """Raise unless the means of some layers were taken on this model.

        Raises:
            ValueError: other sizes, or another residual stream on the tokens of the fingerprint.
        """
        here = (int(model.cfg.n_layers), int(model.cfg.d_model))
        there = (self.n_layers, next(iter(self.means.values())).shape[1])
        if here != there:
            raise ValueError(
                f"another model: this one has {here[0]} layers and d_model={here[1]}, the means "
                f"are of one with {there[0]} and {there[1]}; take them anew with residual_means"
            )
        tolerance = default_tolerance(dtype_name(model), self.dtype)
        for layer, residual in _fingerprint(model, list(layers)).items():
            difference = relative_difference(residual, self.fingerprint[layer])
            if not difference <= tolerance:  # NaN too
                raise ValueError(
                    f"another model: at {residual_hook(layer)} the residual stream differs from "
                    f"the fingerprint by {difference:.3g} (relative), more than {tolerance:g}; "
                    "take the means anew with residual_means"
                )


def residual_means(
    model: Any,
    examples: TokenizedExamples,
    layers: Sequence[int],
) -> ResidualMeans:
    """Return the mean residual stream of each class of labelled texts.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        examples: tokenised examples, with the span to read.
        layers: after which layers.

    Raises:
        ValueError: a layer that there is not, fewer than two classes or two examples of a class, a
            text without a token in the span, a residual stream that is not finite, or a model
            that is being steered.
    """
    check_tokenized(examples)
    _check_layers(model, layers)
    classes = tuple(check_classes(examples.labels))
    moments = {layer: ClassMoments(len(classes), (int(model.cfg.d_model),)) for layer in layers}
    labels = torch.tensor([classes.index(label) for label in examples.labels])
    for batch in read_at_span(model, examples, [residual_hook(layer) for layer in layers]):
        for layer in layers:
            residual = batch.activations[residual_hook(layer)][:, 0]
            moments[layer].update(residual, labels[batch.row])
    return ResidualMeans(
        classes=classes,
        means={layer: moment.mean.float() for layer, moment in moments.items()},
        counts=moments[layers[0]].count.clone(),
        span=scope_name(examples.span),
        n_layers=int(model.cfg.n_layers),
        fingerprint=_fingerprint(model, layers),
        dtype=dtype_name(model),
    )


def _check_layers(model: Any, layers: Sequence[int]) -> None:
    n_layers = int(model.cfg.n_layers)
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"layers={list(layers)} is not allowed: name at least one, each once")
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise ValueError(
                f"no layer {layer}: the model has {n_layers} layers (0 to {n_layers - 1})"
            )
        if residual_hook(layer) not in model.hook_dict:
            raise ValueError(
                f"no hook point {residual_hook(layer)}: this architecture does not expose its "
                "residual stream"
            )


def _fingerprint(model: Any, layers: Sequence[int]) -> dict[int, Tensor]:
    found = read_fingerprint(model, [residual_hook(layer) for layer in layers])
    return {layer: found[residual_hook(layer)][:, :, 0].float().cpu() for layer in layers}
