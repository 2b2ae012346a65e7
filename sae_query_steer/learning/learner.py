"""`TargetLearner`: find targets of steering by gradient through the frozen language model."""

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch

from sae_query_steer.arguments import check_kind, check_number
from sae_query_steer.data.examples import ordered_classes
from sae_query_steer.data.tokenized import TokenizedExample, TokenizedExamples, check_tokenized
from sae_query_steer.descent.control import TargetLatents
from sae_query_steer.learning.rows import SplitRows, check_counterparts, frozen, split_rows
from sae_query_steer.learning.run import LearningRun
from sae_query_steer.models.launch import ALONE, Ranks
from sae_query_steer.models.loading import check_not_steered
from sae_query_steer.progress import OnMetrics
from sae_query_steer.sae.encoders import QueryEncoder, device_of
from sae_query_steer.scopes.joins import scope_name
from sae_query_steer.steering.files import steerer_settings
from sae_query_steer.steering.latent_descent import LatentGradientSteerer
from sae_query_steer.targets.centroids import Learned, LearnedTargets
from sae_query_steer.targets.fingerprint import check_encoders, take_fingerprint


class LearningWarning(UserWarning):
    """Learning did not lower the loss on the examples that were held out."""


def no_moves(
    model: Any, saes: Mapping[str, QueryEncoder], classes: Iterable[str]
) -> LearnedTargets:
    """Return moves of length 0, from which a `TargetLearner` starts.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        saes: encoders by hook name.
        classes: names of the classes, two or more.
    """
    names = ordered_classes(classes)
    check_encoders(model, saes)
    means = {
        name: torch.zeros(
            len(names), sae.n_heads, sae.d_latent, device=device_of(sae) or model.cfg.device
        )
        for name, sae in saes.items()
    }
    return LearnedTargets(
        classes=names,
        means=means,
        variances={name: torch.zeros_like(mean) for name, mean in means.items()},
        counts=torch.ones(len(names), dtype=torch.long),
        span="none",
        fingerprint=take_fingerprint(model, saes),
        learned=Learned(kind="moves", unsteered={}, steered={}, history=()),
    )


