"""Centroids: mean, variance and count of the latents of each class, per site and head."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.arguments import check_name
from sae_query_steer.data.prompts import ChatTemplate
from sae_query_steer.models.fingerprint import Fingerprint
from sae_query_steer.storage.folders import new_folder
from sae_query_steer.storage.records import Record, read_record, write_record
from sae_query_steer.storage.tensors import FLOATS, INTEGERS, read_tensors, write_tensors

_TENSORS = "centroids.safetensors"
_SETTINGS = "centroids.json"
CENTROID_FILES = (_SETTINGS, _TENSORS)
"""The files of a folder of centroids."""


class Learned(Record):
    """How targets were learned."""

    kind: Literal["points", "moves"]
    """What the means of the classes are: where to go, or how far."""

    unsteered: dict[str, float]
    """Held-out loss without steering, in nats a token, by class."""

    steered: dict[str, float]
    """The same with the targets that were chosen."""

    history: tuple[dict[str, float | str | None], ...]
    """The rows of `LearnedTargets.history`."""


class _Settings(Record):
    format: Literal["sae_query_steer.centroids/1"]
    classes: tuple[str, ...]
    span: str
    hook_names: tuple[str, ...]
    model_dtype: str
    prepend_bos: bool | None
    chat_template: ChatTemplate
    learned: Learned | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class CentroidTargets:
    """Where each class of text lies in the latent space of each site and head."""

    classes: tuple[str, ...]
    """Names of the classes; their order is the order of every class axis."""

    means: Mapping[str, Float[Tensor, "class head d_latent"]]
    """The centroids, by hook name."""

    variances: Mapping[str, Float[Tensor, "class head d_latent"]]
    """Population variance of each latent within its class, by hook name."""

    counts: Int[Tensor, " class"]
    """Tokens that each centroid is the mean of."""

    span: str
    """The span in which they were taken, as it prints."""

    fingerprint: Fingerprint
    """What tells the model and the SAEs that they belong to."""

    prepend_bos: bool | None = None
    """Whether the texts began with BOS; None if unknown."""

    chat_template: ChatTemplate = False
    """Whether the prompts were in the tokenizer's chat template, which brings its own BOS, or the
    turns before them."""

    def __post_init__(self) -> None:
        n_classes, counts = len(self.classes), self.counts
        if len(set(self.classes)) != n_classes or n_classes < 2:
            raise ValueError(f"classes={self.classes} must be two or more different names")
        for name, mean in self.means.items():
            if name not in self.fingerprint.queries.keys() & self.fingerprint.reconstructions:
                raise ValueError(f"the fingerprint lacks {name}, where there are centroids")
            variance = self.variances.get(name)
            fits = mean.ndim == 3 and len(mean) == n_classes
            if not fits or variance is None or variance.shape != mean.shape:
                raise ValueError(
                    f"centroids at {name} have shape {list(mean.shape)}: expected {n_classes} "
                    "classes and variances of the same shape"
                )
            if not bool((mean.isfinite() & variance.isfinite() & (variance >= 0)).all()):
                raise ValueError(
                    f"centroids at {name} hold values that are not finite, or a variance below 0"
                )
        if counts.shape != (n_classes,) or counts.is_floating_point() or int(counts.min()) < 1:
            raise ValueError(f"counts={counts.tolist()} must be {n_classes} whole numbers above 0")

    @property
    def are_moves(self) -> bool:
        """Whether the means are moves and no points: for the objective `FixedMove` alone."""
        return False

    def __repr__(self) -> str:
        counts = ", ".join(f"{c} {int(n)}" for c, n in zip(self.classes, self.counts, strict=True))
        return f"CentroidTargets({counts}; span {self.span}; sites {list(self.means)})"

    def class_index(self, target: str) -> int:
        """Return the index of a class.

        Raises:
            ValueError: no such class; the message lists those there are.
        """
        check_name("class", target, self.classes)
        return self.classes.index(target)

    def class_share_of_variance(self, hook_name: str, *, head: int | None = None) -> float:
        """Return the share of the latents' variance that the class explains.

        Between classes over total, sum_k n_k |m_k - m|^2 / (that + sum_k n_k var_k): 0 where all
        centroids are one, 1 where every latent is its class's centroid. Of few tokens it is too
        high: n tokens of k classes that do not differ give about (k - 1) / (n - 1).

        Args:
            hook_name: the site.
            head: of one head; None means over all heads.

        Raises:
            KeyError: there are no centroids at this site.
        """
        heads = slice(None) if head is None else slice(head, head + 1)
        between, total = (parts[heads].sum() for parts in self.variance_by_latent(hook_name))
        return float(between / total) if total > 0 else 0.0

    def variance_by_latent(
        self, hook_name: str
    ) -> tuple[Float[Tensor, "head d_latent"], Float[Tensor, "head d_latent"]]:
        """Return sum_k n_k (m_k - m)^2 of each latent, and that + sum_k n_k var_k, on the CPU."""
        means = self.means[hook_name].double().cpu()
        counts = self.counts.double().cpu()[:, None, None]
        centre = (counts * means).sum(0) / counts.sum()
        between = (counts * (means - centre).square()).sum(0)
        return between, between + (counts * self.variances[hook_name].double().cpu()).sum(0)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the centroids to a folder (safetensors and JSON), whole or not at all.

        Raises:
            FileExistsError: the folder exists and `overwrite` is False.
        """
        names = tuple(self.means)
        fingerprint = self.fingerprint.to_tensors()
        expected = Fingerprint.expected_tensors(names)
        tensors = {"counts": self.counts, **{name: fingerprint[name] for name in expected}}
        for name in names:
            tensors |= {f"mean.{name}": self.means[name], f"variance.{name}": self.variances[name]}
        settings = _Settings(
            format="sae_query_steer.centroids/1",
            classes=tuple(str(name) for name in self.classes),
            span=self.span,
            hook_names=names,
            model_dtype=self.fingerprint.dtype,
            prepend_bos=self.prepend_bos,
            chat_template=self.chat_template,
            learned=self.learned if isinstance(self, LearnedTargets) else None,
        )
        with new_folder(folder, overwrite=overwrite, holding=_SETTINGS) as new:
            write_tensors(new / _TENSORS, tensors)
            write_record(new / _SETTINGS, settings)

    @classmethod
    def load(cls, folder: str | Path) -> "CentroidTargets":
        """Read centroids that `save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, of another format, or its parts do not fit.
        """
        settings = read_record(folder, _SETTINGS, _Settings)
        names = settings.hook_names
        expected = {f"{part}.{n}": (FLOATS, None) for n in names for part in ("mean", "variance")}
        expected |= {"counts": (INTEGERS, None), **Fingerprint.expected_tensors(names)}
        tensors = read_tensors(folder, _TENSORS, expected)
        learned = settings.learned
        kind = CentroidTargets if learned is None else partial(LearnedTargets, learned=learned)
        try:
            return kind(
                classes=settings.classes,
                means={name: tensors[f"mean.{name}"] for name in names},
                variances={name: tensors[f"variance.{name}"] for name in names},
                counts=tensors["counts"],
                span=settings.span,
                fingerprint=Fingerprint.from_tensors(tensors, names, settings.model_dtype),
                prepend_bos=settings.prepend_bos,
                chat_template=settings.chat_template,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder} is damaged: {error}") from error


