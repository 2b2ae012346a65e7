"""Examples as a learner reads them: prefixes in the cache, and what the model should write."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_query_steer.arguments import check_number, whole_numbers
from sae_query_steer.data.batches import TokenBatch, example_batches
from sae_query_steer.data.tokenized import TokenizedExample, TokenizedExamples, check_tokenized
from sae_query_steer.models.launch import ALONE, Ranks
from sae_query_steer.models.prefix import PrefixedRows
from sae_query_steer.scopes.joins import scope_name
from sae_query_steer.scopes.positions import Scope, select


@dataclass(frozen=True, eq=False)
class LearningRows:
    """Rows of one batch, the next tokens that are read, and what they should be."""

    prefixed: PrefixedRows
    """The rows from the first token of the scope on."""

    labels: tuple[str, ...]
    """Class of each row."""

    row: Int[Tensor, " token"]
    """Row of each token whose next token is read."""

    position: Int[Tensor, " token"]
    """Its position."""

    wanted: Int[Tensor, " token"] | Float[Tensor, "token d_vocab"]
    """The next token, or log probabilities of it."""

    def begin_at(self, layers: Iterable[int]) -> None:
        """Let passes begin at the first layer with a hook, if it is one of these."""
        layers = frozenset(layers)
        if not layers <= self.prefixed.prepared:
            self.prefixed.unchanged(self.row, self.position, layers)

    def losses(self, fwd_hooks: Any = (), *, first_layer: int = 0) -> Float[Tensor, " batch"]:
        """Return the mean loss of each row in nats a token; Args as `PrefixedRows.log_probs`."""
        log_probs = self.prefixed.log_probs(
            self.row, self.position, fwd_hooks, first_layer=first_layer
        )
        rows, wanted = (part.to(log_probs.device) for part in (self.row, self.wanted))
        if wanted.is_floating_point():
            found = (wanted.exp() * (wanted - log_probs)).sum(-1)
        else:
            found = -log_probs.gather(-1, wanted[:, None])[:, 0]
        sums = found.new_zeros(len(self.labels)).index_add(0, rows, found)
        return sums / torch.bincount(rows, minlength=len(self.labels))


class SplitRows(NamedTuple):
    """Batches of the rows to learn from, and of those that are held out."""

    learned: list[LearningRows | None]
    """This process's share of each batch; None where it has none."""

    held_out: list[LearningRows]
    made_with: tuple[Any, ...]
    """Classes, scope, batch size, seed and processes."""


def split_rows(
    model: Any,
    examples: TokenizedExamples,
    counterparts: TokenizedExamples | None,
    *,
    classes: Sequence[str],
    scope: Scope,
    held_out: Sequence[int] | None,
    batch_size: int,
    seed: int,
    ranks: Ranks = ALONE,
) -> SplitRows:
    """Return the batches to learn from and those that are held out; Args as `TargetLearner`.

    They do not depend on sites, so that one call serves runs at several.
    """
    learned, kept = _split(examples.labels, classes, held_out)

    def rows(indices: Sequence[int]) -> list[LearningRows]:
        indices = ranks.own(indices)
        if not indices:
            return []
        others = None if counterparts is None else counterparts.subset(indices)
        return learning_rows(model, examples.subset(indices), others, scope, batch_size)

    order = torch.randperm(len(learned), generator=torch.Generator().manual_seed(seed))
    shuffled = [learned[i] for i in order.tolist()]
    parts = [shuffled[i : i + batch_size] for i in range(0, len(shuffled), batch_size)]
    return SplitRows(
        [one for part in parts for one in rows(part) or [None]],
        rows(kept),
        (tuple(classes), scope_name(scope), batch_size, seed, ranks),
    )


def learning_rows(
    model: Any,
    examples: TokenizedExamples,
    counterparts: TokenizedExamples | None,
    scope: Scope,
    batch_size: int,
) -> list[LearningRows]:
    """Return examples in batches, with their prefixes in the cache.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        examples: prompts and responses.
        counterparts: the same responses after other prompts; then log probabilities after these are
            wanted, otherwise the tokens of the response.
        scope: tokens that are steered.
        batch_size: rows of a batch.

    Raises:
        ValueError: an example has no token in the scope, or no response and no counterpart.
    """
    made = []
    for batch in example_batches(examples, batch_size):
        positions = batch.positions
        scoped = select(scope, positions)
        if not bool(scoped.any(1).all()):
            row = int((~scoped.any(1)).nonzero()[0])
            raise ValueError(
                f"example {batch.indices[row]} ({batch.labels[row]!r}) has no token in the scope "
                f"{scope!r}: use another scope, or examples with such a token"
            )
        first = torch.minimum(scoped.long().argmax(1), batch.prompt_lengths - 1)
        prefixed = PrefixedRows(model, batch, first)
        row, position = _read(batch, whole=counterparts is not None)
        if counterparts is None:
            wanted = batch.tokens[row, position + 1]
        else:
            wanted = _log_probs(model, batch, counterparts.subset(batch.indices))
        made.append(LearningRows(prefixed, batch.labels, row, position, wanted))
    return made


