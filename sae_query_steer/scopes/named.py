"""Named scopes: the prompt, the response, parts of both, and windows of positions.

All join with `|`, `&` and `~`, and all mean absolute positions without padding.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from sae_query_steer.arguments import check_number
from sae_query_steer.scopes.joins import Joinable
from sae_query_steer.scopes.positions import NO_PROMPT, Positions


@dataclass(frozen=True)
class EveryPosition(Joinable):
    """Every real token of the row; never padding."""

    def __call__(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Return the real columns."""
        return positions.valid


class _AroundPromptEnd(Joinable):
    """Positions from `start` up to `stop`, counted from the prompt's end: 0 is the token after it.

    None means without limit.
    """

    start: int | None
    stop: int | None

    def __call__(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Return the columns whose distance from the prompt's end is within the limits."""
        if positions.prompt_lengths is None:
            raise ValueError(f"{self!r} must know {NO_PROMPT}, or use EveryPosition()")
        from_end = positions.index - positions.prompt_lengths[:, None]
        return _between(from_end, self.start, self.stop)


@dataclass(frozen=True)
class PromptTokens(_AroundPromptEnd):
    """Every token of the prompt, BOS and any chat template included.

    As a scope it acts once per call of `generate`, on the forward pass that reads the prompt.
    """

    start, stop = None, 0


@dataclass(frozen=True)
class LastPromptToken(_AroundPromptEnd):
    """The last token of the prompt: the read-out position whose query starts the response.

    As a scope it acts once per call of `generate`, on the forward pass that reads the prompt.
    """

    start, stop = -1, 0


@dataclass(frozen=True)
class LastPromptTokens(_AroundPromptEnd):
    """The last k tokens of the prompt; all of a prompt that is shorter.

    The prompt's end is the only end that is known while a row is generated. "The last k tokens so
    far" is no scope: a token leaves it when the next one comes, so a cache, which keeps the token
    as it was steered, and a pass without one, which computes it anew, would differ.
    """

    k: int
    """How many, 1 or more."""

    stop = 0

    def __post_init__(self) -> None:
        check_number("k", self.k, whole=True, least=1)

    @property
    def start(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The first position."""
        return -self.k


@dataclass(frozen=True)
class ResponseTokens(_AroundPromptEnd):
    """Every token after the prompt: the response of an example, or the generated tokens."""

    start, stop = 0, None


@dataclass(frozen=True)
class FirstResponseTokens(_AroundPromptEnd):
    """The first n tokens after the prompt: of the response of an example, or generated ones.

    The query of a token shapes the token after it. So the first generated token depends on
    `LastPromptToken`, and the last one that `generate` returns is never read and never steered.
    """

    n: int
    """How many, 1 or more."""

    start = 0

    def __post_init__(self) -> None:
        check_number("n", self.n, whole=True, least=1)

    @property
    def stop(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The position after the last."""
        return self.n


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
    """The position after the last, above `start`; None means without end."""

    def __post_init__(self) -> None:
        check_number("start", self.start, whole=True, least=0)
        if self.stop is not None:
            check_number("stop", self.stop, whole=True, above=self.start)

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
    """The position after the last, above `start`; None means without end."""

    def __post_init__(self) -> None:
        if self.start is not None:
            check_number("start", self.start, whole=True)
        if self.stop is not None:
            check_number("stop", self.stop, whole=True, above=self.start)


def _between(values: Tensor, start: int | None, stop: int | None) -> Tensor:
    inside = torch.ones_like(values, dtype=torch.bool)
    if start is not None:
        inside &= values >= start
    return inside if stop is None else inside & (values < stop)