@dataclass(frozen=True, eq=False, repr=False)
class TargetLearner:
    """Learns the targets of a steerer, so that the model writes what the class would.

    The steerer is the recipe: its SAEs, sites, heads, scope, objective, steps, limits and its
    targets, from which learning starts. With centroids the points to which latents descend are
    learned, through the K projected steps; with `no_moves` and the objective `FixedMove`, moves
    that are added. Over `identity_encoders` both are dense. The classes are learned independently
    of each other, in the same batches, by Adam; values stay within the latent range. The model's
    weights get no gradient.

    >>> start = no_moves(model, saes, ["create", "remember"])
    >>> recipe = LatentGradientSteerer(
    ...     saes, start, target="create", objective=FixedMove(), n_steps=1, step_size=1.0,
    ...     max_relative_change=0.5, scope=LastPromptToken() | ResponseTokens())
    >>> learner = TargetLearner(model, recipe, l1=0.1)
    >>> steerer = replace(recipe, targets=learner.fit(examples, counterparts=requested))

    Raises:
        TypeError: the steerer is no `LatentGradientSteerer`.
        ValueError: a number that is not allowed.

    Source: our choice. Static sparse vectors learned through the model are known as SAE-SSV;
    pruning by magnitude on a schedule is arXiv 1710.01878.
    """

    model: Any
    """A HookedTransformer or a TransformerBridge."""

    steerer: LatentGradientSteerer
    """The recipe; its own target does not matter."""

    _: KW_ONLY

    l1: float = 0.0
    """Penalty in nats for latents that move, by the sum of their moves in units of the query's
    norm, averaged over tokens, sites and heads."""

    n_latents: int | None = None
    """Latents of each head that are not 0 in a target at most, 1 or more. Those of least magnitude
    are set to 0 step by step over the first 60 % of the updates. Points need
    `latents=TargetLatents()` in the steerer, or the others would move as well."""

    n_latents_total: int | None = None
    """The same over all heads and sites of a target."""

    n_updates: int = 60
    """Most updates."""

    learning_rate: float = 0.05
    """Of Adam, in units of the root mean square of the head's query."""

    batch_size: int = 24
    """Examples of an update."""

    every: int = 5
    """Updates between two evaluations on the examples that are held out."""

    patience: int = 4
    """Evaluations without a better one, for any class, after which learning stops."""

    seed: int = 0
    """Of the order of the batches."""

    ranks: Ranks = ALONE
    """The processes of a launch, all of which fit the same: each takes a share of the rows of every
    update and of those held out. Losses, targets and gradients are those of one process up to
    rounding, and the same in all."""

    def __post_init__(self) -> None:
        check_kind("steerer", self.steerer, LatentGradientSteerer, "it says what is learned")
        check_number("l1", self.l1, least=0)
        check_number("learning_rate", self.learning_rate, above=0)
        for name in ("n_updates", "batch_size", "every", "patience"):
            check_number(name, getattr(self, name), whole=True, least=1)
        limits = {"n_latents": self.n_latents, "n_latents_total": self.n_latents_total}
        limits = {name: value for name, value in limits.items() if value is not None}
        for name, value in limits.items():
            check_number(name, value, whole=True, least=1)
        if limits and not self.steerer.targets.are_moves:
            latents = self.steerer.latents
            check_kind("latents of the steerer", latents, TargetLatents, "or learn moves")
        self.steerer.check_model(self.model)

    def _digest(self, examples: Sequence[TokenizedExample], held_out: Sequence[int] | None) -> str:
        """Return a digest of all that decides the targets."""
        settings = {k: v for k, v in vars(self).items() if k not in ("model", "steerer", "ranks")}
        settings |= steerer_settings(self.steerer)
        settings["held_out"] = None if held_out is None else [int(index) for index in held_out]
        found = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for example in examples:
            found.update(repr((example.label, example.prompt_length)).encode())
            found.update(example.tokens.numpy().tobytes())
        targets = self.steerer.targets
        for tensor in (*targets.means.values(), *targets.fingerprint.to_tensors().values()):
            found.update(tensor.float().cpu().numpy().tobytes())
        return found.hexdigest()

    def rows(
        self,
        examples: TokenizedExamples,
        *,
        counterparts: TokenizedExamples | None = None,
        held_out: Sequence[int] | None = None,
    ) -> SplitRows:
        """Return what `fit` reads; give it to the `fit` of several learners to run prompts once.

        The learners must have the same model, classes, scope, batch_size, seed and ranks. Args and
        Raises as `fit`.
        """
        check_tokenized(examples)
        check_not_steered(self.model)
        if counterparts is not None:
            check_counterparts(examples, counterparts)
        with frozen([self.model, *self.steerer.saes.values()]):
            return split_rows(
                self.model,
                examples,
                counterparts,
                classes=self.steerer.targets.classes,
                scope=self.steerer.scope,
                held_out=held_out,
                batch_size=self.batch_size,
                seed=self.seed,
                ranks=self.ranks,
            )

    def fit(
        self,
        examples: TokenizedExamples,
        *,
        counterparts: TokenizedExamples | None = None,
        held_out: Sequence[int] | None = None,
        checkpoint: str | Path | None = None,
        rows: SplitRows | None = None,
        on_metrics: OnMetrics | None = None,
    ) -> LearnedTargets:
        """Return targets with which the steered model writes the responses of each class.

        Without counterparts the loss is minus the log-likelihood of the response, a token; with
        them KL(model after the counterpart || steered model), averaged over the tokens of the
        response and the one after it. So counterparts with blank responses learn the next token.

        Args:
            examples: prompts that do not request the class, with responses of the class. The cache
                of their prompts and, with counterparts, the log probabilities are kept in memory.
            counterparts: the same responses after prompts that request the class, in order.
            held_out: indices of examples on which the best update of each class is chosen; choose
                those of other topics. None means every fourth example of each class.
            checkpoint: a folder that is written at each evaluation, from which a stopped run
                continues with the same numbers, by any number of processes that all can read it;
                removed at the end. None writes nothing.
            rows: of `rows` with the same examples, counterparts and held_out.
            on_metrics: called at each evaluation, by the first process, with a mapping of "step"
                and, for each class, the columns of `LearnedTargets.history` as "COLUMN/CLASS".

        Raises:
            RuntimeError: another process has ended, or can't be reached.
            ValueError: a class of the steerer without examples to learn from or held out, an
                example without response or without a token in the scope, counterparts that do not
                fit, a model that is being steered, a loss that is not finite, or a checkpoint of
                another run.

        Warns:
            LearningWarning: no update lowered the held-out loss of a class below that without
                steering; its target is the best that was found, which may be the start.
        """
        run = self._run(examples, counterparts, held_out, rows)
        if checkpoint is not None:
            run.checkpoint = Path(checkpoint)
            run.digest = self._digest([*examples, *(counterparts or ())], held_out)
        run.on_metrics = on_metrics if self.ranks.rank == 0 else None
        with frozen([self.model, *self.steerer.saes.values()]):
            run.run()
        return self._targets(run, examples)

    def fit_output_scores(
        self,
        examples: TokenizedExamples,
        *,
        counterparts: TokenizedExamples | None = None,
        held_out: Sequence[int] | None = None,
        rows: SplitRows | None = None,
    ) -> LearnedTargets:
        """Return moves of the latents that lower the loss of `fit` most, without an update.

        The output score of a latent is how fast the loss of a class falls, at first order, with
        what is added to the latent. The latents of the highest scores, as many as `n_latents` and
        `n_latents_total` allow, move in proportion to them. Of each class the moves have the length
        of the query in the root mean square over heads; choose the step size on other examples.

        Args and Raises as `fit`, and ValueError for points.

        Warns:
            LearningWarning: the moves do not lower the held-out loss of a class at this step size.

        Source: after arXiv 2505.20063, of which the abstract was read. Its output score is the
        rank and the probability of the tokens that represent a latent, while it is amplified.
        Latents of queries represent no token by themselves, so ours is the gradient of the loss of
        the class's answers.
        """
        if not self.steerer.targets.are_moves:
            raise ValueError(
                "targets of the learner's steerer must be moves, got points: begin with `no_moves`"
            )
        run = self._run(examples, counterparts, held_out, rows)
        with frozen([self.model, *self.steerer.saes.values()]):
            run.score_outputs()
        return self._targets(run, examples)

    def _run(
        self,
        examples: TokenizedExamples,
        counterparts: TokenizedExamples | None,
        held_out: Sequence[int] | None,
        rows: SplitRows | None,
    ) -> LearningRun:
        """Return a run over the rows of examples; Args and Raises as `fit`."""
        if rows is None:
            rows = self.rows(examples, counterparts=counterparts, held_out=held_out)
        check_not_steered(self.model)
        classes = self.steerer.targets.classes
        own = (classes, scope_name(self.steerer.scope), self.batch_size, self.seed, self.ranks)
        if rows.made_with != own:
            raise ValueError(
                f"rows must be of a learner with the same classes, scope, batch_size, seed and "
                f"ranks, {own}, got {rows.made_with}: make them with this learner's `rows`"
            )
        return LearningRun(self, rows.learned, rows.held_out)

    def _targets(self, run: LearningRun, examples: TokenizedExamples) -> LearnedTargets:
        start = self.steerer.targets
        means = {name: mean.clone() for name, mean in start.means.items()}
        for name, at in self.steerer.where.chosen.items():
            means[name][:, list(at.heads)] = run.best[name].to(means[name])
        found = LearnedTargets(
            classes=start.classes,
            means=means,
            variances=start.variances,
            counts=torch.tensor([examples.labels.count(name) for name in start.classes]),
            span=scope_name(self.steerer.scope),
            fingerprint=start.fingerprint,
            prepend_bos=examples.prepend_bos,
            chat_template=examples.chat_template,
            learned=Learned(
                kind="moves" if start.are_moves else "points",
                unsteered=run.unsteered,
                steered=run.lowest,
                history=tuple(run.history),
            ),
        )
        if failed := [name for name, share in found.share_removed.items() if share <= 0]:
            warnings.warn(
                f"nothing was learned for {failed}: no update brought the held-out loss below that "
                "without steering; use other layers, a larger max_relative_change, more examples, "
                "or less l1",
                LearningWarning,
                stacklevel=3,
            )
        return found
