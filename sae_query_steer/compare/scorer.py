"""Scores methods on cases: target rate, perplexity ratio, specificity."""

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from torch import Tensor

from sae_query_steer.compare.cases import SteeringCase
from sae_query_steer.compare.generation import (
    Continuations,
    continuations,
    divergences,
    negative_log_likelihoods,
)
from sae_query_steer.compare.judges import Judge
from sae_query_steer.compare.log import ComparisonLog
from sae_query_steer.compare.methods import Method
from sae_query_steer.compare.outcomes import Outcome
from sae_query_steer.compare.sampling import check_temperature
from sae_query_steer.steering.engine import SteeringWarning


def check_writing(max_new_tokens: int, temperature: float | None) -> None:
    """Raise unless texts of this length can be written at this temperature.

    Raises:
        ValueError: fewer than one token, or a temperature that can't be sampled at.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    if temperature is not None:
        check_temperature(temperature)


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
    """Name of the split that the cases are from, for the log."""

    log: ComparisonLog | None = None
    """Keeps outcomes as they come, so that a stopped comparison continues."""

    temperature: float | None = None
    """Of sampling; None decodes greedily."""

    seed: int = 0
    """Of sampling: case i of a task draws by (seed, i), whatever batch it is in."""

    batch_size: int = 64
    """Rows of one call of `generate`."""

    chat_template: bool = False
    """Put every prompt into the tokenizer's chat template, as the user's turn."""

    grounding: Judge | None = None
    """Finds the class whose part of its prompt a text takes up: then a success is a text of the
    target class that takes up the target's part."""

    measures_specificity: bool = False
    """Also steer the model's own texts after the prompts that request the target."""

    _plain: dict[tuple[str, int], Tensor] = field(init=False, default_factory=dict)
    """The model's own texts, by prompt and seed."""

    _losses: dict[tuple[str, bytes], float] = field(init=False, default_factory=dict)
    """-log p of the tokens after a prompt, which several methods may write."""

    def __post_init__(self) -> None:
        check_writing(self.max_new_tokens, self.temperature)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size}")

    def score(self, method: Method, strength: float, tasks: Sequence[str]) -> dict[str, Outcome]:
        """Return what a method does at a strength, task by task."""
        keys = {task: self._key(method, strength, task) for task in tasks}
        known = {} if self.log is None else {task: self.log.get(keys[task]) for task in tasks}
        new = [task for task in tasks if known.get(task) is None]
        with warnings.catch_warnings():  # the largest strengths of a grid are meant to be too large
            warnings.simplefilter("ignore", SteeringWarning)
            measured = self._measured(method, strength, new)
        for task, found in measured.items():
            known[task] = found
            if self.log is not None:
                self.log.add(keys[task], found)
        return {
            task: Outcome(cases=self.cases[task], strength=float(strength), **(known[task] or {}))
            for task in tasks
        }

    def _key(self, method: Method, strength: float, task: str) -> dict[str, Any]:
        return {
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
            "cases": len(self.cases[task]),
        }

    def _measured(
        self, method: Method, strength: float, tasks: Sequence[str]
    ) -> dict[str, dict[str, Any]]:
        """Return what a method does on some tasks, whose cases share the batches."""
        rows = [(case, i) for task in tasks for i, case in enumerate(self.cases[task])]
        parts = [
            self._written(method, strength, rows[start : start + self.batch_size])
            for start in range(0, len(rows), self.batch_size)
        ]
        written = Continuations(
            texts=[text for part in parts for text in part.texts],
            tokens=[row for part in parts for row in part.tokens],
            relative_changes=[change for part in parts for change in part.relative_changes],
        )
        found, start = {}, 0
        for task in tasks:
            cases = self.cases[task]
            own = slice(start, start + len(cases))
            start = own.stop
            prompts, texts = [case.prompt for case in cases], written.texts[own]
            changes = written.relative_changes[own]
            found[task] = {
                "texts": texts,
                "judged": self.judge(prompts, texts),
                "taken_up": None if self.grounding is None else self.grounding(prompts, texts),
                "perplexity_ratio": self._ratio(
                    [case.requesting or case.prompt for case in cases], written.tokens[own]
                ),
                "perplexity_ratio_original": self._ratio(prompts, written.tokens[own]),
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

    def _written(
        self, method: Method, strength: float, rows: Sequence[tuple[SteeringCase, int]]
    ) -> Continuations:
        cases = [case for case, _ in rows]
        prompts = [c.prompt for c in cases] if method.prompts is None else method.prompts(cases)
        steerer = None if method.steerer is None else method.steerer(cases, strength)
        return self._continued(prompts, [self._seed(i) for _, i in rows], steerer)

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
        )

    def _ratio(self, prompts: Sequence[str], tokens: Sequence[Tensor]) -> float:
        """Return the perplexity of tokens after prompts, over that of the model's own."""
        rows = list(zip(prompts, map(self._seed, range(len(prompts))), strict=True))
        new = [row for row in dict.fromkeys(rows) if row not in self._plain]
        for start in range(0, len(new), self.batch_size):
            part = new[start : start + self.batch_size]
            own = self._continued([prompt for prompt, _ in part], [seed for _, seed in part])
            self._plain |= dict(zip(part, own.tokens, strict=True))
        own = self._mean_loss(prompts, [self._plain[row] for row in rows])
        return math.exp(self._mean_loss(prompts, tokens) - own)

    def _mean_loss(self, prompts: Sequence[str], tokens: Sequence[Tensor]) -> float:
        keys = [(p, _digest(row)) for p, row in zip(prompts, tokens, strict=True)]
        new = [i for i, key in enumerate(keys) if key not in self._losses]
        losses = negative_log_likelihoods(
            self.model,
            [prompts[i] for i in new],
            [tokens[i] for i in new],
            chat_template=self.chat_template,
        )
        self._losses |= {keys[i]: loss for i, loss in zip(new, losses, strict=True)}
        return sum(self._losses[key] for key in keys) / sum(map(len, tokens))


def _digest(tokens: Tensor) -> bytes:
    return hashlib.blake2b(tokens.numpy().tobytes(), digest_size=16).digest()
