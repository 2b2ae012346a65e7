"""Sampling in which every row draws by its own seed, independently of its batch."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformer_lens.utilities.activation_functions import apply_softcap

from sae_query_steer.arguments import check_number
from sae_query_steer.models.calls import Enter, listening
from sae_query_steer.models.loading import check_eager
from sae_query_steer.steering.block import block


@block
def seeded_sampling(
    model: Any, seeds: Sequence[int], *, temperature: float = 1.0
) -> Iterator[None]:
    """Turn every call of greedy `generate` into sampling, for a `with` block.

    argmax(logits / T + Gumbel noise) is a draw from softmax(logits / T). A row's noise depends on
    its seed and on the step only: the row draws the same alone and in every batch, with the KV
    cache on and off, in every call. The global random state is neither read nor changed.

    Call `generate` or `generate_stream` with do_sample=False inside the block. Their logits are
    noisy: 0 at the token that is drawn, below 0 elsewhere. Other forward passes are unchanged.
    Top-k and top-p are not offered.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        seeds: one for each row of the batch.
        temperature: T, 1e-6 or more; lower is closer to greedy decoding.

    Raises:
        ValueError: a temperature below 1e-6 or not finite, a compiled model, or, inside the block,
            a batch of another number of rows, or do_sample=True.

    Source: the Gumbel-max trick; a generator for each row is our choice.
    """
    check_number("temperature", temperature, least=1e-6)
    check_eager(model)
    with listening(model, _Sampling(model, seeds, temperature)):
        yield


def sampled_passes(
    model: Any, seeds: Sequence[int], *, temperature: float, copies: int = 1
) -> AbstractContextManager[None]:
    """Return a context in which each forward pass is a step of one call as in `seeded_sampling`.

    Args as there. The last column of a pass must be every row's last token; with copies of the rows
    side by side, which draw alike, the last column of each copy.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return _Sampling(model, seeds, temperature).noise(generators, copies)


@dataclass(frozen=True, eq=False)
class _Sampling:
    """Adds noise to the logits of every call of `generate`."""

    model: Any
    seeds: Sequence[int]
    temperature: float

    def forward_pass(self) -> AbstractContextManager[None]:
        return nullcontext()

    def generation(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Enter:
        given = inspect.signature(call).bind(*args, **kwargs)
        given.apply_defaults()
        if given.arguments["do_sample"]:
            raise ValueError(
                "do_sample must be False inside seeded_sampling, got True (the default of "
                "generate), which samples a second time, by the global random state"
            )
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        return lambda: self.noise(generators)

    @contextmanager
    def noise(self, generators: Sequence[torch.Generator], copies: int = 1) -> Iterator[None]:
        """Let each forward pass draw from generators, one of each row, for a `with` block."""

        def add_noise(_unembed: Any, _args: Any, logits: Tensor) -> Tensor:
            if len(logits) != len(generators):
                raise ValueError(
                    f"the batch has {len(logits)} rows, there are {len(generators)} seeds: give "
                    "one for each prompt, and all prompts in one call of generate()"
                )
            width = logits.shape[1] // copies
            last = self._final(logits[:, width - 1 :: width])  # [row copy vocab]
            last = last.to(torch.promote_types(last.dtype, torch.float32))
            noise = torch.stack([_gumbel(last.shape[-1], each) for each in generators])[:, None]
            # Shifted before the division, so that a low temperature overflows nothing; and after
            # it, because half precision or a soft cap would make ties of large, close values.
            scores = (last - last.amax(-1, keepdim=True)) / self.temperature + noise.to(last)
            noisy = logits.clone()
            noisy[:, width - 1 :: width] = (scores - scores.amax(-1, keepdim=True)).to(logits)
            return noisy

        handle = self.model.unembed.register_forward_hook(add_noise)
        try:
            yield
        finally:
            handle.remove()

    def _final(self, logits: Tensor) -> Tensor:
        """Return the logits after the model's own cap or scale, which keep the argmax."""
        adapter = getattr(self.model, "adapter", None)
        if adapter is not None:  # a TransformerBridge
            return adapter.apply_output_logits_transform(logits)
        return apply_softcap(logits, self.model.cfg.output_logits_soft_cap)


def _gumbel(n: int, generator: torch.Generator) -> Tensor:
    # In 64 bits: of 32-bit uniform numbers the largest of a big vocabulary are often equal.
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    return -torch.log(-torch.log(uniform.clamp(min=torch.finfo(torch.float64).tiny)))
