"""A tiny Llama with seeded weights, the settings and the loss by which the tasks train it."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.row_batches import NO_LOSS, TaskBatch
from experiments.word_tokens import SPECIAL


def check_training(settings: Any) -> None:
    """Raise unless the settings of a training can be used.

    Args:
        settings: of a task, with what the trainings of all tasks have.

    Raises:
        ValueError: the message names the setting and what is allowed.
    """
    for name in ("n_steps", "max_steps", "n_layers", "n_heads", "d_model", "d_mlp"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}={getattr(settings, name)} is not allowed: give 1 or more")
    if not 0 <= settings.open_share <= 1:
        raise ValueError(f"open_share={settings.open_share} is not allowed: give a share, 0 to 1")
    for name in ("lr", "decision_weight"):
        if not (math.isfinite(getattr(settings, name)) and getattr(settings, name) > 0):
            raise ValueError(
                f"{name}={getattr(settings, name)} is not allowed: give a number above 0"
            )
    if settings.d_model % (2 * settings.n_heads):
        raise ValueError(
            f"d_model={settings.d_model} is not allowed: rotary heads need an even number of "
            f"dimensions, so give a multiple of {2 * settings.n_heads}"
        )


def new_llama(
    n_tokens: int, *, seed: int, d_model: int, n_layers: int, n_heads: int, d_mlp: int
) -> LlamaForCausalLM:
    """Return an untrained Llama; the global random state is left as it was."""
    config = LlamaConfig(
        vocab_size=n_tokens,
        hidden_size=d_model,
        intermediate_size=d_mlp,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        max_position_embeddings=512,
        pad_token_id=SPECIAL.index("<pad>"),
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("</s>"),
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.02, generator=generator)
    return model


def feedback_loss(model: LlamaForCausalLM, batch: TaskBatch, decision_weight: float) -> Tensor:
    """Return the weighted mean loss, in nats, of the tokens that are to be learned."""
    rows, columns = (batch.labels[:, 1:] != NO_LOSS).nonzero(as_tuple=True)
    mask = None if batch.visible is None else _added(batch.visible)
    with _later_masks(model, [_added(visible) for visible in batch.later]):
        hidden = model.model(batch.tokens, attention_mask=mask).last_hidden_state[rows, columns]
    losses = cross_entropy(model.lm_head(hidden), batch.labels[rows, columns + 1], reduction="none")
    weights = torch.where(batch.decisions[rows, columns + 1], decision_weight, 1.0)
    return (weights * losses).sum() / weights.sum()


def _added(visible: Tensor) -> Tensor:
    """Return a mask in the form that is added to the attention scores, for all heads."""
    return torch.zeros(visible.shape).masked_fill(~visible, -1e9)[:, None]


@contextmanager
def _later_masks(model: LlamaForCausalLM, masks: Sequence[Tensor]) -> Iterator[None]:
    """Give layer 1, 2 and so on masks of their own, the last of them to all layers after."""
    with ExitStack() as stack:
        for i, layer in enumerate(model.model.layers[1:] if masks else []):
            mask = masks[min(i, len(masks) - 1)]

            def swap(module: Any, args: Any, kwargs: Any, mask: Tensor = mask) -> Any:
                del module
                return args, kwargs | {"attention_mask": mask}

            stack.callback(layer.register_forward_pre_hook(swap, with_kwargs=True).remove)
        yield


@torch.no_grad()
def greedy_texts(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int
) -> list[str]:
    """Return greedy continuations of prompts in plain transformers, without this package's hooks.

    Args:
        model: a LlamaForCausalLM.
        tokenizer: its tokenizer.
        prompts: BOS is put in front of each.
        max_new_tokens: most tokens of a continuation.
    """
    bos = [SPECIAL.index("<s>")]
    rows = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    tokens = pad_sequence(
        [torch.tensor(bos + row) for row in rows],
        batch_first=True,
        padding_value=SPECIAL.index("<pad>"),
        padding_side="left",
    )
    written = model.generate(
        input_ids=tokens,
        attention_mask=(tokens != SPECIAL.index("<pad>")).long(),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return tokenizer.batch_decode(written[:, tokens.shape[1] :], skip_special_tokens=True)
