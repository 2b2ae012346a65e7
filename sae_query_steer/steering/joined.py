"""Several steerers as one: each acts on what those before it made of the activation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sae_query_steer.arguments import check_kind
from sae_query_steer.scopes.positions import PromptLengths
from sae_query_steer.steering.block import block
from sae_query_steer.steering.engine import apply_edits
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.trace import SteeringTrace


@dataclass(frozen=True)
class JoinedSteerers:
    """Steerers that act in the order in which they are listed, as nested `with` blocks would.

    At a site that two of them steer, the second sees the query that the first has changed; sites of
    later layers always see what earlier layers did.
    """

    steerers: tuple[Steerer, ...]
    """The first acts first."""

    def __init__(self, *steerers: Steerer) -> None:
        if not steerers:
            raise ValueError("JoinedSteerers() needs at least one steerer; got none")
        for steerer in steerers:
            check_kind("each steerer", steerer, Steerer, "JoinedSteerers(one, two)")
        object.__setattr__(self, "steerers", steerers)

    @block
    def apply(
        self,
        model: Any,
        *,
        record: bool = False,
        record_attention: bool = False,
        prompt_lengths: PromptLengths | None = None,
    ) -> Iterator[tuple[SteeringTrace, ...]]:
        """Steer every forward pass of a model for the length of a `with` block.

        Args, Raises and Warns as `Steerer.apply`; every steerer is checked before the first acts.

        Returns:
            A context manager that yields a trace of each steerer, in order.
        """
        for steerer in self.steerers:
            steerer.check_model(model)
        with apply_edits(
            model,
            [(steerer.edit, steerer.where) for steerer in self.steerers],
            record=record,
            record_attention=record_attention,
            prompt_lengths=prompt_lengths,
        ) as traces:
            yield traces
