"""A constant added to the attention scores of chosen tokens: the rival of `AttentionSteerer`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.arguments import check_number
from sae_query_steer.scopes.named import LastPromptToken
from sae_query_steer.scopes.positions import Scope, TokenPositions
from sae_query_steer.sites import QuerySite
from sae_query_steer.steering.edit import Edit
from sae_query_steer.steering.keys import AttentionKeys
from sae_query_steer.steering.latent_descent import target_labels
from sae_query_steer.steering.look_at import Looks, attention_goal, looks_of_rows, token_span
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.trace import QueryChange
from sae_query_steer.steering.where import Heads, SiteHeads, Where


@dataclass(frozen=True, eq=False)
class ScoreBias(Edit):
    """Adds bias * (sum of the weights of the sources that hold the key) to each attention score.

    Queries stay as they are. A bias of 0 is exactly the identity.

    Raises:
        TypeError: `look_at` holds something else than `LookAt`.
        ValueError: the bias is not finite.
    """

    look_at: Looks | list[Looks]
    """Which keys: as in `AttentionDescent`."""

    bias: float
    """What is added, in nats, times each source's weight: exp(bias) is the factor of the odds of
    its attention."""

    needs_keys: ClassVar[bool] = True

    _find: Any = field(init=False, repr=False, default_factory=lambda: lru_cache(1024)(token_span))

    def __post_init__(self) -> None:
        looks_of_rows(self.look_at)
        check_number("bias", self.bias)

    @property
    def labels(self) -> Mapping[str, Any]:
        """Return what a trace is to know."""
        names = [", ".join(look.name for look in row) for row in looks_of_rows(self.look_at)]
        return {"method": "attention bias", **target_labels(names)}

    def change(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        activations: Float[Tensor, "token head d_head"],
        at: SiteHeads,
        tokens: TokenPositions,
        *,
        record: bool = False,
        keys: AttentionKeys,
    ) -> QueryChange:
        """Return no change of the queries, and what is added to the scores; Args as `Edit.change`.

        A record has the attention on the sources before and after.
        """
        del tokens  # those of the keys
        goal = attention_goal(looks_of_rows(self.look_at), keys, self._find)
        own = goal.inside ^ (goal.weight < 0)[..., None]  # looking away, `inside` is all others
        by_key = self.bias * (goal.weight[..., None] * own).sum(0)
        bias = by_key[:, None].expand(-1, len(at.heads), -1)
        made = QueryChange(delta=torch.zeros_like(activations), score_bias=bias)
        if not record:
            return made
        scores = keys.scores(activations)
        before, after = goal.masses(scores), goal.masses(scores + bias)
        return replace(made, mass_before=before, mass_after=after)


def attention_bias(
    sites: Iterable[QuerySite],
    look_at: Looks | list[Looks],
    *,
    bias: float,
    scope: Scope | None = None,
    layers: Sequence[int] | None = None,
    heads: Heads | None = None,
) -> Steerer:
    """Return a steerer that adds a constant to the attention scores of chosen tokens.

    At each scoped token and chosen head, after soft cap and mask and before the softmax:

        scores[key] += bias * weight, for the keys of each `LookAt`

    So the odds of the attention on one source are multiplied by exp(bias). The trace has
    `mass_before` and `mass_after` as that of `AttentionSteerer`.

    >>> attention_bias(sqs.query_sites(model, range(15, 30)), LookAt("explain an idea"), bias=2.0)

    Args:
        sites: the queries whose scores change, from `query_sites`.
        look_at: which keys: a `LookAt`, a tuple of several, or a list with one of these for each
            row of the batch. A negative weight makes the bias negative.
        bias: in nats, of either sign.
        scope: which tokens; None means the last prompt token.
        layers: which layers; None means all.
        heads: which heads: the same in every layer, or by layer; None means all.

    Raises:
        TypeError: `look_at` holds something else than `LookAt`.
        ValueError: a bias that is not finite, or a layer or head that there is not.

    Source: in the manner of PASTA (arXiv 2311.02262), whose code adds log(alpha), alpha 0.01, to
    the scores of all other prompt tokens in profiled heads, for every later token. SpotLight (arXiv
    2505.12025) adapts the bias to a wanted share of attention. Here it is a constant on the chosen
    tokens, for the tokens in the scope, and nothing is profiled.
    """
    scope = LastPromptToken() if scope is None else scope
    return Steerer(ScoreBias(look_at, bias), Where(sites, scope=scope, layers=layers, heads=heads))