def _read(batch: TokenBatch, *, whole: bool) -> tuple[Tensor, Tensor]:
    """Return row and position of the tokens whose next token is read.

    From the last prompt token on, up to the last token, or with `whole` that one too.
    """
    index = batch.positions.index
    last = batch.lengths[:, None] - (1 if whole else 2)
    inside = (index >= batch.prompt_lengths[:, None] - 1) & (index <= last)
    if not bool(inside.any(1).all()):
        row = int((~inside.any(1)).nonzero()[0])
        raise ValueError(
            f"example {batch.indices[row]} ({batch.labels[row]!r}) must have a response, got none: "
            "give one, or counterparts"
        )
    rows, positions = inside.nonzero(as_tuple=True)
    return rows, positions


@torch.no_grad()
def _log_probs(
    model: Any, batch: TokenBatch, others: TokenizedExamples
) -> Float[Tensor, "token d_vocab"]:
    """Return log probabilities of the next token at the same places of the counterparts."""
    (whole,) = example_batches(others, len(others))
    order = torch.tensor(whole.indices).argsort()
    prefixed = PrefixedRows(model, whole, whole.prompt_lengths - 1)
    lengths = (batch.lengths - batch.prompt_lengths + 1).tolist()
    starts = (whole.prompt_lengths[order] - 1).tolist()
    parts = [start + torch.arange(n) for start, n in zip(starts, lengths, strict=True)]
    rows = order.repeat_interleave(torch.tensor(lengths))
    return prefixed.log_probs(rows, torch.cat(parts))


def _split(
    labels: Sequence[str], classes: Sequence[str], held_out: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """Return the indices of examples to learn from and of those that are held out."""
    if held_out is None:
        own = {name: [i for i, label in enumerate(labels) if label == name] for name in classes}
        kept = sorted(i for indices in own.values() for i in indices[3::4])
    else:
        kept = whole_numbers("held_out", held_out)
        for index in kept:
            check_number("held_out", index, whole=True, least=0, most=len(labels) - 1)
    learned = [i for i in range(len(labels)) if i not in set(kept)]
    for name in classes:
        for part, indices in (("learn from", learned), ("hold out", kept)):
            if not any(labels[i] == name for i in indices):
                raise ValueError(
                    f"class {name!r} must have examples to {part}, got none: give four or more of "
                    "each class of the steerer, or other held_out"
                )
    if unknown := sorted({*labels} - {*classes}):
        raise ValueError(f"labels must be classes of the steerer, {list(classes)}, got {unknown}")
    return learned, kept


def check_counterparts(examples: TokenizedExamples, counterparts: TokenizedExamples) -> None:
    """Raise unless counterparts have the same responses and classes.

    Raises:
        ValueError: the message names the first that differs.
    """
    for index, (one, other) in enumerate(with_counterparts(examples, counterparts)):
        same = one.tokens[one.prompt_length :].equal(other.tokens[other.prompt_length :])
        if one.label != other.label or not same:
            raise ValueError(
                f"counterpart {index} must have the class and the response of its example: the "
                "same response after the prompt with the request"
            )


def with_counterparts(
    examples: TokenizedExamples, counterparts: TokenizedExamples
) -> Iterator[tuple[TokenizedExample, TokenizedExample]]:
    """Return each example with its counterpart.

    Raises:
        TypeError: counterparts are not tokenised.
        ValueError: there is not one for each example.
    """
    check_tokenized(counterparts, name="counterparts")
    if len(counterparts) != len(examples):
        raise ValueError(
            f"counterparts must be one for each of the {len(examples)} examples, in their order, "
            f"got {len(counterparts)}"
        )
    return zip(examples, counterparts, strict=True)


@contextmanager
def frozen(modules: Sequence[Any]) -> Iterator[None]:
    """Let no parameter of some modules have gradients, for a `with` block."""
    inner = [vars(module).get("original_model") for module in modules]
    own = [p for m in (*modules, *inner) if isinstance(m, nn.Module) for p in m.parameters()]
    trained = [p for p in own if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
