"""Constants added to logits or to attention scores: the rivals of steering.

A steer that is no better than `LogitBias` may only choose a word; `attention_bias` is the rival of
`AttentionSteerer`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sae_query_steer.arguments import check_name, check_number, check_texts
from sae_query_steer.data.prompts import tokenizer_of
from sae_query_steer.descent.strength import Queries, each, target_labels
from sae_query_steer.models.calls import hooked
from sae_query_steer.models.loading import check_eager
from sae_query_steer.models.tracking import PositionTracker
from sae_query_steer.scopes.joins import check_scope, needs_tokens
from sae_query_steer.scopes.named import LastPromptToken
from sae_query_steer.scopes.positions import (
    PromptLengths,
    Scope,
    TokenPositions,
    check_rows,
    select,
)
from sae_query_steer.sites import QuerySite
from sae_query_steer.steering.block import block
from sae_query_steer.steering.edit import Edit
from sae_query_steer.steering.engine import warn_unless_heard
from sae_query_steer.steering.keys import AttentionKeys
from sae_query_steer.steering.look_at import Looks, LooksEdit
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.trace import QueryChange, SteeringTrace
from sae_query_steer.steering.where import Heads, SiteHeads, Where


@dataclass(frozen=True, eq=False, repr=False)
class LogitBias(Steerer):
    """Adds a constant to the logits of a class's words: at the first token of the answer.

    The bias is on the first token of each word, with and without a space before it and a capital,
    as tokenizers know them apart. Of a word that is a single token in some of these forms, those
    alone count; of others the first token, with which other words may begin too. No activation
    changes. A steer that is no better than this under a judge of whole texts chooses a word. It is
    applied as a steerer is; its trace is empty.

    >>> LogitBias({"create": ["design", "invent"], "remember": ["list"]}, target="create", bias=5.0)

    Raises:
        TypeError: a class's words are no list, or the scope is no scope.
        ValueError: no such class, a class without words, or a bias that is not finite.

    Source: our choice.
    """

    words: Mapping[str, Sequence[str]]
    """Words by class."""

    _: KW_ONLY

    target: str | Sequence[str]
    """The class whose words get the bias; a list has one for each row of the batch."""

    bias: float
    """What is added to a logit, before a soft cap of the model; 0 is exactly the identity."""

    scope: Scope = field(default_factory=LastPromptToken)
    """The tokens after which the next one is biased."""

    edit: Edit = field(init=False)
    where: Where = field(init=False)
    origin: None = field(init=False, default=None)

    def __post_init__(self) -> None:
        for name, words in self.words.items():
            check_texts(f"words of {name!r}", words)
            if not words:
                raise ValueError(f"words of {name!r} must be one or more, got none")
        for target in each(self.target, "target"):
            check_name("class", target, self.words)
        check_number("bias", self.bias)
        check_scope(self.scope, name="scope", generating=True)

    def __repr__(self) -> str:
        return f"LogitBias(target={self.target!r}, bias={self.bias}, scope={self.scope!r})"

    def __getattr__(self, name: str) -> Any:
        if name in ("edit", "where"):
            raise TypeError(
                "LogitBias changes logits and no activation, so it can't be joined with steerers: "
                "apply it in a `with` block of its own, inside or around theirs"
            )
        raise AttributeError(name)

    def to(self, device: str | torch.device) -> "LogitBias":
        """Return it; it has no weights."""
        del device
        return self

    def check_model(self, model: Any) -> None:
        """Raise unless it can act on a model.

        Raises:
            TypeError: no model of TransformerLens.
            ValueError: the model is compiled or has no tokenizer, or a word has no token.
        """
        check_eager(model)
        self.first_tokens(model)

    def first_tokens(self, model: Any) -> dict[str, list[int]]:
        """Return the ids of the tokens that get the bias, by class.

        Raises:
            ValueError: the model has no tokenizer, or a word has no token that begins it.
        """
        tokenizer, found = tokenizer_of(model), {}
        for name, words in self.words.items():
            ids: set[int] = set()
            for word in map(str.strip, words):
                cased = {word, word[:1].upper() + word[1:]}
                texts = [space + text for text in sorted(cased) for space in ("", " ")]
                parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
                # A first token that is a space alone would begin every word.
                parts = [
                    part
                    for part in parts
                    if str(tokenizer.decode(part[:1])).strip() and part[0] != tokenizer.unk_token_id
                ]
                # "Invent" may be "In" and "vent": a bias on "In" would not choose the word.
                own = {part[0] for part in parts if len(part) == 1} or {p[0] for p in parts}
                if not own:
                    raise ValueError(
                        f"words must begin with a token of the model, got {word!r} of class "
                        f"{name!r}: use other words"
                    )
                ids |= own
            found[name] = sorted(ids)
        return found

    def fwd_hooks(self, model: Any, **given: Any) -> Any:
        """Raise ValueError: logits have no hook point."""
        del model, given
        raise ValueError(f"{self!r} changes logits, which have no hook point: use apply")

    @block
    def apply(
        self,
        model: Any,
        *,
        record: bool = False,
        record_attention: bool = False,
        prompt_lengths: PromptLengths | None = None,
    ) -> Iterator[SteeringTrace]:
        """Bias the logits of every forward pass of a model, for a `with` block.

        Args, Raises and Warns as `Steerer.apply`.

        Returns:
            A context manager that yields a trace without records.
        """
        self.check_model(model)
        last, keep_tokens = int(model.cfg.n_layers) - 1, needs_tokens(self.scope)
        tracker = PositionTracker(model, [last], prompt_lengths, keep_tokens=keep_tokens)
        with ExitStack() as stack:
            if self.bias != 0:
                handle = model.unembed.register_forward_hook(self._hook(model, tracker))
                stack.enter_context(hooked(model, model.unembed, handle))
            stack.enter_context(tracker.attached())
            yield SteeringTrace(
                recording=record or record_attention,
                tokenizer=model.tokenizer,
                classes=tuple(self.words),
                method="logit bias",
                **target_labels(self.target),
            )
        warn_unless_heard(tracker)

    def _hook(self, model: Any, tracker: PositionTracker) -> Callable[..., Tensor | None]:
        ids = self.first_tokens(model)

        def add(_unembed: Any, _args: Any, logits: Tensor) -> Tensor | None:
            positions = tracker.positions
            if positions is None:  # not in a pass of this model
                return None
            mask = select(self.scope, positions)
            targets = each(self.target, "target")
            if isinstance(self.target, str):
                targets *= len(mask)
            check_rows("target", len(targets), len(mask))
            biased = logits.clone()
            # A pass may compute the logits of its last tokens alone.
            for row, column in mask[:, mask.shape[1] - logits.shape[1] :].nonzero().tolist():
                biased[row, column, ids[targets[row]]] += self.bias
            return biased

        return add


@dataclass(frozen=True, eq=False)
class ScoreBias(LooksEdit):
    """Adds bias * (sum of the weights of the sources that hold the key) to each attention score.

    Queries stay as they are. A bias of 0 is exactly the identity.

    Raises:
        TypeError: `look_at` holds something else than `LookAt`.
        ValueError: the bias is not finite.
    """

    bias: float
    """What is added, in nats, times each source's weight: exp(bias) is the factor of the odds of
    its attention."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("bias", self.bias)

    @property
    def labels(self) -> Mapping[str, Any]:
        """Return what a trace is to know."""
        return {"method": "attention bias", **self._targets()}

    def change(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        activations: Queries,
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
        goal = self._goal(keys)
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
    where = Where(
        sites, scope=LastPromptToken() if scope is None else scope, layers=layers, heads=heads
    )
    return Steerer(ScoreBias(look_at, bias), where)
