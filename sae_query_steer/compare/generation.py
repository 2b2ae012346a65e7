"""Continuations of many prompts at once."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformer_lens.model_bridge import TransformerBridge
from transformers import StoppingCriteria

from sae_query_steer.arguments import check_kind, check_number, check_texts
from sae_query_steer.baselines.biases import LogitBias
from sae_query_steer.compare.sampling import sampled_passes, seeded_sampling
from sae_query_steer.data.batches import TokenBatch
from sae_query_steer.data.examples import LabelledExample
from sae_query_steer.data.prompts import ChatTemplate, chat_prompt, tokenizer_of
from sae_query_steer.data.tokenized import tokenize_example
from sae_query_steer.models.loading import end_tokens
from sae_query_steer.models.partial_passes import hooks_of_a_pass
from sae_query_steer.models.prefix import PrefixedRows, PromptCaches
from sae_query_steer.scopes.positions import select
from sae_query_steer.steering.engine import Changes, apply_edits
from sae_query_steer.steering.side_by_side import SideBySide
from sae_query_steer.steering.steerer import AnySteerer, JoinedSteerers, Steerer, parts_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Continuations:
    """What a model wrote after each of several prompts."""

    texts: list[str]
    """Without special tokens."""

    tokens: list[Tensor]
    """Ids [pos], with the end token where the model ended."""

    relative_changes: list[float]
    """Mean of |delta q| / |q| over a prompt's steered tokens, layers and heads; of
    `mean_difference` the same of the activations that it changes."""


def continuations(
    model: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    steerer: AnySteerer = None,
    batch_size: int = 256,
    temperature: float | None = None,
    seeds: Sequence[int] | None = None,
    chat_template: ChatTemplate = False,
    prepend_bos: bool | None = None,
    until: Sequence[str] = (),
    caches: PromptCaches | None = None,
) -> Continuations:
    """Return continuations of prompts, greedy or sampled, each as if it were alone.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        prompts: texts of any lengths; they begin with BOS as the model's prompts do. Prompts that
            begin with BOS already, such as `chat_prompt` writes, get no second one.
        max_new_tokens: most tokens of a continuation.
        steerer: applied during generation; one with a target for each row needs all prompts in one
            batch.
        batch_size: rows of one call of `generate`.
        temperature: sample from softmax(logits / temperature); None decodes greedily.
        seeds: one for each prompt, with a temperature; see `seeded_sampling`.
        chat_template: as for `tokenize_examples`.
        prepend_bos: True or False overrides the model's setting; with False, prompts have BOS only
            where one is written. None means as said of `prompts`.
        until: texts after which a continuation needs no more tokens; it is not cut there.
            TransformerBridge then ends the row, HookedTransformer and `caches` write on.
        caches: prompts that are continued several times run once, up to their last token; only with
            steerers whose scopes begin there.

    Raises:
        ValueError: a size below 1, a temperature without one seed for each prompt or seeds without
            temperature, a chat template that is missing or that the backend reads differently
            from `tokenize_example`, or some prompts that begin with BOS and some that do not.
    """
    _check(prompts, [steerer], max_new_tokens, temperature, seeds)
    check_number("batch_size", batch_size, whole=True, least=1)
    ends = end_tokens(model)
    prompts, bos = as_read(model, prompts, chat_template, prepend_bos)
    found: list[Continuations] = []
    steering: AbstractContextManager[Any] = nullcontext()
    sampling: AbstractContextManager[Any] = nullcontext()
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        rows = prompts[part]
        prefixed = None
        if caches is not None:
            prefixed = _behind_cache(model, rows, bos, max_new_tokens, steerer, caches)
        changes: list[Changes] = []
        if steerer is not None:  # `generate` knows the lengths of its prompts
            lengths = None if prefixed is None else prefixed.positions.prompt_lengths
            steering = _applied(model, steerer, lengths, changes)
        if temperature is not None and seeds is not None:
            sample = seeded_sampling if prefixed is None else sampled_passes
            sampling = sample(model, seeds[part], temperature=temperature)
        with steering, sampling:
            if prefixed is not None:
                written, width = prefixed.generate(max_new_tokens, ends), 0
            else:
                width = model.to_tokens(rows, padding_side="left", prepend_bos=bos).shape[1]
                written = model.generate(
                    rows,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    prepend_bos=bos,
                    eos_token_id=ends or None,
                    return_type="tokens",
                    verbose=False,
                    **_stops(model, until, width),
                )
        found.append(_continuations(model, written[:, width:], changes))
    return Continuations(
        texts=[text for one in found for text in one.texts],
        tokens=[row for one in found for row in one.tokens],
        relative_changes=[change for one in found for change in one.relative_changes],
    )


def _check(
    prompts: Sequence[str],
    steerers: Sequence[AnySteerer],
    max_new_tokens: int,
    temperature: float | None,
    seeds: Sequence[int] | None,
) -> None:
    """Raise TypeError or ValueError unless the arguments of `continuations` fit."""
    check_texts("prompts", prompts)
    for steerer in steerers:
        if steerer is not None:
            kinds = (Steerer, JoinedSteerers)
            check_kind("steerer", steerer, kinds, "give a steerer, which is applied for you")
    check_number("max_new_tokens", max_new_tokens, whole=True, least=1)
    if (temperature is None) != (seeds is None) or (seeds and len(seeds) != len(prompts)):
        raise ValueError(
            "temperature and seeds must be given together, one seed for each prompt, got "
            f"temperature={temperature} and {len(seeds or ())} seeds for {len(prompts)} prompts"
        )
    if temperature is not None:
        check_number("temperature", temperature, least=1e-6)


COPIES = 8
"""Steerers whose texts are written in the same passes, at most. Source: our choice."""


def continuations_side_by_side(
    model: Any,
    prompts: Sequence[str],
    steerers: Sequence[AnySteerer],
    *,
    max_new_tokens: int,
    caches: PromptCaches,
    temperature: float | None = None,
    seeds: Sequence[int] | None = None,
    chat_template: ChatTemplate = False,
) -> list[Continuations]:
    """Return what `continuations` returns of the same prompts under each of several steerers.

    The prompts, which are one batch, run once, and up to 8 copies of each are continued in the same
    passes behind one cache, on TransformerBridge where the model takes a mask that separates the
    copies. Steerers of attention or logits, and of tokens before the last of the prompt, run
    separately. Keys and logits of the copies are as large as `caches` may be, at most.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        prompts: as for `continuations`.
        steerers: one for each copy; None steers nothing.
        max_new_tokens: most tokens of a continuation.
        caches: keeps the prompts.
        temperature: as for `continuations`.
        seeds: as for `continuations`.
        chat_template: as for `tokenize_examples`.

    Raises:
        ValueError: as `continuations`.
    """
    _check(prompts, steerers, max_new_tokens, temperature, seeds)
    given: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "caches": caches,
        "temperature": temperature,
        "seeds": seeds,
        "chat_template": chat_template,
        "batch_size": len(prompts),
    }
    rows, bos = as_read(model, prompts, chat_template)
    together = [i for i, s in enumerate(steerers) if _changes_activations(s)]
    prefixed = None
    if len(together) > 1:
        prefixed = _behind_cache(model, rows, bos, max_new_tokens, None, caches)
    found: dict[int, Continuations] = {}
    most = 0 if prefixed is None else _most_copies(prefixed, max_new_tokens, caches.max_bytes)
    if prefixed is not None and most > 1:
        first = prefixed.positions.index[:, 0]
        prefixed.unchanged(torch.arange(len(first)), first, (), copies=True)
        together = [i for i in together if not _acts_before(steerers[i], prefixed)]
        for start in range(0, len(together) if prefixed.shares_cache else 0, most):
            some = together[start : start + most]
            if len(some) == 1:  # there is nothing to share
                continue
            for steerer in (part for i in some for part in parts_of(steerers[i])):
                steerer.check_model(model)
            copies = prefixed.repeated(len(some))
            beside = SideBySide([steerers[i] for i in some], copies)
            sampling: AbstractContextManager[Any] = nullcontext()
            if temperature is not None and seeds is not None:
                sampling = sampled_passes(model, seeds, temperature=temperature, copies=len(some))
            with hooks_of_a_pass(model, beside.hooks()), sampling:
                written = copies.generate(max_new_tokens, end_tokens(model))
            by_copy = zip(some, written.split(len(prompts)), beside.changes, strict=True)
            found |= {i: _continuations(model, own, changes) for i, own, changes in by_copy}
    return [
        found.get(i) or continuations(model, prompts, steerer=steerer, **given)
        for i, steerer in enumerate(steerers)
    ]


def _continuations(model: Any, written: Tensor, changes: Sequence[Changes]) -> Continuations:
    tokenizer, ends = tokenizer_of(model), end_tokens(model)
    tokens = [_until_end(row, ends) for row in written.cpu()]
    return Continuations(
        texts=[str(tokenizer.decode(row, skip_special_tokens=True)) for row in tokens],
        tokens=tokens,
        relative_changes=_means(changes, list(map(len, tokens))),
    )


def _applied(
    model: Any, steerer: Steerer | JoinedSteerers, prompt_lengths: Any, changes: list[Changes]
) -> AbstractContextManager[Any]:
    """Return the block of a steerer, in which how much it changes is kept."""
    if isinstance(steerer, LogitBias):  # changes no activation
        return steerer.apply(model, prompt_lengths=prompt_lengths)
    parts = parts_of(steerer)
    for part in parts:
        part.check_model(model)
    edits = [(part.edit, part.where) for part in parts]
    return apply_edits(model, edits, prompt_lengths=prompt_lengths, changes=changes)


def _means(changes: Sequence[Changes], n_written: Sequence[int]) -> list[float]:
    """Return the mean change of each row, without tokens after its end, which run for others."""
    written = torch.tensor(n_written)
    total, count = torch.zeros(len(written)), torch.zeros(len(written))
    for tokens, relative in changes:
        row, lengths = tokens.row.cpu(), tokens.prompt_lengths
        if lengths is not None:  # the last token that is written is read by none
            own = tokens.position.cpu() < (lengths.cpu() + written - 1)[row]
            row, relative = row[own], relative[own]
        total.index_add_(0, row, relative.sum(-1))
        count.index_add_(0, row, torch.full((len(relative),), float(relative.shape[-1])))
    return (total / count.clamp(min=1)).tolist()


def _changes_activations(steerer: AnySteerer) -> bool:
    """Return whether a steerer needs the hook points of its sites alone."""
    parts = parts_of(steerer)
    return not any(isinstance(part, LogitBias) or part.edit.needs_keys for part in parts)


def _acts_before(steerer: AnySteerer, prefixed: PrefixedRows) -> bool:
    """Return whether a steerer acts on tokens that the cache holds."""
    scopes = [s.scope if isinstance(s, LogitBias) else s.where.scope for s in parts_of(steerer)]
    return any(bool(select(scope, prefixed.before).any()) for scope in scopes)


def _most_copies(prefixed: PrefixedRows, n_new: int, max_bytes: int) -> int:
    """Return how many copies of rows fit into the memory and the context."""
    model, (n_rows, width) = prefixed.model, prefixed.before.index.shape
    config = getattr(vars(model).get("original_model"), "config", None)
    reach = min(int(model.cfg.n_ctx), getattr(config, "sliding_window", None) or 2**62)
    keys = n_new * prefixed.n_bytes // width
    logits = 8 * n_rows * int(model.cfg.d_vocab)  # with what they are compared to
    return min(COPIES, (reach - width) // (n_new + 1), max_bytes // (keys + logits))


def batch_of(
    model: Any, rows: Sequence[str], tokens: Sequence[Tensor], bos: bool | None
) -> TokenBatch:
    """Return prompts, in the form for the backend, with the tokens after them."""
    contexts = [model.to_tokens(row, prepend_bos=bos)[0].cpu() for row in rows]
    joined = [torch.cat(pair) for pair in zip(contexts, tokens, strict=True)]
    return TokenBatch(
        tokens=pad_sequence(joined, batch_first=True),
        lengths=torch.tensor(list(map(len, joined))),
        prompt_lengths=torch.tensor(list(map(len, contexts))),
        labels=("",) * len(rows),
        indices=tuple(range(len(rows))),
    )


def _behind_cache(
    model: Any,
    rows: Sequence[str],
    bos: bool | None,
    max_new_tokens: int,
    steerer: AnySteerer,
    caches: PromptCaches,
) -> PrefixedRows | None:
    """Return rows behind the cache of their prompts; None if they must run as a whole.

    That is where the context is too short, or the steerer acts on tokens that the cache holds.
    """
    batch = batch_of(model, rows, [torch.tensor([], dtype=torch.long)] * len(rows), bos)
    if int(batch.prompt_lengths.max()) + max_new_tokens > int(model.cfg.n_ctx):
        return None
    prefixed = caches.rows(batch)
    return None if _acts_before(steerer, prefixed) else prefixed


def _stops(model: Any, until: Sequence[str], width: int) -> dict[str, Any]:
    """Return what ends rows of `generate` once their tokens after `width` hold one of some texts.

    HookedTransformer has no such option.
    """
    if not until or not isinstance(model, TransformerBridge):
        return {}

    class Written(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            texts = tokenizer_of(model).batch_decode(input_ids[:, width:], skip_special_tokens=True)
            done = [any(stop in text for stop in until) for text in texts]
            return torch.tensor(done, device=scores.device)

    return {"stopping_criteria": Written()}


def as_read(
    model: Any,
    prompts: Sequence[str],
    chat_template: ChatTemplate,
    prepend_bos: bool | None = None,
) -> tuple[list[str], bool | None]:
    """Return prompts as the backend should read them, and `prepend_bos` for it.

    Prompts in a chat template get no BOS; they are checked token by token.
    """
    tokenizer, rows = tokenizer_of(model), list(prompts)
    if chat_template:
        rows = [chat_prompt(prompt, tokenizer, chat_template) for prompt in prompts]
    elif prepend_bos:
        return rows, True
    elif prepend_bos is None:
        bos = tokenizer.bos_token
        begin = [bos is not None and row.startswith(str(bos)) for row in rows]
        if not any(begin):
            return rows, None
        if not all(begin):
            raise ValueError(
                f"all prompts or none must begin with {bos!r}, got {sum(begin)} of {len(rows)}: "
                "continue them in two calls"
            )
    for text in rows:
        example = LabelledExample(prompt=text, label="none")
        ours = tokenize_example(model, example, prepend_bos=False).tokens.tolist()
        backend = model.to_tokens(text, prepend_bos=False)[0].tolist()
        # Centroids are made of the one, texts are written after the other.
        if backend != ours:
            raise ValueError(
                f"the backend must read the chat prompt {text!r} as the tokenizer does ({len(ours)}"
                f" tokens), got {len(backend)} tokens: set tokenizer.add_bos_token so that BOS "
                f"comes once, and shorten what exceeds the model's {model.cfg.n_ctx} tokens"
            )
    return rows, False


def _until_end(row: Tensor, ends: Sequence[int]) -> Tensor:
    at = torch.isin(row, torch.tensor(ends, dtype=row.dtype)).nonzero()
    return row[: int(at[0]) + 1] if len(at) else row
