"""Named scopes: the prompt, the response, parts of both, and windows of positions.

All join with `|`, `&` and `~`, and all mean absolute positions without padding.
"""

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from sae_query_steer.scopes.joins import Cuts, Joinable
from sae_query_steer.scopes.positions import Positions, known_prompt_lengths


@dataclass(frozen=True)
class EveryPosition(Joinable):
    """Every real token of the row; never padding."""

    def _cuts(self) -> Cuts:
        return Cuts()

    def __call__(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Return the real columns."""
        return positions.valid


class _AroundPromptEnd(Joinable):
    """Positions between two limits, counted from the prompt's end: 0 is the token after it."""

    def _limits(self) -> tuple[int | None, int | None]:
        """Return the first position and the one after the last; None means without limit."""
        raise NotImplementedError

    def _cuts(self) -> Cuts:
        return Cuts(from_prompt_end=frozenset(end for end in self._limits() if end is not None))

    def __call__(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Return the columns whose distance from the prompt's end is within the limits."""
        from_end = positions.index - known_prompt_lengths(positions, self)[:, None]
        return _between(from_end, *self._limits())


@dataclass(frozen=True)
class PromptTokens(_AroundPromptEnd):
    """Every token of the prompt, BOS and any chat template included.

    As a scope it acts once per call of `generate`, on the forward pass that reads the prompt.
    """

    def _limits(self) -> tuple[int | None, int | None]:
        return None, 0


@dataclass(frozen=True)
class LastPromptToken(_AroundPromptEnd):
    """The last token of the prompt: the read-out position whose query starts the response.

    As a scope it acts once per call of `generate`, on the forward pass that reads the prompt.
    """

    def _limits(self) -> tuple[int | None, int | None]:
        return -1, 0


@dataclass(frozen=True)
class LastPromptTokens(_AroundPromptEnd):
    """The last k tokens of the prompt; all of a prompt that is shorter.

    The prompt's end is the only end that is known while a row is generated. "The last k tokens so
    far" is no scope: a token leaves it when the next one comes, so a cache, which keeps the token
    as it was steered, and a pass without one, which computes it anew, would differ.
    """

    k: int
    """How many, 1 or more."""

    def __post_init__(self) -> None:
        _store_number(self, "k", at_least=1)

    def _limits(self) -> tuple[int | None, int | None]:
        return -self.k, 0


@dataclass(frozen=True)
class ResponseTokens(_AroundPromptEnd):
    """Every token after the prompt: the response of an example, or the generated tokens."""

    def _limits(self) -> tuple[int | None, int | None]:
        return 0, None


@dataclass(frozen=True)
class FirstResponseTokens(_AroundPromptEnd):
    """The first n tokens after the prompt: of the response of an example, or generated ones.

    The query of a token shapes the token after it. So the first generated token depends on
    `LastPromptToken`, and the last one that `generate` returns is never read and never steered.
    """

    n: int
    """How many, 1 or more."""

    def __post_init__(self) -> None:
        _store_number(self, "n", at_least=1)

    def _limits(self) -> tuple[int | None, int | None]:
        return 0, self.n


@dataclass(frozen=True)
class LastResponseToken(Joinable):
    """The last token of the response; a span only, as a running generation has no last token."""

    span_only: ClassVar[str | None] = (
        "LastResponseToken() can't be a scope: the last token of a row is unknown while it is "
        "generated; steer at LastPromptToken(), ResponseTokens() or EveryPosition()"
    )

    def __call__(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Return the column at `length - 1` of each row that has a response."""
        if positions.lengths is None:
            raise ValueError(self.span_only)
        last = positions.index == positions.lengths[:, None] - 1
        return last & ResponseTokens()(positions)


@dataclass(frozen=True)
class Window(Joinable):
    """The positions from `start` up to `stop`, counted from the row's first token.

    It needs no prompt lengths: position 0 is the BOS token, or the first token where there is none.
    """

    start: int
    """The first position, 0 or more."""

    stop: int | None = None
    """The position after the last; None means without end."""

    def __post_init__(self) -> None:
        remedy = "positions count from the row's start; see WindowAroundPromptEnd"
        _store_number(self, "start", at_least=0, remedy=remedy)
        if self.stop is not None:
            _store_number(self, "stop", at_least=0, remedy=remedy)
            _check_order(self, self.start, self.stop)

    def _cuts(self) -> Cuts:
        ends = () if self.stop is None else (self.stop,)
        return Cuts(absolute=frozenset({self.start, *ends}))

    def __call__(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Return the columns whose position is in the window."""
        return _between(positions.index, self.start, self.stop)


@dataclass(frozen=True)
class WindowAroundPromptEnd(_AroundPromptEnd):
    """The positions from `start` up to `stop`, counted from the prompt's end.

    0 is the first token after the prompt and -1 the prompt's last: (-3, 2) are the last three
    tokens of the prompt and the first two of the response.
    """

    start: int | None
    """The first position; None means from the row's first token."""

    stop: int | None = None
    """The position after the last; None means without end."""

    def __post_init__(self) -> None:
        for name in ("start", "stop"):
            if getattr(self, name) is not None:
                _store_number(self, name)
        if self.start is not None and self.stop is not None:
            _check_order(self, self.start, self.stop)

    def _limits(self) -> tuple[int | None, int | None]:
        return self.start, self.stop


def _between(values: Tensor, start: int | None, stop: int | None) -> Tensor:
    inside = torch.ones_like(values, dtype=torch.bool)
    if start is not None:
        inside &= values >= start
    return inside if stop is None else inside & (values < stop)


def check_whole_number(
    scope: str, name: str, value: Any, *, at_least: int | None = None, remedy: str | None = None
) -> int:
    """Return a setting of a scope as an int.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is too small.
    """
    wanted = "a whole number" + ("" if at_least is None else f", {at_least} or more")
    text = f"{scope}: {name} must be {wanted}; got {value!r}" + (f" ({remedy})" if remedy else "")
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(text)
    if at_least is not None and operator.index(value) < at_least:
        raise ValueError(text)
    return operator.index(value)


def _store_number(
    scope: Any, name: str, *, at_least: int | None = None, remedy: str | None = None
) -> None:
    number = check_whole_number(
        type(scope).__name__, name, getattr(scope, name), at_least=at_least, remedy=remedy
    )
    object.__setattr__(scope, name, number)


def _check_order(scope: object, start: int, stop: int) -> None:
    if stop <= start:
        raise ValueError(
            f"{scope!r} names no position: stop is the position after the last, so it must be "
            f"above start; for position {start} alone give stop={start + 1}"
        )
