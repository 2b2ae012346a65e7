"""Keys of marked tokens amplified in the directions that relevance changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.arguments import check_number
from sae_query_steer.data.tokenized import TokenizedExamples
from sae_query_steer.descent.strength import Queries
from sae_query_steer.models.activations import read_at_span
from sae_query_steer.scopes.positions import TokenPositions
from sae_query_steer.sites import Site
from sae_query_steer.steering.edit import Edit
from sae_query_steer.steering.look_at import Looks, looked_at
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.trace import QueryChange
from sae_query_steer.steering.where import Heads, SiteHeads, Where

Projections = Mapping[str, Float[Tensor, "head d_head d_head"]]
"""Of each key head, by hook name."""


@torch.no_grad()
def key_projections(
    model: Any,
    neutral: TokenizedExamples,
    relevant: TokenizedExamples,
    irrelevant: TokenizedExamples,
    layers: Sequence[int],
    *,
    energy: float = 0.9,
    min_difference: float = 0.0,
) -> Projections:
    """Return projections onto the directions in which keys follow the relevance of their tokens.

    The same tokens are read in three contexts: alone, after a question that they answer and after
    another. With their keys K0, K+ and K- [token d_head], of each key head,

        U+ S+ V+ = svd(K0' K+ / n),  U- S- V- = svd(K0' K- / n)
        P = (U+[:, :k+] U+[:, :k+]' + U-[:, k-:] U-[:, k-:]') / 2

    k is the fewest singular values whose share of the sum is `energy`.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        neutral: texts with the tokens as their span.
        relevant: the same after a question to which the span is relevant.
        irrelevant: the same after another question.
        layers: which layers.
        energy: between 0 and 1.
        min_difference: heads with ||K+ - K-|| / n below this get P = 0.

    Raises:
        ValueError: no such layer, an energy out of range, or spans of other numbers of tokens.

    Source: SEKA (arXiv 2603.01281) by its code, `projection_builder_base.py` in waylonli/SEKA,
    which takes `energy` 0.9 and `min_difference` 0.2 in its example.
    """
    check_number("energy", energy, least=0, most=1)
    names = [Site.of(model, f"blocks.{layer}.attn.hook_k").hook_name for layer in layers]
    read, tokens = zip(
        *(_keys(model, some, names) for some in (neutral, relevant, irrelevant)), strict=True
    )
    if not all(torch.equal(tokens[0], other) for other in tokens):
        sizes = [len(one) for one in tokens]
        raise ValueError(
            "the span of each example must be the same tokens in all three contexts, got spans of "
            f"{sizes} tokens in all, or others: give the same examples in the same order"
        )
    found = {}
    for name in names:
        alone, *others = (one[name].double().transpose(0, 1) for one in read)
        n, parts = alone.shape[1], []
        for after, high in zip(others, (True, False), strict=True):
            u, s, _ = torch.linalg.svd(alone.mT @ after / n)
            kept = (s.cumsum(-1) / s.sum(-1, keepdim=True) < energy).sum(-1, keepdim=True) + 1
            chosen = torch.arange(u.shape[-1], device=u.device) < kept
            u = u * (chosen if high else ~chosen)[:, None]
            parts.append(u @ u.mT)
        differ = (others[0] - others[1]).flatten(1).norm(dim=-1) / n >= min_difference
        found[name] = (sum(parts) / 2 * differ[:, None, None]).float()
    return found


def _keys(
    model: Any, examples: TokenizedExamples, names: Sequence[str]
) -> tuple[dict[str, Tensor], Tensor]:
    """Return keys [token head d_head] by hook name, and example and id of each token, in order."""
    batches = list(read_at_span(model, examples, names))
    row, token = (torch.cat([getattr(b, n) for b in batches]) for n in ("row", "token"))
    order = row.argsort(stable=True)
    keys = {n: torch.cat([b.activations[n] for b in batches])[order] for n in names}
    return keys, torch.stack([row[order], token[order]], dim=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class AmplifiedKeys(Edit):
    """Adds strength * P k to keys k.

    Raises:
        ValueError: a strength that is negative or not finite.
    """

    projections: Projections
    """P, by hook name."""

    strength: float
    """0 or more."""

    def __post_init__(self) -> None:
        check_number("strength", self.strength, least=0)

    @property
    def labels(self) -> Mapping[str, Any]:
        """Return what a trace is to know."""
        return {"method": "amplified keys"}

    def change(
        self, activations: Queries, at: SiteHeads, tokens: TokenPositions, *, record: bool = False
    ) -> QueryChange:
        """Return what is added; Args as `Edit.change`."""
        del tokens, record
        projection = self.projections[at.hook_name].to(activations)[list(at.heads)]
        return QueryChange(
            delta=self.strength * torch.einsum("thd,hde->the", activations, projection)
        )


def amplify_keys(
    model: Any,
    projections: Projections,
    look_at: Looks | list[Looks],
    *,
    strength: float,
    layers: Sequence[int] | None = None,
    heads: Heads | None = None,
) -> Steerer:
    """Return a steerer that makes marked tokens more attended: k <- k + strength * P k.

    Of the marked tokens' keys at `blocks.L.attn.hook_k`, so all later tokens see them.

    >>> amplify_keys(model, projections, LookAt("the passage"), strength=0.5)

    Args:
        model: whose tokenizer finds the tokens.
        projections: from `key_projections`.
        look_at: which tokens, as of `AttentionSteerer`; weights do not count.
        strength: 0 or more; 1 at most doubles a key.
        layers: which layers; None means all that have projections.
        heads: which key heads: the same in every layer, or by layer; None means all.

    Raises:
        TypeError: `look_at` holds something else than `LookAt`.
        ValueError: a strength, layer or head that is not allowed.

    Source: SEKA (arXiv 2603.01281) by its code, `seka_llm.py` in waylonli/SEKA, with its two gains
    equal. There the keys are those after a norm of keys, if the model has one.
    """
    sites = [Site.of(model, name) for name in projections]
    scope = looked_at(look_at, model.tokenizer)
    where = Where(sites, scope=scope, layers=layers, heads=heads)
    return Steerer(AmplifiedKeys(projections=projections, strength=strength), where)
