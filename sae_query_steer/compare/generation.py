"""Continuations of many prompts at once, and how likely a model finds them."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sae_query_steer.compare.sampling import seeded_sampling
from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.data.tokenized import chat_prompt, tokenize_example, tokenizer_of
from sae_query_steer.models.activations import next_token_log_probs
from sae_query_steer.models.loading import end_tokens
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.trace import TraceRecord


@dataclass(frozen=True, kw_only=True, eq=False)
class Continuations:
    """What a model wrote after each of several prompts."""

    texts: list[str]
    """The continuations, without special tokens."""

    tokens: list[Tensor]
    """Their ids [pos], with the token that ended it where the model ended."""

    relative_changes: list[float]
    """Of each prompt, the mean of |delta q| / |q| over its steered tokens, layers and heads; of a
    `residual_mean_difference` the same of the residual stream."""


def continuations(
    model: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    steerer: Steerer | None = None,
    batch_size: int = 256,
    temperature: float | None = None,
    seeds: Sequence[int] | None = None,
    chat_template: bool = False,
) -> Continuations:
    """Return continuations of prompts, greedy or sampled, each as if it were alone.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        prompts: texts of any lengths; BOS is put in front of each.
        max_new_tokens: most tokens of a continuation.
        steerer: what changes the queries, or the residual stream, meanwhile; one that tells the
            rows of a batch apart wants all prompts in one batch.
        batch_size: rows of one call of `generate`.
        temperature: sample from softmax(logits / temperature), above 0; None decodes greedily.
        seeds: one for each prompt, with a temperature only: a prompt and its seed give one text,
            whatever other prompts there are (see `seeded_sampling`).
        chat_template: put every prompt into the tokenizer's chat template, as the user's turn,
            in place of BOS.

    Raises:
        ValueError: no prompts, a size below 1, a temperature without seeds or seeds without one,
            not one seed for each prompt, or a chat template that is missing or that the host
            reads otherwise than `tokenize_example`.
    """
    if not prompts or max_new_tokens < 1 or batch_size < 1:
        raise ValueError(
            f"{len(prompts)} prompts, max_new_tokens={max_new_tokens} and batch_size={batch_size} "
            "are not allowed: give at least one of each"
        )
    if (temperature is None) != (seeds is None):
        raise ValueError(
            f"temperature={temperature} with {'no' if seeds is None else len(seeds)} seeds is not "
            "allowed: give both to sample, neither to decode greedily"
        )
    if seeds is not None and len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts do not fit {len(seeds)} seeds: give one for each")
    tokenizer = tokenizer_of(model)
    ends = end_tokens(model)
    tokens: list[Tensor] = []
    changes: list[float] = []
    for start in range(0, len(prompts), batch_size):
        rows = _as_read(model, prompts[start : start + batch_size], chat_template)
        steering = nullcontext() if steerer is None else steerer.apply(model, record=True)
        sampling = nullcontext()
        if temperature is not None and seeds is not None:
            own = seeds[start : start + batch_size]
            sampling = seeded_sampling(model, own, temperature=temperature)
        with steering as trace, sampling:
            bos = not chat_template
            width = model.to_tokens(rows, padding_side="left", prepend_bos=bos).shape[1]
            written = model.generate(
                rows,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                prepend_bos=bos,
                eos_token_id=ends or None,
                return_type="tokens",
                verbose=False,
            )
        tokens += [_until_end(row, ends) for row in written[:, width:].cpu()]
        changes += _mean_changes([] if trace is None else trace.records, len(rows))
    return Continuations(
        texts=[str(tokenizer.decode(row, skip_special_tokens=True)) for row in tokens],
        tokens=tokens,
        relative_changes=changes,
    )


def negative_log_likelihoods(
    model: Any,
    prompts: Sequence[str],
    tokens: Sequence[Tensor],
    *,
    batch_size: int = 64,
    chat_template: bool = False,
) -> list[float]:
    """Return for each prompt the sum of -log p, in nats, of the tokens after it.

    The exponential of the sum of several, divided by the number of their tokens, is a perplexity.
    `chat_template` is that of `continuations`.

    Raises:
        ValueError: not one row of tokens for each prompt, a row without tokens, or a size below 1.
    """
    _check_rows(prompts, tokens, batch_size)
    sums = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        rows = _as_read(model, prompts[part], chat_template)
        scores = _log_likelihoods(model, rows, tokens[part], prepend_bos=not chat_template)
        sums += [-float(row.sum()) for row in scores.split([len(row) for row in tokens[part]])]
    return sums


def divergences(
    model: Any,
    prompts: Sequence[str],
    tokens: Sequence[Tensor],
    steerer: Steerer,
    *,
    chat_template: bool = False,
) -> list[float]:
    """Return for each text the mean of KL(unsteered || steered), in nats, of its next tokens.

    On texts of the target class itself it is the specificity of a steer: there nothing should
    change much. All texts are read in one batch, so that a steerer may tell the rows apart.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        prompts: what stands before each text.
        tokens: the texts [pos], whose tokens count.
        steerer: what changes the queries, or the residual stream.
        chat_template: that of `continuations`.

    Raises:
        ValueError: not one row of tokens for each prompt, or a row without tokens.
    """
    _check_rows(prompts, tokens, 1)
    rows = _as_read(model, prompts, chat_template)
    bare, lengths = _next_tokens(model, rows, tokens, prepend_bos=not chat_template)
    with steerer.apply(model, prompt_lengths=lengths):
        steered, _ = _next_tokens(model, rows, tokens, prepend_bos=not chat_template)
    found = (bare.exp() * (bare - steered)).sum(-1)
    return [float(part.mean()) for part in found.split([len(row) for row in tokens])]


def _check_rows(prompts: Sequence[str], tokens: Sequence[Tensor], batch_size: int) -> None:
    if len(prompts) != len(tokens):
        raise ValueError(f"{len(prompts)} prompts do not fit {len(tokens)} rows of tokens")
    if batch_size < 1 or not all(len(row) for row in tokens):
        raise ValueError(
            f"batch_size={batch_size} and a shortest row of {min(map(len, tokens), default=0)} "
            "tokens are not allowed: give at least one of each"
        )


def _log_likelihoods(
    model: Any, prompts: Sequence[str], tokens: Sequence[Tensor], *, prepend_bos: bool
) -> Float[Tensor, " token"]:
    log_probs, _ = _next_tokens(model, prompts, tokens, prepend_bos=prepend_bos)
    return log_probs.gather(1, torch.cat(list(tokens))[:, None])[:, 0].double()


def _next_tokens(
    model: Any, prompts: Sequence[str], tokens: Sequence[Tensor], *, prepend_bos: bool
) -> tuple[Float[Tensor, "token d_vocab"], list[int]]:
    """Return the log probabilities of every token of some texts, and their prompts' lengths."""
    contexts = [model.to_tokens(prompt, prepend_bos=prepend_bos)[0].cpu() for prompt in prompts]
    joined = [torch.cat(pair) for pair in zip(contexts, tokens, strict=True)]
    rows = [torch.full((len(t),), i) for i, t in enumerate(tokens)]
    columns = [torch.arange(len(t)) + len(c) - 1 for c, t in zip(contexts, tokens, strict=True)]
    log_probs = next_token_log_probs(
        model, pad_sequence(joined, batch_first=True), torch.cat(rows), torch.cat(columns)
    ).cpu()
    return log_probs, [len(context) for context in contexts]


