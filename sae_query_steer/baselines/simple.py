"""Few-shot prompting, and controls: random directions and dictionaries."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from einops import rearrange

from sae_query_steer.arguments import check_kind, check_number
from sae_query_steer.baselines.directions import AddedDirection
from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.descent.strength import Queries
from sae_query_steer.sae.core import QueryHeadSAE, with_weights
from sae_query_steer.scopes.positions import TokenPositions
from sae_query_steer.steering.attention_descent import AttentionDescent
from sae_query_steer.steering.edit import Edit
from sae_query_steer.steering.latent_descent import LatentDescent
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.trace import QueryChange
from sae_query_steer.steering.where import SiteHeads


@dataclass(frozen=True, eq=False)
class RandomDirection(Edit):
    """A random direction, as long as the change of another edit at each token and head.

    The direction is one for each site and head, drawn once from the seed.
    """

    other: LatentDescent | AttentionDescent | AddedDirection
    """The edit whose change sets the length."""

    seed: int = 0
    """Of the directions."""

    @property
    def needs_keys(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the other edit sees keys."""
        return self.other.needs_keys

    @property
    def labels(self) -> Mapping[str, Any]:
        """Return what a trace is to know."""
        return {**self.other.labels, "method": f"random direction (seed {self.seed})"}

    def to(self, device: str | torch.device) -> "RandomDirection":
        """Return it with the weights of the other edit on a device."""
        return replace(self, other=self.other.to(device))

    def change(
        self,
        activations: Queries,
        at: SiteHeads,
        tokens: TokenPositions,
        *,
        record: bool = False,
        **keys: Any,
    ) -> QueryChange:
        """Return the random change; Args as `Edit.change`."""
        length = self.other.change(activations, at, tokens, **keys).delta.norm(dim=-1, keepdim=True)
        generator = torch.Generator().manual_seed(self.seed * 100_003 + at.site.layer)
        # Of all heads, so that a head's direction does not depend on which others are steered.
        direction = torch.randn(at.site.n_heads, at.site.d_head, generator=generator)
        direction = direction[list(at.heads)]
        direction = direction / direction.norm(dim=-1, keepdim=True)
        delta = length * direction.to(length)
        if record and isinstance(self.other, LatentDescent):
            return self.other.described(activations, at, tokens, delta)
        return QueryChange(delta=delta)


def random_direction(steerer: Steerer, *, seed: int = 0) -> Steerer:
    """Return the negative control: a random direction, as long as the steerer's change.

    Args:
        steerer: the steerer that the control is for; its sites, heads and tokens are the same.
        seed: of the directions, one for each site and head.

    Raises:
        TypeError: a steerer that changes scores or named latents, or is a control itself.

    Source: our choice.
    """
    check_kind("steerer", steerer, Steerer, "give the steerer that the control is for")
    kinds = (LatentDescent, AttentionDescent, AddedDirection)
    edit: Any = steerer.edit
    check_kind("the steerer's edit", edit, kinds, "other edits have no random control")
    return Steerer(RandomDirection(edit, seed), steerer.where, origin=steerer)


def few_shot_prompt(
    prompt: str,
    examples: Sequence[LabelledExample],
    *,
    target: str,
    k: int,
    seed: int = 0,
    separator: str = "\n\n",
) -> str:
    """Return a prompt with k solved examples of the target class in front of it.

    Args:
        prompt: the prompt to answer.
        examples: labelled examples with responses; those equal to `prompt` are left out.
        target: the class whose examples are shown.
        k: how many, 1 or more.
        seed: of the choice, which does not depend on the global random state.
        separator: what stands between two examples, and before the prompt.

    Raises:
        ValueError: fewer than k examples of the class have a response.

    Source: arXiv 2502.18644 compares with few-shot prompting.
    """
    check_number("k", k, whole=True, least=1)
    pool = [e for e in examples if e.label == target and e.response and e.prompt != prompt]
    if len(pool) < k:
        raise ValueError(
            f"class {target!r} has {len(pool)} examples with a response: k={k} are wanted; the "
            f"labels are {sorted({e.label for e in examples})}"
        )
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:k]
    shots = [pool[i].prompt + pool[i].response for i in order.tolist()]
    return separator.join([*shots, prompt])


ControlKind = Literal["random", "permuted"]


def control_dictionaries(
    saes: Mapping[str, QueryHeadSAE[Any]], kind: ControlKind, *, seed: int = 0
) -> dict[str, QueryHeadSAE[Any]]:
    """Return SAEs of equal size and architecture whose dictionaries know nothing of their heads.

    Learn targets over these as over the trained ones: what a trained SAE contributes is what it
    does better than both at equal sparsity and norm. d_sae rows a head span d_head dimensions many
    times over, so a few non-negative rows come near to any direction.

    Args:
        saes: trained SAEs by hook name.
        kind: "random": decoder rows drawn evenly from the sphere, each with the norm of the row in
            its place, and the encoder their transpose, as SAELens initialises them: an untrained
            SAE; "permuted": the trained rows and their encoder columns exchanged across the heads
            of a layer at random.
        seed: of the draws.

    Raises:
        TypeError: an encoder is no query-head SAE.
        ValueError: no such kind.

    Source: our choice.
    """
    if kind not in get_args(ControlKind):
        raise ValueError(f"kind must be one of {get_args(ControlKind)}, got {kind!r}")
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, sae in saes.items():
        check_kind(f"the encoder at {name}", sae, QueryHeadSAE, "dictionaries are of SAEs")
        weights = {key: value.detach().cpu().clone() for key, value in sae.state_dict().items()}
        rows = weights["W_dec"]
        if kind == "random":
            drawn = torch.randn(rows.shape, generator=generator).to(rows)
            drawn *= rows.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)
            weights |= {"W_dec": drawn, "W_enc": drawn.mT.contiguous()}
        else:
            order = torch.randperm(rows.shape[0] * rows.shape[1], generator=generator)
            weights["W_dec"] = rows.flatten(0, 1)[order].view_as(rows)
            columns = rearrange(weights["W_enc"], "h d l -> (h l) d")[order]
            weights["W_enc"] = rearrange(columns, "(h l) d -> h d l", h=len(rows)).contiguous()
            for key, value in weights.items():
                if value.shape == rows.shape[:2]:  # of each latent: biases, thresholds
                    weights[key] = value.flatten()[order].view_as(value)
        found[name] = with_weights(type(sae), copy.deepcopy(sae.cfg), weights, sae.W_dec.device)
    return found
