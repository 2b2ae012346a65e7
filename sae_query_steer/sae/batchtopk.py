"""BatchTopK: the largest pre-activations of each head over a whole batch, k a token on average."""

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from sae_lens import SAEConfig
from sae_lens.registry import register_sae_training_class
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_query_steer.sae.core import HeadedLatents, PerHead, QueryHeadTrainingSAE
from sae_query_steer.sae.jumprelu import QueryHeadJumpReLUSAEConfig
from sae_query_steer.sae.topk import QueryHeadTopKTrainingSAE, QueryHeadTopKTrainingSAEConfig

ARCHITECTURE = "query_head_batchtopk"


@dataclass(kw_only=True)
class QueryHeadBatchTopKTrainingSAEConfig(QueryHeadTopKTrainingSAEConfig):
    """BatchTopK over the latents of each head; inference is JumpReLU, as in SAELens."""

    k: int | float = 32  # pyright: ignore[reportIncompatibleVariableOverride]
    """Latents of one head that fire at a token on average; a fraction is allowed."""

    topk_threshold_lr: float = 0.01
    """Share by which a batch moves the running threshold of a head."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.topk_threshold_lr <= 1:
            raise ValueError(
                f"topk_threshold_lr={self.topk_threshold_lr} is not allowed: give more than 0, at "
                "most 1 (SAELens's is 0.01)"
            )

    @override
    def _check_k(self) -> None:
        if not 0 < self.k <= self.d_sae_per_head:
            raise ValueError(
                f"k={self.k} is not allowed: give more than 0, at most "
                f"d_sae_per_head={self.d_sae_per_head}"
            )

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return QueryHeadJumpReLUSAEConfig

    @override
    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        settings = super().get_inference_sae_cfg_dict()
        del settings["rescale_acts_by_decoder_norm"]  # TopK's; JumpReLU has no such setting
        return settings


class QueryHeadBatchTopKTrainingSAE(QueryHeadTopKTrainingSAE):
    """BatchTopK SAEs of all heads of a query site, in training.

    What fires depends on the batch. `topk_threshold [head]` follows the least latent of a head that
    fired in a batch, and is the threshold of all its latents once it is saved for inference.
    """

    cfg: QueryHeadBatchTopKTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    topk_threshold: Tensor

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        # In double precision, as in SAELens: steps of a small share would round away.
        zeros = torch.zeros(self.n_heads, dtype=torch.double, device=self.device)
        self.register_buffer("topk_threshold", zeros)

    @override
    def activation(self, hidden_pre: HeadedLatents) -> HeadedLatents:
        """Keep the int(k * tokens) largest of each head over all leading axes, above zero."""
        by_head = rearrange(hidden_pre.relu(), "... h s -> h (...) s")
        flat = by_head.flatten(1)
        top = flat.topk(int(self.cfg.k * by_head.shape[1]), dim=-1)
        kept = torch.zeros_like(flat).scatter(-1, top.indices, top.values)
        return rearrange(kept.reshape(by_head.shape), "h b s -> b h s").reshape(hidden_pre.shape)

    @override
    def backward(self, step_input: TrainStepInput) -> tuple[Tensor, Tensor]:
        # TopK's faster way decides token by token.
        return QueryHeadTrainingSAE.backward(self, step_input)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Return losses and outputs of a batch, and move the running thresholds."""
        output = super().training_forward_pass(step_input)
        self._move_topk_threshold(self.heads_of_latents(output.feature_acts))
        # SAELens logs single numbers.
        output.metrics["topk_threshold"] = self.topk_threshold.mean()
        return output

    @torch.no_grad()
    def _move_topk_threshold(self, latents: Float[Tensor, "batch head d_sae_per_head"]) -> None:
        least = latents.where(latents > 0, torch.inf).amin((0, 2)).to(self.topk_threshold.dtype)
        lr = self.cfg.topk_threshold_lr
        moved = (1 - lr) * self.topk_threshold + lr * least
        # A head in which nothing fired keeps its threshold.
        self.topk_threshold = moved.where(least < torch.inf, self.topk_threshold)

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float | PerHead) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        if self.cfg.rescale_acts_by_decoder_norm:
            # The threshold is in units of latents times decoder norms, which the fold has divided.
            factor = torch.as_tensor(scaling_factor, dtype=torch.double, device=self.device)
            self.topk_threshold /= factor

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Fold the decoder norms, and give every latent of a head the head's threshold."""
        super().process_state_dict_for_saving_inference(state_dict)
        running = state_dict.pop("topk_threshold").to(self.b_enc.dtype)
        state_dict["threshold"] = running[:, None].expand_as(self.b_enc).contiguous()


register_sae_training_class(
    ARCHITECTURE, QueryHeadBatchTopKTrainingSAE, QueryHeadBatchTopKTrainingSAEConfig
)
