"""Edits that see the keys with which attention will compare the queries."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.models.attention_scores import Index, ScoresReader
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

    position: Int[Tensor, "batch key"]
    """Absolute position of each key in its row; -1 where it is padding."""

    rows: Positions
    """All tokens of the rows so far, by absolute position; ids, if they are known."""

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
        assert self.tokens.column is not None, "tokens of a forward pass have columns"
        rows, row = self.tokens.row.unique(return_inverse=True)
        columns, place = self.tokens.column.unique(return_inverse=True)
        row, place, column = row[:, None], place[:, None], columns[place][:, None]
        whole, compute = self.reader.queries[rows], self.reader.at(rows, columns)
        heads = self._heads

        def scores(queries: Tensor) -> Tensor:
            changed = whole.clone()
            changed[row, column, heads] = queries.to(whole.dtype)
            return compute(changed)[row, heads, place]

        return scores

    def pattern(
        self, queries: Float[Tensor, "token head d_head"]
    ) -> Float[Tensor, "token head key"]:
        """Return the attention of queries of these tokens and heads: the softmax of the scores."""
        return self.scores(queries).softmax(-1)

    def at_tokens(self, tokens: Tensor) -> "AttentionKeys":
        """Return the same of some of the tokens, by their indices."""
        return replace(self, tokens=self.tokens.at(tokens))

    @property
    def index(self) -> Index:
        """Where these tokens and heads are in scores [batch head query key]."""
        assert self.tokens.column is not None, "tokens of a forward pass have columns"
        return self.tokens.row[:, None], self._heads, self.tokens.column[:, None]

    @property
    def _heads(self) -> Tensor:
        return torch.tensor(self.at.heads, device=self.tokens.row.device)
