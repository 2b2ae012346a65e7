"""Sampling in which every row draws by its own seed, whatever batch it is in."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities.activation_functions import apply_softcap

from sae_query_steer.models.calls import Enter, listening
from sae_query_steer.models.loading import check_eager


@contextmanager
def seeded_sampling(
    model: Any, seeds: Sequence[int], *, temperature: float = 1.0
) -> Iterator[None]:
    """Make every call of greedy `generate` a sample, for the length of a `with` block.

    argmax(logits / T + Gumbel noise) is a draw from softmax(logits / T). A row's noise is a
    function of its seed and of the step alone: the row draws the same alone and in every batch,
    with the KV cache on and off, in every call. The global random state is neither read nor
    changed; the host's own sampling does both, and its draws depend on the batch.

    Call `generate` or `generate_stream` with do_sample=False inside the block. The logits that
    they give are noisy: 0 at the token that is drawn, below 0 elsewhere. Forward passes outside
    them are left alone. Top-k and top-p are not offered.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        seeds: one for each row of the batch.
        temperature: T, 1e-6 or more; the lower, the nearer to greedy decoding.

    Raises:
        ValueError: a temperature that is below 1e-6 or not finite, a compiled model, or, inside,
            a batch of another number of rows, or do_sample=True.

    Source: the Gumbel-max trick; a generator for each row is our choice.
    """
    check_temperature(temperature)
    check_eager(model)

    with listening(model, _Sampling(model, seeds, temperature)):
        yield


@dataclass(frozen=True, eq=False)
class _Sampling:
    """Adds noise to the logits of every call of `generate`."""

    model: Any
    seeds: Sequence[int]
    temperature: float

    def forward_pass(self) -> AbstractContextManager[None]:
        return nullcontext()

    def generation(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Enter:
        _check_greedy(call, args, kwargs)
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        return lambda: _noise(self.model, generators, self.temperature)


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless a temperature is a finite number of 1e-6 or more."""
    if not (math.isfinite(temperature) and temperature >= 1e-6):
        raise ValueError(
            f"temperature={temperature} is not allowed: give a finite number, 1e-6 or more (to "
            "decode greedily, sample nothing)"
        )


def _check_greedy(generate: Callable[..., Any], args: Any, kwargs: Any) -> None:
    given = inspect.signature(generate).bind(*args, **kwargs)
    given.apply_defaults()
    if given.arguments["do_sample"]:
        raise ValueError(
            "do_sample=True (the hosts' default) would sample a second time, by the global random "
            "state: call generate(..., do_sample=False) inside seeded_sampling"
        )


@contextmanager
def _noise(model: Any, generators: Sequence[torch.Generator], temperature: float) -> Iterator[None]:
    def add_noise(_unembed: Any, _args: Any, logits: Tensor) -> Tensor:
        if len(logits) != len(generators):
            raise ValueError(
                f"the batch has {len(logits)} rows, there are {len(generators)} seeds: give one "
                "for each prompt, and all prompts in one call of generate()"
            )
        last = _final_logits(model, logits[:, -1])
        last = last.to(torch.promote_types(last.dtype, torch.float32))
        noise = torch.stack([_gumbel(last.shape[-1], generator) for generator in generators])
        # Shifted before the division, so that a low temperature overflows nothing; and after it,
        # so that the one drawn is 0 and the others below: half precision, or a soft cap that
        # follows, would make ties of large values that lie close together.
        scores = (last - last.amax(-1, keepdim=True)) / temperature + noise.to(last)
        noisy = logits.clone()
        noisy[:, -1] = (scores - scores.amax(-1, keepdim=True)).to(logits)
        return noisy

    handle = model.unembed.register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


def _gumbel(n: int, generator: torch.Generator) -> Float[Tensor, " n"]:
    # In 64 bits: of 32-bit uniform numbers the largest of a big vocabulary are often equal.
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    return -torch.log(-torch.log(uniform.clamp(min=torch.finfo(torch.float64).tiny)))


def _final_logits(model: Any, logits: Float[Tensor, "batch d_vocab"]) -> Tensor:
    """Return what the host makes of the unembedding's output: some models cap or scale it.

    Both are increasing functions, so what they do to the noisy logits leaves the argmax.
    """
    adapter = getattr(model, "adapter", None)
    if adapter is not None:  # a TransformerBridge
        return adapter.apply_output_logits_transform(logits)
    return apply_softcap(logits, model.cfg.output_logits_soft_cap)
