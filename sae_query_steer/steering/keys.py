"""Edits that see the keys with which attention will compare the queries."""

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.models.attention_scores import Scores, ScoresReader
from sae_query_steer.models.token_scores import TokenScores
from sae_query_steer.models.tracking import PositionTracker
from sae_query_steer.scopes.positions import Positions, TokenPositions
from sae_query_steer.steering.where import SiteHeads


@dataclass(frozen=True, eq=False)
class AttentionKeys:
    """Attention of some tokens as a function of their queries, in the running forward pass.

    The keys are those of the cache and of this pass, the token's own among them, with all hooks on
    `hook_k`; mask, sliding window, rotary embedding and norms are the model's.
    """

    reader: ScoresReader
    """Holds queries and keys of the pass."""

    at: SiteHeads
    """The site and heads of the queries."""

    tokens: TokenPositions
    """The tokens of the queries."""

    now: Scores
    """The masked scores of the queries as they are, of all tokens."""

    positions: Positions
    """Where the tokens of the pass stand."""

    tracker: PositionTracker
    """Follows the pass."""

    @cached_property
    def position(self) -> Int[Tensor, "batch key"]:
        """Absolute position of each key in its row; -1 where it is padding."""
        return self.tracker.key_positions(self.now.shape[-1])

    @cached_property
    def rows(self) -> Positions:
        """All tokens of the rows so far, by absolute position; ids, if they are known."""
        return self.positions.of_rows(self.tracker.columns)

    @cached_property
    def by_queries(self) -> TokenScores:
        """The scores of these tokens and heads as a function of queries, compared with the model.

        It can be differentiated in inference mode too.
        """
        return self.reader.scores_at(self.now, self.tokens, self.at.heads)

    @cached_property
    def linear(self) -> TokenScores | None:
        """The same if it is linear; None if a soft cap or a norm of the queries makes it other."""
        return self.by_queries if self.by_queries.is_linear else None

    def scores(
        self, queries: Float[Tensor, "token head d_head"]
    ) -> Float[Tensor, "token head key"]:
        """Return the masked attention scores of queries of these tokens and heads.

        Differentiable in the queries, and where the forward pass has gradients also in its keys.
        """
        return self.by_queries.now + self.by_queries.added(queries)
