"""Methods that turn heads to the target's phrase, in prompts that list all actions."""

from collections.abc import Mapping, Sequence
from typing import Any

from sae_query_steer.baselines.biases import attention_bias
from sae_query_steer.compare.methods import Method
from sae_query_steer.sae.encoders import QueryEncoder
from sae_query_steer.scopes.joins import scope_name
from sae_query_steer.scopes.named import LastPromptToken, ResponseTokens
from sae_query_steer.sites import QuerySite
from sae_query_steer.steering.attention_descent import AttentionSteerer
from sae_query_steer.steering.look_at import LookAt
from sae_query_steer.steering.steerer import JoinedSteerers

_SCOPE = scope_name(LastPromptToken() | ResponseTokens())

AWAY = 2.0
"""Bias of the list after the last prompt token. Source: our choice; on SmolLM2, dense, layers 15 to
29, `attention_method` lowers the log odds of the attention on the list by 2.2 there (median over
tokens and heads), and raises those of the phrase by 5.2 at strength 0.25."""


def attention_method(name: str, encoders: Mapping[str, QueryEncoder]) -> Method:
    """Return attention on the phrase of each case's target, in prompts that list all actions.

    At the last prompt token heads turn to the phrase, until half of their attention is there; after
    it they turn a little away from the whole list, so that the text does not run on through it. The
    strength is the limit of the first change, ||change of q|| / ||q||.
    """

    def steerer(cases: Sequence[Any], strength: float) -> JoinedSteerers:
        here, away = _looks(cases)
        return JoinedSteerers(
            AttentionSteerer(encoders, here, until=0.5, max_relative_change=strength),
            AttentionSteerer(
                encoders, away, n_steps=5, max_relative_change=0.1, scope=ResponseTokens()
            ),
        )

    layers = tuple(int(name.split(".")[1]) for name in encoders)
    return Method(name=name, scope=_SCOPE, layers=layers, steerer=steerer, strengths=(0.25, 0.35))


def attention_bias_method(name: str, sites: Sequence[QuerySite]) -> Method:
    """Return the rival of `attention_method`: a constant added to the scores of the same tokens.

    At the last prompt token the scores of the phrase are raised by the strength, in nats; after it
    those of the whole list are lowered by `AWAY`.
    """

    def steerer(cases: Sequence[Any], strength: float) -> JoinedSteerers:
        here, away = _looks(cases)
        return JoinedSteerers(
            attention_bias(sites, here, bias=strength),
            attention_bias(sites, away, bias=AWAY, scope=ResponseTokens()),
        )

    layers = tuple(site.layer for site in sites)
    return Method(
        name=name, scope=_SCOPE, layers=layers, steerer=steerer, strengths=(2.0, 4.0, 6.0)
    )


def _looks(cases: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return what each case's heads look at first, and then away from."""
    here = [LookAt(case.phrase) for case in cases]
    return here, [LookAt(case.listed, weight=-1.0) for case in cases]
