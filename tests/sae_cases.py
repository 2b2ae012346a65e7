"""Query-head SAEs of every architecture for the tests, and SAELens's SAE of one head of them."""

import dataclasses

import torch
from sae_lens import TrainingSAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput

import sae_query_steer as sqs
import sae_query_steer.sae as sae_classes

SIZES = {"n_heads": 3, "d_head": 6, "d_sae_per_head": 11}
JUMPRELU = {**SIZES, "jumprelu_bandwidth": 0.3, "l0_coefficient": 0.2}

CONFIGS = {
    "topk": sqs.sae.QueryHeadTopKTrainingSAEConfig(**SIZES, k=4),
    "topk, rows as they are": sqs.sae.QueryHeadTopKTrainingSAEConfig(
        **SIZES, k=4, rescale_acts_by_decoder_norm=False
    ),
    "standard": sqs.sae.QueryHeadStandardTrainingSAEConfig(**SIZES, l1_coefficient=0.3),
    "jumprelu": sae_classes.QueryHeadJumpReLUTrainingSAEConfig(
        **JUMPRELU,
        pre_act_loss_coefficient=0.1,
        l0_warm_up_steps=50,
        # The loss shrinks the decoder rows of dead latents: at SAELens's 0.1 they pass through 0,
        # where rounding decides about their direction.
        decoder_init_norm=1.0,
    ),
    "jumprelu, tanh": sae_classes.QueryHeadJumpReLUTrainingSAEConfig(
        **JUMPRELU,
        jumprelu_sparsity_loss_mode="tanh",
        jumprelu_ste_to_input=True,
        apply_b_dec_to_input=False,
    ),
    "jumprelu, quadratic": sae_classes.QueryHeadJumpReLUTrainingSAEConfig(
        **JUMPRELU,
        jumprelu_sparsity_loss_mode="quadratic",
        target_l0=3.0,
        jumprelu_ste_to_input=True,
    ),
    "batchtopk": sae_classes.QueryHeadBatchTopKTrainingSAEConfig(**SIZES, k=2.7),
    "batchtopk, rows as they are": sae_classes.QueryHeadBatchTopKTrainingSAEConfig(
        **SIZES,
        k=3.0,
        rescale_acts_by_decoder_norm=False,
        topk_threshold_lr=0.1,
        aux_loss_coefficient=0.5,
    ),
    "gated": sae_classes.QueryHeadGatedTrainingSAEConfig(
        **SIZES, l1_coefficient=0.3, l1_warm_up_steps=50
    ),
    "gated, input as it is": sae_classes.QueryHeadGatedTrainingSAEConfig(
        **SIZES, l1_coefficient=2.0, apply_b_dec_to_input=False
    ),
    "matryoshka": sae_classes.QueryHeadMatryoshkaBatchTopKTrainingSAEConfig(
        **SIZES, k=2.7, matryoshka_widths=[2, 4, 11]
    ),
    "matryoshka, levels revive": sae_classes.QueryHeadMatryoshkaBatchTopKTrainingSAEConfig(
        **SIZES,
        k=3.0,
        matryoshka_widths=[3, 11],
        use_matryoshka_aux_loss=True,
        rescale_acts_by_decoder_norm=False,
    ),
}


def randn(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def new(config):
    """A training SAE; its own copy of the config, which training writes to."""
    config = dataclasses.replace(config)
    return get_sae_training_class(config.architecture())[0](config)


def trained_like(config, seed: int = 1):
    """An SAE with weights that no initialisation gives: decoder rows of unequal norm, biases."""
    sae = new(config)
    with torch.no_grad():
        for i, (name, value) in enumerate(sae.state_dict().items()):
            value.copy_(randn(*value.shape, seed=seed + i, dtype=value.dtype) / 2)
            if "threshold" in name:  # training keeps them from falling below 0
                value.abs_()
    return sae


def solo(sae, head: int) -> TrainingSAE:
    """SAELens's own SAE with the settings of all heads and the weights of one."""
    cfg = sae.cfg
    other, other_config = get_sae_training_class(cfg.architecture().removeprefix("query_head_"))
    own = {"d_in": cfg.d_head, "d_sae": cfg.d_sae_per_head}
    shared = {f.name for f in dataclasses.fields(other_config) if hasattr(cfg, f.name)}
    settings = {name: getattr(cfg, name) for name in shared - own.keys() - {"metadata"}}
    alone = other(other_config(**own, **settings))
    alone.load_state_dict({name: value[head] for name, value in sae.state_dict().items()})
    return alone


def step(x, dead=None) -> TrainStepInput:
    return TrainStepInput(
        sae_in=x,
        coefficients={"l1": 0.3, "l0": 0.3},
        dead_neuron_mask=dead,
        n_training_steps=0,
        is_logging_step=False,
    )
