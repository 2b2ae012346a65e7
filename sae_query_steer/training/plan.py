"""What a training run will be: checked before it starts, and written beside its SAEs."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from sae_query_steer.models.fingerprint import dtype_name
from sae_query_steer.models.loading import model_name
from sae_query_steer.sae.core import QueryHeadTrainingSAEConfig
from sae_query_steer.sites import QuerySite, check_sites
from sae_query_steer.training.resources import check_disk, check_memory
from sae_query_steer.training.stream import QueryStream


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How long, how fast and on what batches; the names are SAELens's.

    `train_query_saes` documents each of them.
    """

    training_tokens: int
    seed: int
    lr: float
    lr_warm_up_steps: int
    lr_decay_steps: int
    train_batch_size_tokens: int
    store_batch_size_prompts: int
    n_batches_in_buffer: int
    dead_feature_window: int
    n_batches_for_norm_estimate: int
    autocast: bool
    autocast_lm: bool

    def __post_init__(self) -> None:
        for name in (
            "training_tokens",
            "train_batch_size_tokens",
            "store_batch_size_prompts",
            "n_batches_in_buffer",
            "n_batches_for_norm_estimate",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: give 1 or more")
        for name in ("seed", "lr_warm_up_steps", "lr_decay_steps", "dead_feature_window"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: give 0 or more")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr={self.lr} is not allowed: give a finite number above 0")
        check_steps(self.training_tokens, self.train_batch_size_tokens)
        steps = self.training_tokens // self.train_batch_size_tokens
        if self.lr_warm_up_steps + self.lr_decay_steps > steps:
            raise ValueError(
                f"lr_warm_up_steps={self.lr_warm_up_steps} and lr_decay_steps="
                f"{self.lr_decay_steps} are more than the {steps} steps of the run: give fewer, or "
                "more training_tokens"
            )

    def trainer_config(self, device: str) -> SAETrainerConfig:
        """Return SAELens's settings of the run."""
        return SAETrainerConfig(
            total_training_samples=self.training_tokens,
            train_batch_size_samples=self.train_batch_size_tokens,
            lr=self.lr,
            lr_end=self.lr / 10,
            lr_warm_up_steps=self.lr_warm_up_steps,
            lr_decay_steps=self.lr_decay_steps,
            dead_feature_window=self.dead_feature_window,
            n_batches_for_norm_estimate=self.n_batches_for_norm_estimate,
            autocast=self.autocast,
            device=device,
        )


def training_settings(
    plan: TrainingPlan,
    model: Any,
    rows: Int[Tensor, "row pos"],
    sites: Sequence[QuerySite],
    sae: QueryHeadTrainingSAEConfig,
    *,
    prepend_bos: bool,
) -> dict[str, Any]:
    """Return all that decides the weights of a run, as JSON; the texts by their hash."""
    architecture = dataclasses.asdict(sae)
    for name in ("metadata", "device", "n_heads", "d_head", "d_in", "d_sae"):
        architecture.pop(name)
    return {
        "model": model_name(model),
        "model_dtype": dtype_name(model),
        "hook_names": [site.hook_name for site in sites],
        "architecture": sae.architecture(),
        "sae": architecture,
        "context_size": rows.shape[1],
        "prepend_bos": prepend_bos,
        "n_rows": len(rows),
        "rows_sha256": hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest(),
        **dataclasses.asdict(plan),
    }


def check_resources(
    configs: Sequence[QueryHeadTrainingSAEConfig], stream: QueryStream, out: Path | None
) -> None:
    """Raise if a run can't fit into memory or onto the disk, by what it needs at least.

    Raises:
        ValueError: see `check_memory` and `check_disk`.
    """
    device = configs[0].device
    needed = {device: {"weights, gradients and Adam's moments": training_bytes(configs)}}
    here = needed.setdefault(stream.device, {})
    here["activations"] = (2 if stream.prefetch else 1) * stream.chunk_bytes()
    check_memory(needed)
    if out is not None:
        check_disk(out, disk_bytes(configs))


def check_steps(training_tokens: int, train_batch_size_tokens: int) -> None:
    """Raise unless a run has one step or more.

    Raises:
        ValueError: the message names both numbers.
    """
    if training_tokens < train_batch_size_tokens:
        raise ValueError(
            f"training_tokens={training_tokens} is less than one step of "
            f"train_batch_size_tokens={train_batch_size_tokens}: give more of the former or less "
            "of the latter"
        )


def training_bytes(configs: Sequence[QueryHeadTrainingSAEConfig]) -> int:
    """Return the memory of the SAEs in training: weights, gradients, and Adam's two moments."""
    return 4 * sum(map(weight_bytes, configs))


def disk_bytes(configs: Sequence[QueryHeadTrainingSAEConfig]) -> int:
    """Return the most that lies on disk while SAEs are trained."""
    # Weights and two moments a state, of which two lie there while one replaces the other.
    return (2 * 3 + 1) * sum(map(weight_bytes, configs))


def weight_bytes(config: QueryHeadTrainingSAEConfig) -> int:
    """Return the memory of the weights of one site's SAE, biases and thresholds left out."""
    item = {"float32": 4, "float64": 8}[config.dtype]
    return 2 * config.n_heads * config.d_head * config.d_sae_per_head * item


def filled_in(sae: QueryHeadTrainingSAEConfig, site: QuerySite) -> QueryHeadTrainingSAEConfig:
    """Return a config with the sizes of a site."""
    return dataclasses.replace(
        sae,
        n_heads=site.n_heads,
        d_head=site.d_head,
        d_in=site.d_in,
        d_sae=site.n_heads * sae.d_sae_per_head,
    )


def site_configs(
    model: Any, sites: Sequence[QuerySite], sae: QueryHeadTrainingSAEConfig, *, autocast: bool
) -> dict[str, QueryHeadTrainingSAEConfig]:
    """Return the config of every site by hook name, filled in from the site and checked against it.

    Raises:
        TypeError: `sae` is no training config.
        ValueError: a site that the model does not have, or a config that contradicts it.
    """
    if not isinstance(sae, QueryHeadTrainingSAEConfig):
        raise TypeError(
            f"sae={type(sae).__name__} is no training config of a query-head SAE: give one such as "
            "QueryHeadTopKTrainingSAEConfig"
        )
    check_sites(sites)
    if sae.dtype not in (allowed := ("float32",) if autocast else ("float32", "float64")):
        raise ValueError(
            f"dtype={sae.dtype!r} is not allowed{' with autocast' if autocast else ''}: train SAEs "
            f"in {' or '.join(allowed)}, for Adam's steps are lost in 16 bits; autocast=True is "
            "mixed precision"
        )
    configs = {}
    for site in sites:
        site.check(model)
        if (sae.n_heads, sae.d_head) not in ((0, 0), (site.n_heads, site.d_head)):
            raise ValueError(
                f"the SAE config has {sae.n_heads} heads of {sae.d_head}: the site at layer "
                f"{site.layer} has {site.n_heads} heads of {site.d_head}; leave n_heads and d_head "
                "out to take them from the site"
            )
        configs[site.hook_name] = dataclasses.replace(
            filled_in(sae, site),
            device=str(model.cfg.device),
            metadata=SAEMetadata(model_name=model_name(model), hook_name=site.hook_name),
        )
    return configs