def _as_read(model: Any, prompts: Sequence[str], chat_template: bool) -> list[str]:
    """Return prompts as the host is to read them; chat templates checked token by token."""
    if not chat_template:
        return list(prompts)
    tokenizer = tokenizer_of(model)
    written = [chat_prompt(prompt, tokenizer) for prompt in prompts]
    for prompt, text in zip(prompts, written, strict=True):
        example = LabelledExample(prompt=prompt, label="none")
        ours = tokenize_example(model, example, chat_template=True).tokens.tolist()
        host = model.to_tokens(text, prepend_bos=False)[0].tolist()
        # Centroids are made of one, texts are written after the other.
        if host != ours:
            raise ValueError(
                f"the host reads the chat prompt {text!r} as {len(host)} tokens, the tokenizer as "
                f"{len(ours)}, which differ: set tokenizer.add_bos_token so that BOS comes once, "
                f"and shorten what is longer than the model's {int(model.cfg.n_ctx)} tokens"
            )
    return written


def _mean_changes(records: Sequence[TraceRecord], n_rows: int) -> list[float]:
    total, count = torch.zeros(n_rows), torch.zeros(n_rows)
    for record in records:
        ratio = record.change.delta.float().norm(dim=-1) / record.query_norm.clamp(min=1e-30)
        total.index_add_(0, record.row, ratio.sum(-1))
        count.index_add_(0, record.row, torch.full((len(ratio),), float(ratio.shape[-1])))
    return (total / count.clamp(min=1)).tolist()


def _until_end(row: Tensor, ends: Sequence[int]) -> Tensor:
    at = torch.isin(row, torch.tensor(ends, dtype=row.dtype)).nonzero()
    return row[: int(at[0]) + 1] if len(at) else row
