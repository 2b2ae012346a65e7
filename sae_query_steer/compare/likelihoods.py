"""How likely a model finds texts after prompts, and how far a steer changes it."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_query_steer.compare.generation import as_read, batch_of
from sae_query_steer.data.batches import TokenBatch
from sae_query_steer.data.prompts import ChatTemplate
from sae_query_steer.models.activations import LOGITS, read_activations
from sae_query_steer.models.prefix import PromptCaches
from sae_query_steer.scopes.named import ResponseTokens
from sae_query_steer.scopes.positions import select
from sae_query_steer.steering.steerer import JoinedSteerers, Steerer


def negative_log_likelihoods(
    model: Any,
    prompts: Sequence[str],
    tokens: Sequence[Tensor],
    *,
    batch_size: int = 64,
    chat_template: ChatTemplate = False,
    caches: PromptCaches | None = None,
) -> list[float]:
    """Return for each prompt the sum of -log p, in nats, of the tokens [pos] after it."""
    sums = []
    caches = PromptCaches(model, 0) if caches is None else caches
    rows, bos = as_read(model, prompts, chat_template)
    for start in range(0, len(prompts), batch_size):
        some = tokens[start : start + batch_size]
        batch = batch_of(model, rows[start : start + batch_size], some, bos)
        row, position = _written(batch)
        with torch.no_grad():
            own = caches.rows(batch).log_probs(row, position - 1).cpu()
        found = own.gather(1, batch.tokens[row, position][:, None])[:, 0].double()
        sums += [-float(one.sum()) for one in found.split(list(map(len, some)))]
    return sums


def divergences(
    model: Any,
    prompts: Sequence[str],
    tokens: Sequence[Tensor],
    steerer: Steerer | JoinedSteerers,
    *,
    chat_template: ChatTemplate = False,
) -> list[float]:
    """Return for each text the mean of KL(unsteered || steered), in nats, of its next tokens.

    On texts of the target class it measures the specificity of steering: there it should change
    little. All texts are read in one batch, so that a steerer may have a target for each.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        prompts: what stands before each text.
        tokens: the texts [pos], whose tokens count.
        steerer: what changes the queries, or the residual stream.
        chat_template: as in `continuations`.
    """
    rows, bos = as_read(model, prompts, chat_template)
    batch = batch_of(model, rows, tokens, bos)
    row, position = _written(batch)

    def next_tokens() -> Float[Tensor, "token d_vocab"]:
        logits = read_activations(model, batch.tokens, [LOGITS])[LOGITS]
        return logits[row, position - 1].float().log_softmax(-1).cpu()

    bare = next_tokens()
    with steerer.apply(model, prompt_lengths=batch.prompt_lengths.tolist()):
        steered = next_tokens()
    found = (bare.exp() * (bare - steered)).sum(-1)
    return [float(part.mean()) for part in found.split(list(map(len, tokens)))]


def _written(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Return row and position of the tokens after the prompts."""
    row, position = select(ResponseTokens(), batch.positions).nonzero(as_tuple=True)
    return row, position
