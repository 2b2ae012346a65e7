"""What methods write on labelled prompts, judged and weighed: target rate and perplexity ratio."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from torch import Tensor

from sae_query_steer.data import LabelledExample
from sae_query_steer.evaluation.comparison import Method, Outcome
from sae_query_steer.evaluation.generation import (
    Continuations,
    continuations,
    negative_log_likelihoods,
)
from sae_query_steer.evaluation.judges import Judge
from sae_query_steer.evaluation.sampling import check_temperature
from sae_query_steer.evaluation.sweep_log import SweepLog


@dataclass(frozen=True, kw_only=True)
class SteeringCase:
    """A prompt, and the class that what is written after it is to have."""

    prompt: str
    """The text to continue."""

    target: str
    """The class."""

    source: str | None = None
    """The class that the prompt leads to by itself, where that is known."""

    requesting: str | None = None
    """The same prompt with a request for the target, where the task has such."""


def cases_of(examples: Sequence[LabelledExample], n: int) -> list[SteeringCase]:
    """Return n cases from labelled prompts: each is to become another class than its own.

    Sources and targets come in turn, so that each pair is about as frequent as any other; a prompt
    is used again, for another target, only after all of its class were used.

    Args:
        examples: labelled prompts of at least two classes.
        n: how many cases.

    Raises:
        ValueError: fewer than two classes, or more cases than prompts and other classes give.
    """
    pools: dict[str, list[str]] = {}
    for example in examples:
        pools.setdefault(str(example.label), []).append(example.prompt)
    classes = sorted(pools)
    others = len(classes) - 1
    if others < 1:
        raise ValueError(f"the labels are {classes}: steering needs two classes or more")
    cases = []
    for lap in range(max(map(len, pools.values())) * others):
        for index, source in enumerate(classes):
            round_, place = divmod(lap, len(pools[source]))
            if round_ < others:
                target = classes[(index + 1 + (place + round_) % others) % len(classes)]
                prompt = pools[source][place]
                cases.append(SteeringCase(prompt=prompt, target=target, source=source))
    if not 1 <= n <= len(cases):
        raise ValueError(
            f"n={n} cases are not allowed: {len(examples)} prompts of {len(classes)} classes give "
            f"1 to {len(cases)}"
        )
    return cases[:n]


def check_writing(max_new_tokens: int, temperature: float | None) -> None:
    """Raise unless texts of this length can be written at this temperature.

    Raises:
        ValueError: fewer than one token, or a temperature that can't be sampled at.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} is not allowed: give 1 or more")
    if temperature is not None:
        check_temperature(temperature)


@dataclass(eq=False)
class TextScorer:
    """Scores methods on the cases of some tasks; what was done before is read from a log."""

    model: Any
    """A HookedTransformer or a TransformerBridge."""

    cases: Mapping[str, Sequence[SteeringCase]]
    """By task."""

    judge: Judge
    """Tells the class of a text."""

    _: KW_ONLY

    max_new_tokens: int
    """Most tokens of a text."""

    split: str
    """Name of the split that the cases are from, for the log."""

    log: SweepLog | None = None
    """Where outcomes are kept as they come, and read from when a sweep goes on."""

    temperature: float | None = None
    """Of sampling; None decodes greedily."""

    seed: int = 0
    """Of sampling: case i of a task draws by (seed, i), whatever batch it is in."""

    batch_size: int = 64
    """Rows of one call of `generate`."""

    _reference: dict[tuple[str, str], float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        check_writing(self.max_new_tokens, self.temperature)
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} is not allowed: give 1 or more")

    def score(
        self, method: Method[SteeringCase], strength: float, tasks: Sequence[str]
    ) -> dict[str, Outcome]:
        """Return what a method does at a strength, task by task."""
        return {task: self._outcome(method, strength, task) for task in tasks}

    def _outcome(self, method: Method[SteeringCase], strength: float, task: str) -> Outcome:
        cases = self.cases[task]
        key = {
            "split": self.split,
            "task": task,
            "method": method.name,
            "objective": method.objective,
            "centroids": method.centroids,
            "span": method.span,
            "scope": method.scope,
            "layers": None if method.layers is None else list(method.layers),
            "heads": None if method.heads is None else list(method.heads),
            "n_steps": method.n_steps,
            "strength": float(strength),
            "cases": len(cases),
        }
        known = None if self.log is None else self.log.get(key)
        if known is None:
            known = self._measured(method, strength, task)
            if self.log is not None:
                self.log.add(key, known)
        target = [a == c.target for a, c in zip(known["judged"], cases, strict=True)]
        return Outcome(strength=float(strength), target=target, success=target, **known)

    def _measured(self, method: Method[SteeringCase], strength: float, task: str) -> dict[str, Any]:
        cases = self.cases[task]
        parts = [
            self._written(method, strength, cases[start : start + self.batch_size], start)
            for start in range(0, len(cases), self.batch_size)
        ]
        texts = [text for part in parts for text in part.texts]
        tokens = [row for part in parts for row in part.tokens]
        changes = [change for part in parts for change in part.relative_changes]
        return {
            "texts": texts,
            "judged": self.judge([case.prompt for case in cases], texts),
            "perplexity_ratio": self._ratio(task, "requesting", tokens),
            "perplexity_ratio_original": self._ratio(task, "prompt", tokens),
            "delta_q_ratio": sum(changes) / len(changes),
        }

    def _written(
        self,
        method: Method[SteeringCase],
        strength: float,
        cases: Sequence[SteeringCase],
        start: int,
    ) -> Continuations:
        prompts = (
            [case.prompt for case in cases] if method.prompts is None else method.prompts(cases)
        )
        steerer = None if method.steerer is None else method.steerer(cases, strength)
        return self._continued(prompts, start, steerer)

    def _continued(self, prompts: Sequence[str], start: int, steerer: Any = None) -> Continuations:
        seeds = [self.seed * 1_000_003 + start + row for row in range(len(prompts))]
        return continuations(
            self.model,
            prompts,
            max_new_tokens=self.max_new_tokens,
            steerer=steerer,
            batch_size=len(prompts),
            temperature=self.temperature,
            seeds=None if self.temperature is None else seeds,
        )

    def _ratio(self, task: str, given: str, tokens: Sequence[Tensor]) -> float:
        prompts = [getattr(c, given) or c.prompt for c in self.cases[task]]
        if (task, given) not in self._reference:
            own = [
                row
                for start in range(0, len(prompts), self.batch_size)
                for row in self._continued(prompts[start : start + self.batch_size], start).tokens
            ]
            self._reference[task, given] = self._mean_loss(prompts, own)
        return math.exp(self._mean_loss(prompts, tokens) - self._reference[task, given])

    def _mean_loss(self, prompts: Sequence[str], tokens: Sequence[Tensor]) -> float:
        losses = negative_log_likelihoods(self.model, prompts, tokens)
        return sum(losses) / sum(map(len, tokens))
