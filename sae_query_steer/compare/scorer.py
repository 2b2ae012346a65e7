"""Scores methods on cases: target rate, perplexity ratio, specificity."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from operator import eq
from typing import Any

from torch import Tensor

from sae_query_steer.arguments import check_number
from sae_query_steer.compare.generation import (
    COPIES,
    Continuations,
    continuations,
    continuations_side_by_side,
)
from sae_query_steer.compare.judges import Judge
from sae_query_steer.compare.likelihoods import divergences, negative_log_likelihoods
from sae_query_steer.compare.log import ComparisonLog
from sae_query_steer.compare.methods import Method, SteeringCase
from sae_query_steer.data.prompts import ChatTemplate
from sae_query_steer.models.prefix import PromptCaches
from sae_query_steer.progress import progress_bar
from sae_query_steer.steering.engine import SteeringWarning


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What one method wrote on some cases at one strength, and how it was judged."""

    cases: Sequence[SteeringCase]
    strength: float
    texts: Sequence[str]
    """One for each case, like the sequences below."""

    judged: Sequence[str | None]
    """The class that the judge finds in each text."""

    perplexity_ratio: float
    """Perplexity of the texts given the prompts that request the target (or the prompts themselves
    if there are none), divided by that of the model's own texts there."""

    perplexity_ratio_original: float
    """The same given the prompts themselves."""

    delta_q_ratio: float
    """Mean of |delta q| / |q|."""

    specificity: float | None = None
    """Mean KL(unsteered || steered), in nats, of the next tokens of the model's own texts of the
    target class, which should change little; None if not measured."""

    taken_up: Sequence[str | None] | None = None
    """The class whose part of its prompt each text takes up; None without a grounding judge."""

    @staticmethod
    def _same(found: Sequence[str | None], wanted: Sequence[str | None]) -> list[bool]:
        if len(found) != len(wanted):
            raise ValueError(
                f"a judge must return a class, or None, for each of the {len(wanted)} texts, got "
                f"{len(found)}: return as many as it is given"
            )
        return list(map(eq, found, wanted))

    @property
    def target(self) -> list[bool]:
        """Whether the judge finds the target class."""
        return self._same(self.judged, [case.target for case in self.cases])

    @property
    def source(self) -> list[bool] | None:
        """Whether the class is still the prompt's own; None if a source is unknown."""
        sources = [case.source for case in self.cases]
        return None if None in sources else self._same(self.judged, sources)

    @property
    def grounded(self) -> list[bool] | None:
        """Whether the text takes up the target's part; None without a grounding judge."""
        if self.taken_up is None:
            return None
        return self._same(self.taken_up, [case.target for case in self.cases])

    @property
    def success(self) -> list[bool]:
        """Whether the text is of the target class and, if that is judged, grounded."""
        return [a and b for a, b in zip(self.target, self.grounded or self.target, strict=True)]

    @property
    def target_rate(self) -> float:
        """Share of the texts of the target class."""
        return sum(self.target) / len(self.target)

    @property
    def success_rate(self) -> float:
        """Share of the texts that are a success."""
        return sum(self.success) / len(self.success)


