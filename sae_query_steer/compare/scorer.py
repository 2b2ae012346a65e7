"""Scores methods on cases: target rate, perplexity ratio, specificity."""

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from torch import Tensor

from sae_query_steer.arguments import check_number
from sae_query_steer.compare.generation import (
    Continuations,
    continuations,
    divergences,
    negative_log_likelihoods,
)
from sae_query_steer.compare.judges import Judge
from sae_query_steer.compare.log import ComparisonLog
from sae_query_steer.compare.methods import Method, SteeringCase
from sae_query_steer.data.prompts import ChatTemplate
from sae_query_steer.models.prefix import PromptCaches
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

    @property
    def target(self) -> list[bool]:
        """Whether the judge finds the target class."""
        return [a == case.target for a, case in zip(self.judged, self.cases, strict=True)]

    @property
    def source(self) -> list[bool] | None:
        """Whether the class is still the prompt's own; None if a source is unknown."""
        if any(case.source is None for case in self.cases):
            return None
        return [a == case.source for a, case in zip(self.judged, self.cases, strict=True)]

    @property
    def grounded(self) -> list[bool] | None:
        """Whether the text takes up the target's part; None without a grounding judge."""
        if self.taken_up is None:
            return None
        return [a == case.target for a, case in zip(self.taken_up, self.cases, strict=True)]

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

    _losses: dict[tuple[str, bytes], float] = field(init=False, default_factory=dict)
    """-log p of the tokens after a prompt, which several methods may write."""

    def __post_init__(self) -> None:
        check_number("cache_bytes", self.cache_bytes, whole=True, least=0)
        self._caches = PromptCaches(self.model, self.cache_bytes)
        check_number("max_new_tokens", self.max_new_tokens, whole=True, least=1)
        check_number("batch_size", self.batch_size, whole=True, least=1)
        if self.temperature is not None:
            check_number("temperature", self.temperature, least=1e-6)

    def score(self, method: Method, strength: float, tasks: Sequence[str]) -> dict[str, Outcome]:
        """Return a method's outcome at a strength, by task."""
        keys = {
            task: {
                "split": self.split,
                "task": task,
                **method.columns(),
                "n_steps": method.n_steps,
                "strength": float(strength),
                "cases": len(self.cases[task]),
            }
            for task in tasks
        }
        logged = {} if self.log is None else {task: self.log.get(keys[task]) for task in tasks}
        known = {task: found for task, found in logged.items() if found is not None}
        new = [task for task in tasks if task not in known]
        with warnings.catch_warnings():  # the largest strengths of a grid are meant to be too large
            warnings.simplefilter("ignore", SteeringWarning)
            measured = self._measured(method, strength, new)
        for task, found in measured.items():
            known[task] = found
            if self.log is not None:
                self.log.add(keys[task], found)
        return {
            task: Outcome(cases=self.cases[task], strength=float(strength), **known[task])
            for task in tasks
        }

    def _measured(
        self, method: Method, strength: float, tasks: Sequence[str]
    ) -> dict[str, dict[str, Any]]:
        """Return what a method does on some tasks, whose cases share the batches."""
        rows = [(case, i) for task in tasks for i, case in enumerate(self.cases[task])]
        written: list[tuple[str, Tensor, float]] = []
        for start in range(0, len(rows), self.batch_size):
            part = rows[start : start + self.batch_size]
            cases = [case for case, _ in part]
            prompts = [c.prompt for c in cases] if method.prompts is None else method.prompts(cases)
            steerer = None if method.steerer is None else method.steerer(cases, strength)
            made = self._continued(prompts, [self._seed(i) for _, i in part], steerer)
            written += zip(made.texts, made.tokens, made.relative_changes, strict=True)
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
        for start in range(0, len(cases), self.batch_size):
            part = slice(start, start + self.batch_size)
            own = [self._plain[p, self._seed(start + i)] for i, p in enumerate(asking[part])]
            steerer = method.steerer(cases[part], strength)
            found += divergences(
                self.model, asking[part], own, steerer, chat_template=self.chat_template
            )
        return sum(found) / len(found)

    def _seed(self, index: int) -> int:
        return self.seed * 1_000_003 + index

    def _continued(
        self, prompts: Sequence[str], seeds: Sequence[int], steerer: Any = None
    ) -> Continuations:
        return continuations(
            self.model,
            prompts,
            max_new_tokens=self.max_new_tokens,
            steerer=steerer,
            batch_size=len(prompts),
            temperature=self.temperature,
            seeds=None if self.temperature is None else seeds,
            chat_template=self.chat_template,
            caches=self._caches,
        )

    def _ratio(self, prompts: Sequence[str], tokens: Sequence[Tensor]) -> float:
        """Return the perplexity of tokens after prompts, divided by that of the model's own."""
        rows = list(zip(prompts, map(self._seed, range(len(prompts))), strict=True))
        new = [row for row in dict.fromkeys(rows) if row not in self._plain]
        for start in range(0, len(new), self.batch_size):
            part = new[start : start + self.batch_size]
            own = self._continued([prompt for prompt, _ in part], [seed for _, seed in part])
            self._plain |= dict(zip(part, own.tokens, strict=True))
        own = self._mean_loss(prompts, [self._plain[row] for row in rows])
        return math.exp(self._mean_loss(prompts, tokens) - own)

    def _mean_loss(self, prompts: Sequence[str], tokens: Sequence[Tensor]) -> float:
        keys = [
            (prompt, hashlib.blake2b(row.numpy().tobytes(), digest_size=16).digest())
            for prompt, row in zip(prompts, tokens, strict=True)
        ]
        for start in range(0, len(keys), self.batch_size):  # the same batches for every method
            part = slice(start, start + self.batch_size)
            if all(key in self._losses for key in keys[part]):
                continue
            losses = negative_log_likelihoods(
                self.model,
                prompts[part],
                tokens[part],
                batch_size=self.batch_size,
                chat_template=self.chat_template,
                caches=self._caches,
            )
            self._losses |= dict(zip(keys[part], losses, strict=True))
        return sum(self._losses[key] for key in keys) / sum(map(len, tokens))
