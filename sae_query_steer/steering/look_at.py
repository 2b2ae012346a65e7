"""What heads are to look at: a phrase of the prompt, what stands between markers, or a scope."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from os.path import commonprefix
from typing import Any, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from sae_query_steer.arguments import check_kind, check_number
from sae_query_steer.descent.attention import AttentionGoal
from sae_query_steer.descent.strength import target_labels
from sae_query_steer.scopes.joins import check_scope, scope_name
from sae_query_steer.scopes.positions import Positions, Scope, check_rows, select
from sae_query_steer.steering.edit import Edit
from sae_query_steer.steering.keys import AttentionKeys

Span = tuple[int, int]
"""Position of the first token, and after the last."""

TextFinder = Callable[[Any, Sequence[int], str | tuple[str, str], int], Span]


@dataclass(frozen=True)
class LookAt:
    """Tokens of a row that heads are to look at, or with a negative weight away from.

    >>> LookAt("compare two things")
    >>> LookAt(("[note]", "[/note]"), weight=-1.0)
    >>> LookAt(AtPositions([[3, 4], [7]]))

    Raises:
        TypeError: the source is none of the three.
        ValueError: a text is empty, or the weight is 0.
    """

    source: str | tuple[str, str] | Scope
    """A phrase: all tokens of the prompt that overlap it. A pair of markers: those that overlap the
    text between them. A scope, or a function from `Positions` to a mask: the tokens that it names
    among all of the row so far. Phrases and markers must stand in the prompt once."""

    weight: float = 1.0
    """Weight of the log of the attention on them; below 0, of the attention on all others."""

    def __post_init__(self) -> None:
        texts = self.source if isinstance(self.source, tuple) else (self.source,)
        if any(isinstance(text, str) for text in texts):
            two = isinstance(self.source, tuple)
            if len(texts) != 1 + two or not all(isinstance(t, str) and t.strip() for t in texts):
                raise ValueError(
                    "source must be a phrase, a pair of markers such as ('<a>', '</a>'), or a "
                    f"scope, got {self.source!r}"
                )
        else:
            check_scope(self.source, name="source", generating=True)
        check_number("weight", self.weight)
        if self.weight == 0:
            raise ValueError("weight must not be 0: give one above 0, or below 0 to look away")

    @property
    def name(self) -> str:
        """What a trace calls it."""
        source = self.source
        texts = source if isinstance(source, tuple) else (source,)
        name = "...".join(t if isinstance(t, str) else scope_name(t) for t in texts)
        return name if self.weight > 0 else f"away from {name}"

    def mask(
        self, rows: Positions, row: int, tokenizer: Any, find: TextFinder
    ) -> Bool[Tensor, " position"]:
        """Return which tokens of a row they are, by absolute position.

        Args:
            rows: all tokens of the rows so far.
            row: which row.
            tokenizer: the model's.
            find: `token_span`, or what remembers its results.

        Raises:
            ValueError: there are none in the row, or a text is not in its prompt once.
        """
        if isinstance(self.source, str | tuple):
            mask = torch.zeros_like(rows.valid[row])
            first, end = find(tokenizer, _prompt(rows, row, self.source), self.source, row)
            mask[first:end] = True
        else:
            mask = select(self.source, rows)[row]
        if not mask.any():
            raise ValueError(
                f"{self!r} names no token of row {row}, which has {int(rows.valid[row].sum())}: "
                "give one that names some in every row, or a list with a LookAt for each row"
            )
        return mask


Looks = LookAt | tuple[LookAt, ...]
"""One or several, each with its weight."""


def looks_of_rows(look_at: Looks | list[Looks]) -> list[tuple[LookAt, ...]]:
    """Return what each row looks at, or what all do as the only entry.

    Raises:
        TypeError: something else than `LookAt` is among them.
        ValueError: an empty list or tuple.
    """
    rows = look_at if isinstance(look_at, list) else [look_at]
    looks = [one if isinstance(one, tuple) else (one,) for one in rows]
    if not looks or not all(looks):
        raise ValueError(f"look_at must hold at least one LookAt for each row, got {look_at!r}")
    for look in (look for row in looks for look in row):
        check_kind("look_at", look, LookAt, "LookAt('a phrase'), a tuple, or a list by row")
    return looks


@dataclass(frozen=True, eq=False)
class LooksEdit(Edit):
    """An edit for the attention on some tokens.

    Raises:
        TypeError: `look_at` holds something else than `LookAt`.
    """

    look_at: Looks | list[Looks]
    """Where the heads are to look: a `LookAt`, or a tuple of several, each with its weight. A list
    has one of these for each row of the batch."""

    needs_keys: ClassVar[bool] = True

    _find: Any = field(init=False, repr=False, default_factory=lambda: lru_cache(1024)(token_span))
    _last: list[Any] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        looks_of_rows(self.look_at)

    def _targets(self) -> dict[str, Any]:
        """Return what a trace is to know of the sources."""
        rows = looks_of_rows(self.look_at)
        return target_labels([", ".join(look.name for look in row) for row in rows])

    def _goal(self, keys: AttentionKeys) -> AttentionGoal:
        """Return the goal of some tokens, made once for all sites of a forward pass."""
        tokens, n_keys = keys.tokens, keys.now.shape[-1]
        for known, n_known, goal in tuple(self._last):
            if known is tokens and n_known == n_keys:
                return goal
        goal = attention_goal(looks_of_rows(self.look_at), keys, self._find)
        self._last[:] = [(tokens, n_keys, goal)]
        return goal


def attention_goal(
    looks: list[tuple[LookAt, ...]], keys: AttentionKeys, find: TextFinder
) -> AttentionGoal:
    """Return the goal of the tokens of some keys; Args as `looks_of_rows` and `LookAt.mask`."""
    if len(looks) > 1:
        check_rows("look_at", len(looks), keys.tokens.n_rows)
    rows, token = keys.tokens.row.unique(return_inverse=True)
    position = keys.position[rows]
    n_looks = max(map(len, looks))
    inside = torch.ones(n_looks, *position.shape, dtype=torch.bool, device=position.device)
    weight = torch.zeros(n_looks, len(rows), device=position.device)
    for place, row in enumerate(rows.tolist()):
        for i, look in enumerate(looks[row if len(looks) > 1 else 0]):
            mask = look.mask(keys.rows, row, keys.reader.tokenizer, find)
            own = mask[position[place].clamp(min=0)] & (position[place] >= 0)
            inside[i, place] = own if look.weight > 0 else ~own
            weight[i, place] = look.weight
    return AttentionGoal(inside[:, token], weight[:, token])


def looked_at(look_at: Looks | list[Looks], tokenizer: Any) -> Scope:
    """Return a scope of the tokens that sources name; Args and Raises as `LookAt.mask`."""
    looks, find = looks_of_rows(look_at), lru_cache(1024)(token_span)

    def marked(positions: Positions) -> Tensor:
        n_rows = len(positions.index)
        own = looks * n_rows if len(looks) == 1 else looks
        check_rows("look_at", len(own), n_rows)
        if positions.tokens is None:
            _prompt(positions, 0, look_at)  # says what is missing
        rows = positions.of_rows(positions.tokens >= 0)  # pyright: ignore[reportOptionalOperand]
        masks = [
            torch.stack([look.mask(rows, row, tokenizer, find) for look in some]).any(0)
            for row, some in enumerate(own)
        ]
        return torch.stack(masks).gather(1, positions.index.clamp(min=0))

    return marked


def _prompt(rows: Positions, row: int, source: object) -> tuple[int, ...]:
    """Return the token ids of a row's prompt; of the whole row if its end is unknown."""
    if rows.tokens is None:
        raise ValueError(
            f"LookAt({source!r}) must know the tokens of each row from its beginning, and this "
            "forward pass does not show them: give the model text or token ids and no embeddings, "
            "and begin the KV cache inside apply(), or look at AtPositions([...])"
        )
    ends = rows.valid.sum(1) if rows.prompt_lengths is None else rows.prompt_lengths
    return tuple(rows.tokens[row, : int(ends[row])].tolist())