@dataclass(eq=False)
class TextScorer:
    """Scores methods on the cases of some tasks; outcomes in the log are not measured again."""

    model: Any
    """A HookedTransformer or a TransformerBridge."""

    cases: Mapping[str, Sequence[SteeringCase]]
    """By task."""

    judge: Judge
    """Finds the class of a text."""

    _: KW_ONLY

    max_new_tokens: int
    """Most tokens of a text."""

    split: str
    """Name of the split of the cases, for the log."""

    log: ComparisonLog | None = None
    """Keeps outcomes, so that a stopped comparison can be resumed."""

    temperature: float | None = None
    """Of sampling; None decodes greedily."""

    seed: int = 0
    """Of sampling: case i of a task draws by (seed, i) in every batch."""

    batch_size: int = 64
    """Rows of one call of `generate`."""

    chat_template: ChatTemplate = False
    """Put every prompt into the tokenizer's chat template as the user's turn."""

    grounding: Judge | None = None
    """Finds the class whose part of its prompt a text takes up; if given, a success must also take
    up the target's part."""

    cache_bytes: int = 2**31
    """Size of the KV caches of prompts that are kept, at most."""

    measures_specificity: bool = False
    """Also steer the model's own texts after the prompts that request the target."""

    measures_original: bool = True
    """Also measure the perplexity given the prompts themselves; NaN otherwise."""

    _plain: dict[tuple[str, int], Tensor] = field(init=False, default_factory=dict)
    """The model's own texts, by prompt and seed."""

    _losses: dict[tuple[str, tuple[int, ...]], float] = field(init=False, default_factory=dict)
    """-log p of the tokens after a prompt, which several methods may write."""

    def __post_init__(self) -> None:
        for name, least in (("cache_bytes", 0), ("max_new_tokens", 1), ("batch_size", 1)):
            check_number(name, getattr(self, name), whole=True, least=least)
        if empty := [task for task, cases in self.cases.items() if not cases]:
            raise ValueError(f"each task must have cases, got none of {empty}: leave it out")
        self._caches = PromptCaches(self.model, self.cache_bytes)
        if self.temperature is not None:
            check_number("temperature", self.temperature, least=1e-6)

    def score(self, method: Method, strength: float, tasks: Sequence[str]) -> dict[str, Outcome]:
        """Return a method's outcome at a strength, by task."""
        return self.score_all([(method, strength, tasks)])[0]

    def score_all(
        self, conditions: Sequence[tuple[Method, float, Sequence[str]]], *, description: str = ""
    ) -> list[dict[str, Outcome]]:
        """Return the outcome of each method at its strength, by task.

        Those that steer the same prompts share their forward passes, see
        `continuations_side_by_side`; the log gets their outcomes together.

        Args:
            conditions: method, strength and tasks.
            description: of a progress bar; none without.
        """
        keys, known, missing = [], [], {}
        for i, (method, strength, tasks) in enumerate(conditions):
            keys.append({task: self._key(method, strength, task) for task in tasks})
            log = {task: self.log and self.log.get(key) for task, key in keys[i].items()}
            known.append({task: found for task, found in log.items() if found})
            if left := tuple(task for task in tasks if task not in known[i]):
                missing.setdefault(left, []).append(i)
        parts = [
            (tasks, some[first : first + COPIES])
            for tasks, some in missing.items()
            for first in range(0, len(some), COPIES)
        ]
        bar = progress_bar(parts, desc=description, unit="batch", disable=not description)
        for tasks, some in bar:
            with warnings.catch_warnings():  # the largest strengths are meant to be too large
                warnings.simplefilter("ignore", SteeringWarning)
                measured = self._measured([conditions[i][:2] for i in some], tasks)
            for i, found in zip(some, measured, strict=True):
                known[i] |= found
                if self.log is not None:
                    for task in tasks:
                        self.log.add(keys[i][task], found[task])
        return [
            {
                task: Outcome(cases=self.cases[task], strength=float(strength), **found[task])
                for task in tasks
            }
            for (_, strength, tasks), found in zip(conditions, known, strict=True)
        ]

    def _key(self, method: Method, strength: float, task: str) -> dict[str, Any]:
        """Return what identifies an outcome in the log."""
        return {
            "split": self.split,
            "task": task,
            **method.columns(),
            "n_steps": method.n_steps,
            "strength": float(strength),
            "cases": len(self.cases[task]),
        }

    def _measured(
        self, conditions: Sequence[tuple[Method, float]], tasks: Sequence[str]
    ) -> list[dict[str, dict[str, Any]]]:
        """Return what each method does on some tasks, whose cases share the batches."""
        rows = [(case, i) for task in tasks for i, case in enumerate(self.cases[task])]
        written: list[list[tuple[str, Tensor, float]]] = [[] for _ in conditions]
        for part in self._batches(rows):
            cases, seeds = [case for case, _ in part], [self._seed(i) for _, i in part]
            for own, made in zip(written, self._written(conditions, cases, seeds), strict=True):
                own += zip(made.texts, made.tokens, made.relative_changes, strict=True)
        return [
            self._judged(method, strength, tasks, own)
            for (method, strength), own in zip(conditions, written, strict=True)
        ]

    def _written(
        self,
        conditions: Sequence[tuple[Method, float]],
        cases: Sequence[SteeringCase],
        seeds: Sequence[int],
    ) -> list[Continuations]:
        """Return what each method writes on one batch of cases."""
        steerers = [None if m.steerer is None else m.steerer(cases, s) for m, s in conditions]
        prompts = [case.prompt for case in cases]
        together = [i for i, (method, _) in enumerate(conditions) if method.prompts is None]
        found = {}
        if together:
            some = [steerers[i] for i in together]
            made = continuations_side_by_side(self.model, prompts, some, **self._generation(seeds))
            found = dict(zip(together, made, strict=True))
        for i, (method, _) in enumerate(conditions):
            if method.prompts is not None:
                found[i] = self._continued(method.prompts(cases), seeds, steerers[i])
        return [found[i] for i in range(len(conditions))]

    def _judged(
        self,
        method: Method,
        strength: float,
        tasks: Sequence[str],
        written: Sequence[tuple[str, Tensor, float]],
    ) -> dict[str, dict[str, Any]]:
        """Return the scores of what a method wrote, by task."""
        found = {}
        for task in tasks:
            cases = self.cases[task]
            own, written = written[: len(cases)], written[len(cases) :]
            prompts, (texts, tokens, changes) = [c.prompt for c in cases], zip(*own, strict=True)
            found[task] = {
                "texts": texts,
                "judged": self.judge(prompts, texts),
                "taken_up": None if self.grounding is None else self.grounding(prompts, texts),
                "perplexity_ratio": self._ratio([c.requesting or c.prompt for c in cases], tokens),
                "perplexity_ratio_original": (
                    self._ratio(prompts, tokens) if self.measures_original else math.nan
                ),
                "delta_q_ratio": sum(changes) / len(changes),
                "specificity": self._specificity(method, strength, cases),
            }
        return found

    def _specificity(
        self, method: Method, strength: float, cases: Sequence[SteeringCase]
    ) -> float | None:
        asking = [case.requesting for case in cases if case.requesting is not None]
        if not self.measures_specificity or method.steerer is None or len(asking) < len(cases):
            return None
        found = []
        for part in self._batches(range(len(cases))):
            steerer = method.steerer([cases[i] for i in part], strength)
            prompts = [asking[i] for i in part]
            own = [self._plain[asking[i], self._seed(i)] for i in part]
            found += divergences(
                self.model, prompts, own, steerer, chat_template=self.chat_template
            )
        return sum(found) / len(found)

    def _batches(self, rows: Sequence[Any]) -> list[Sequence[Any]]:
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def _seed(self, index: int) -> int:
        return self.seed * 1_000_003 + index

    def _continued(
        self, prompts: Sequence[str], seeds: Sequence[int], steerer: Any = None
    ) -> Continuations:
        return continuations(
            self.model,
            prompts,
            steerer=steerer,
            batch_size=self.batch_size,
            **self._generation(seeds),
        )

    def _generation(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Return settings of `continuations`."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "seeds": None if self.temperature is None else seeds,
            "chat_template": self.chat_template,
            "caches": self._caches,
        }

    def _ratio(self, prompts: Sequence[str], tokens: Sequence[Tensor]) -> float:
        """Return the perplexity of tokens after prompts, divided by that of the model's own."""
        rows = list(zip(prompts, map(self._seed, range(len(prompts))), strict=True))
        new = [row for row in dict.fromkeys(rows) if row not in self._plain]
        own = self._continued([prompt for prompt, _ in new], [seed for _, seed in new])
        self._plain |= dict(zip(new, own.tokens, strict=True))
        own = self._mean_loss(prompts, [self._plain[row] for row in rows])
        return math.exp(self._mean_loss(prompts, tokens) - own)

    def _mean_loss(self, prompts: Sequence[str], tokens: Sequence[Tensor]) -> float:
        keys = [(p, tuple(row.tolist())) for p, row in zip(prompts, tokens, strict=True)]
        if not self._losses.keys() >= set(keys):  # all, in the same batches for every method
            losses = negative_log_likelihoods(
                self.model,
                prompts,
                tokens,
                batch_size=self.batch_size,
                chat_template=self.chat_template,
                caches=self._caches,
            )
            self._losses |= dict(zip(keys, losses, strict=True))
        return sum(self._losses[key] for key in keys) / sum(map(len, tokens))