@dataclass(frozen=True, kw_only=True, eq=False)
class LearnedTargets(CentroidTargets):
    """Targets that a `TargetLearner` found by gradient through the frozen model.

    `means` holds a point of each class, site and head, to which latents descend, or a move that is
    added to them; `variances` are those of the centroids from which points started, and 0 of moves;
    `counts` are training examples; `span` is the scope.
    """

    learned: Learned
    """How they were learned."""

    @property
    def are_moves(self) -> bool:
        """Whether the means are moves and no points: for the objective `FixedMove` alone."""
        return self.learned.kind == "moves"

    @property
    def history(self) -> pd.DataFrame:
        """The progress of learning, with a row for each class at each evaluation.

        Columns: step; label; loss, the mean on the training examples since the row before, and
        held_out_loss, both in nats a token; relative_change, the mean ||change of q|| / ||q||; and
        n_latents, latents of a head that are not 0 in the target, on average.
        """
        return pd.DataFrame(list(self.learned.history))

    @property
    def share_removed(self) -> dict[str, float]:
        """The share of the unsteered held-out loss that steering removes, by class; 0 for none."""
        found = self.learned
        return {k: max(0.0, 1 - found.steered[k] / loss) for k, loss in found.unsteered.items()}

    def __repr__(self) -> str:
        shares = ", ".join(f"{k} {share:.0%}" for k, share in self.share_removed.items())
        return (
            f"LearnedTargets({self.learned.kind}; held-out loss removed: {shares}; scope "
            f"{self.span}; sites {list(self.means)})"
        )