def token_span(tokenizer: Any, ids: Sequence[int], source: str | tuple[str, str], row: int) -> Span:
    """Return the tokens that overlap a phrase, or the text between two markers.

    Args:
        tokenizer: the model's.
        ids: tokens of the prompt.
        source: the phrase, or the markers.
        row: for the message.

    Raises:
        ValueError: there is no tokenizer, a text is not in the prompt exactly once, or nothing is
            between the markers.
    """
    if tokenizer is None:
        raise ValueError(
            f"LookAt({source!r}) needs a tokenizer, and the model has none: use AtPositions([...])"
        )
    clean = {"clean_up_tokenization_spaces": False}
    text = tokenizer.decode(ids, **clean)
    starts = [tokenizer.decode(ids[:n], **clean) for n in range(len(ids))]
    bounds = [*(len(commonprefix([start, text])) for start in starts), len(text)]
    places = [_place(text, one, row) for one in (source if isinstance(source, tuple) else [source])]
    (start, _), (_, end) = places[0], places[-1]
    if len(places) > 1:  # a token that only shares white space with what is between is outside
        between = text[places[0][1] : places[1][0]]
        end = places[1][0] - len(between) + len(between.rstrip())
        start = places[0][1] + len(between) - len(between.lstrip())
    if start >= end:
        raise ValueError(f"row {row} has no text between the markers {source!r}: {text!r:.300}")
    # A character may be cut into several tokens: each of them overlaps it.
    spans = [(one, max(one + 1, two)) for one, two in pairwise(bounds)]
    inside = [i for i, (one, two) in enumerate(spans) if one < end and two > start]
    return inside[0], inside[-1] + 1


def _place(text: str, phrase: str, row: int) -> Span:
    start = text.find(phrase)
    if start < 0 or text.find(phrase, start + 1) >= 0:
        often = "is not in" if start < 0 else "stands more than once in"
        remedy = "copy it from the prompt" if start < 0 else "give a longer phrase"
        raise ValueError(
            f"{phrase!r} {often} the prompt of row {row}: {remedy}, or use markers or "
            f"AtPositions([...]); the prompt is {text!r:.1000}"
        )
    return start, start + len(phrase)
