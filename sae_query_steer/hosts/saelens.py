"""SAELens's store and trainers, with the four things that query heads need of them.

- Documents that must stay whole are padded, and the padding is excluded by mask: SAELens's store
  knows no padding, and excludes by token id, where the padding's id may be a real token's too.
- The gradient of each head is clipped on its own, as in a solo run: SAELens clips the global norm,
  which would couple the heads of a layer.
- A data set of token rows is read again from its start at every epoch, without warnings.
- The progress bar moves at every step.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from torch.nn import Parameter
from typing_extensions import override

PAD = -1
"""Marks padding in token rows; no token has this id."""

CLIP_NORM = 1.0
"""Largest norm of the gradient of one head; SAELens's value for a whole SAE."""


class TokenRowsStore(ActivationsStore):
    """SAELens's store over token rows of one length, in which `PAD` marks padding."""

    @override
    def _get_filtered_multi_hook_llm_batch(
        self, raise_on_epoch_end: bool = False
    ) -> dict[str, Tensor]:
        tokens = self.get_batch_tokens(raise_at_epoch_end=raise_on_epoch_end)
        real = (tokens != PAD).flatten().to(self.device)
        # Padding stands to the right of a causal model's row: whatever it reads as, no real
        # token sees it.
        activations = self.get_multi_hook_activations(tokens.clamp(min=0))
        return {
            name: value.to(self.device).flatten(0, 1)[real] for name, value in activations.items()
        }


def token_rows_store(
    model: Any, rows: Sequence[Sequence[int]], hook_d_ins: dict[str, int], **settings: Any
) -> TokenRowsStore:
    """Return a store over token rows that serves the queries of several hooks from one forward.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        rows: token ids, all rows of one length, `PAD` where there is none.
        hook_d_ins: size of the flat activation at each hook name.
        settings: further arguments of SAELens's `from_config_multi_hook`.
    """
    store = TokenRowsStore.from_config_multi_hook(
        model,
        dataset=[{"tokens": row} for row in rows],  # pyright: ignore[reportArgumentType]
        hook_names=list(hook_d_ins),
        hook_d_ins=hook_d_ins,
        context_size=len(rows[0]),
        prepend_bos=False,
        **settings,
    )
    assert isinstance(store, TokenRowsStore)
    return store


class HeadwiseTrainer(SAETrainer[Any, Any]):
    """SAELens's trainer, with the gradient of each head clipped on its own.

    The step is SAELens's, line by line, but for the clipping and for `backward`, in which an
    architecture may come to loss, gradients and firing counts without autograd.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for group in self.optimizer.param_groups:
            group["fused"] = True  # the same update in one pass over the memory

    @override
    def _train_step(self, sae: Any, sae_in: Tensor) -> TrainStepOutput:
        sae.train()
        with self.autocast_if_enabled:
            loss, fired = sae.backward(
                TrainStepInput(
                    sae_in=sae_in,
                    dead_neuron_mask=self.dead_neurons,
                    coefficients=self.get_coefficients(),
                    n_training_steps=self.n_training_steps,
                    is_logging_step=self._is_logging_step(),
                )
            )
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired[fired > 0] = 0
        self.act_freq_scores += fired
        self.n_frac_active_samples += self.cfg.train_batch_size_samples
        clip_grad_norm_per_head_(list(sae.parameters()), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        # Nobody reads the tensors of a step, and some of them were never made.
        nothing = sae_in.new_empty(0)
        return TrainStepOutput(
            sae_in=sae_in,
            sae_out=nothing,
            feature_acts=nothing,
            hidden_pre=nothing,
            loss=loss,
            losses={"loss": loss},
        )


class HeadwiseMultiTrainer(MultiSAETrainer):
    """SAELens's trainer of several SAEs over one stream, with `HeadwiseTrainer` for each."""

    def __init__(self, cfg: SAETrainerConfig, **kwargs: Any) -> None:
        super().__init__(cfg=cfg, **kwargs)
        solo = replace(cfg, n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False)
        self.trainers = {
            name: HeadwiseTrainer(cfg=solo, sae=sae, data_provider=iter(()))
            for name, sae in self.saes.items()
        }

    @override
    def _update_pbar(self, step_outputs: Any, pbar: Any, update_interval: int = 100) -> None:
        # SAELens moves the bar every 100 steps: a short run would stand at 0 % to its end.
        pbar.update(self.cfg.train_batch_size_samples)
        if self.n_training_steps % update_interval == 0:
            losses = (f"{name}: {out.loss.item():.4f}" for name, out in step_outputs.items())
            pbar.set_postfix_str(", ".join(losses))


@torch.no_grad()
def clip_grad_norm_per_head_(parameters: Sequence[Parameter], max_norm: float) -> None:
    """Scale the gradient of each head so that its norm over all parameters is at most `max_norm`.

    Args:
        parameters: tensors whose first axis is the head.
        max_norm: the bound.

    Source: `torch.nn.utils.clip_grad_norm_`, the same rule on the parameters of one head.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.stack([grad.flatten(1).norm(dim=1) for grad in grads]).norm(dim=0)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad *= scale.reshape(-1, *[1] * (grad.ndim - 1))


@contextmanager
def epochs_unannounced() -> Iterator[None]:
    """Silence SAELens's warning at every new epoch: over a user's few texts it is no news."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All samples in the training dataset have been exhausted")
        yield
