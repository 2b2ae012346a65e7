"""Edits that see the keys with which attention will compare the queries."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_query_steer.models.attention_scores import ScoresReader
from sae_query_steer.scopes.positions import TokenPositions
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

    def scores(
        self, queries: Float[Tensor, "token head d_head"]
    ) -> Float[Tensor, "token head key"]:
        """Return the masked attention scores of queries of these tokens and heads.

        Differentiable in the queries, and where the forward pass has gradients also in its keys.
        """
        return self.all_scores(queries)[self.index]

    def pattern(
        self, queries: Float[Tensor, "token head d_head"]
    ) -> Float[Tensor, "token head key"]:
        """Return the attention of queries of these tokens and heads: the softmax of the scores."""
        return self.scores(queries).softmax(-1)

    def all_scores(
        self, queries: Float[Tensor, "token head d_head"]
    ) -> Float[Tensor, "batch head query key"]:
        """Return the scores of the whole pass, with the queries of these tokens replaced."""
        whole = self.reader.queries.clone()
        row, head, column = self.index
        whole[row, column, head] = queries.to(whole.dtype)
        return self.reader.scores(whole)

    @property
    def index(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where these tokens and heads are in scores [batch head query key]."""
        assert self.tokens.column is not None, "tokens of a forward pass have columns"
        heads = torch.tensor(self.at.heads, device=self.tokens.row.device)
        return self.tokens.row[:, None], heads, self.tokens.column[:, None]
