"""Edits that see the keys with which attention will compare the queries."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.models.attention_scores import Index, Scores, ScoresReader
from sae_query_steer.models.linear_scores import LinearScores
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
    def linear(self) -> LinearScores | None:
        """Scores as a linear map of the queries; None if they are not. Compared with the model."""
        return self.reader.linear(self.now, self.tokens, self.at.heads)

    def scores(
        self, queries: Float[Tensor, "token head d_head"]
    ) -> Float[Tensor, "token head key"]:
        """Return the masked attention scores of queries of these tokens and heads.

        Differentiable in the queries, and where the forward pass has gradients also in its keys.
        """
        return self.scores_of()(queries)

    def scores_of(self) -> Callable[[Tensor], Tensor]:
        """Return `scores` as a function, for many calls: what no query changes is computed once.

        Made outside inference mode, it can be differentiated there.
        """
        _ = self._checked
        row, column, heads = self.tokens.index(self.at.heads)
        rows, row = row.unique(return_inverse=True)
        columns, place = column.unique(return_inverse=True)
        column = columns[place]  # no tensor made in inference mode, where autograd refuses it
        whole, compute = self.reader.queries[rows], self.reader.at(rows, columns)

        def scores(queries: Tensor) -> Tensor:
            changed = whole.clone()
            changed[row, column, heads] = queries.to(whole.dtype)
            return compute(changed)[row, heads, place]

        return scores

    @cached_property
    def _checked(self) -> bool:
        """True, after a comparison with the model."""
        self.reader.check(self.now)
        return True

    @property
    def index(self) -> Index:
        """Where these tokens and heads are in scores [batch head query key]."""
        row, column, head = self.tokens.index(self.at.heads)
        return row, head, column
