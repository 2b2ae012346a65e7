"""SAELens's trainers, changed so that the heads of a site are independent.

The gradient of each head is clipped on its own, as in a solo run (SAELens clips the global norm,
which would couple the heads of a layer), and queries are scaled head by head.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from torch.nn import Parameter
from typing_extensions import override

from sae_query_steer.config import TrainingConfig
from sae_query_steer.progress import SECONDS, OnMetrics

CLIP_NORM = 1.0
"""Largest norm of the gradient of one head; SAELens's value for a whole SAE."""

FlatQueries = Float[Tensor, "*batch d_in"]


def trainer_config(config: TrainingConfig, device: str) -> SAETrainerConfig:
    """Return SAELens's settings of a run."""
    return SAETrainerConfig(
        total_training_samples=config.training_tokens,
        train_batch_size_samples=config.train_batch_size_tokens,
        lr=config.lr,
        lr_end=config.lr / 10,
        lr_warm_up_steps=config.lr_warm_up_steps,
        lr_decay_steps=config.lr_decay_steps,
        dead_feature_window=config.dead_feature_window,
        n_batches_for_norm_estimate=config.n_batches_for_norm_estimate,
        autocast=config.autocast,
        device=device,
    )


class HeadwiseTrainer(SAETrainer[Any, Any]):
    """SAELens's trainer, with the gradient of each head clipped on its own.

    The step is SAELens's except for the clipping and for `backward`, in which an architecture may
    compute loss, gradients and firing counts without autograd. Autocast around it has no effect.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation_scaler = HeadwiseScaler(self.sae.cfg.n_heads)
        self.autocast_if_enabled = torch.autocast(
            torch.device(self.cfg.device).type, torch.bfloat16, enabled=self.cfg.autocast
        )
        for group in self.optimizer.param_groups:
            group["fused"] = True  # the same update in one pass over the memory

    @override
    def step(self, batch: Tensor) -> TrainStepOutput:
        return super().step(batch.to(self.sae.dtype))

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
        # The trainer of several SAEs reads the loss only.
        empty = sae_in.new_empty(0)
        return TrainStepOutput(sae_in, empty, empty, empty, loss, {"loss": loss})


class HeadwiseMultiTrainer(MultiSAETrainer):
    """SAELens's trainer of several SAEs on one stream, with a `HeadwiseTrainer` for each.

    Args:
        cfg: SAELens's settings.
        saes: the SAEs by hook name.
        checkpoint: called with this trainer before every step and after the last.
        on_metrics: called every 100 steps and after the last.
    """

    def __init__(
        self,
        cfg: SAETrainerConfig,
        saes: Mapping[str, Any],
        checkpoint: Callable[["HeadwiseMultiTrainer"], None] | None = None,
        on_metrics: OnMetrics | None = None,
    ) -> None:
        names = {name: name for name in saes}
        super().__init__(cfg=cfg, saes=dict(saes), hook_names=names, data_provider=iter(()))
        self._checkpoint, self._on_metrics = checkpoint, on_metrics
        self.trainers = {
            name: HeadwiseTrainer(cfg=one.cfg, sae=one.sae, data_provider=iter(()))
            for name, one in self.trainers.items()
        }

    @override
    def fit(self) -> dict[str, Any]:
        if self.trainers:
            return super().fit()
        # A rank without a site runs the model for the others, and waits with them at checkpoints.
        while self.n_training_samples < self.cfg.total_training_samples:
            self._maybe_log_sparsity()
            next(self.data_provider)
            self.n_training_steps += 1
            self.n_training_samples += self.cfg.train_batch_size_samples
        self._maybe_log_sparsity(final=True)
        return {}

    @override
    def _maybe_log_sparsity(self, final: bool = False) -> None:
        super()._maybe_log_sparsity(final=final)
        if self._checkpoint is not None:
            self._checkpoint(self)

    @override
    def _update_pbar(self, step_outputs: Any, pbar: Any, update_interval: int = 100) -> None:
        # SAELens moves the bar every 100 steps: a short run would stay at 0 % to its end.
        pbar.mininterval = SECONDS
        done = self.n_training_samples >= self.cfg.total_training_samples
        if self._on_metrics is not None and (done or self.n_training_steps % update_interval == 0):
            found = {"step": self.n_training_steps, "tokens": self.n_training_samples}
            for name, out in step_outputs.items():
                dead = self.trainers[name].dead_neurons.sum()
                found |= {f"loss/{name}": out.loss.item(), f"dead_latents/{name}": int(dead)}
            self._on_metrics(found)
        if self.n_training_steps % update_interval == 0:
            losses = (f"{name} {out.loss.item():.4f}" for name, out in step_outputs.items())
            pbar.set_postfix_str(f"loss {', '.join(losses)}", refresh=False)
        pbar.update(self.n_training_samples - pbar.n)


class HeadwiseScaler(ActivationScaler):
    """Scales flat queries [token head*d_head] to mean norm sqrt(d_head), each head on its own."""

    scaling_factor: Float[Tensor, "head"] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """In float64 on the CPU; None until it is estimated, and again once it is folded."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads, self._n_tokens = n_heads, 0
        self._sums = torch.zeros(n_heads, dtype=torch.float64)

    @override
    def estimate_scaling_factor(
        self, d_in: int, data_provider: Iterator[Tensor], n_batches_for_norm_estimate: int = 1000
    ) -> None:
        """Set the factors from the next batches."""
        self._sums, self._n_tokens = torch.zeros_like(self._sums), 0
        for _ in range(n_batches_for_norm_estimate):
            self.update(next(data_provider))
        self.set_factors(d_in // self.n_heads)

    @torch.no_grad()
    def update(self, acts: FlatQueries) -> None:
        """Add a batch to those of which the factors are made."""
        # Head by head: in another order the last bits of SAELens's sums change. They are in
        # float32, as there, so that half precision does not overflow.
        heads = acts.chunk(self.n_heads, dim=-1)
        self._sums += torch.stack([head.norm(dim=-1).float().sum() for head in heads]).cpu()
        self._n_tokens += acts.shape[:-1].numel()

    def set_factors(self, d_head: int) -> None:
        """Set the factors to sqrt(d_head) / mean norm of each head over the batches.

        Raises:
            ValueError: a head has no finite mean norm above 0.
        """
        means = self._sums / self._n_tokens
        if not bool((means.isfinite() & (means > 0)).all()):
            raise ValueError(
                "the mean norm of every head must be finite and above 0 to scale it, got "
                f"{means.tolist()}: train with normalize_activations='none'"
            )
        # A tensor by a tensor: of a number by a tensor torch takes the reciprocal, which rounds.
        self.scaling_factor = torch.full_like(means, d_head**0.5) / means  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def scale(self, acts: FlatQueries) -> FlatQueries:
        """Return the activations times the factors; unchanged if there are none."""
        if self.scaling_factor is None:
            return acts
        # SAELens's factor is a Python float, so not in half precision. And without waiting for the
        # copy, which would stop an accelerator at every step.
        kind = torch.promote_types(acts.dtype, torch.float32)
        factor = self.scaling_factor.to(acts.device, kind, non_blocking=True)[:, None]
        headed = acts.unflatten(-1, (self.n_heads, -1))
        return (headed * factor).to(acts.dtype).flatten(-2)


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
