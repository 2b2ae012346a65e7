"""Every head of every architecture is SAELens's own SAE of that head: outputs, losses, training."""

import dataclasses

import pytest
import torch
from sae_cases import CONFIGS, new, randn, solo, step, trained_like
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.util import temporary_seed

import sae_query_steer as sqs
from sae_query_steer.training.saelens import HeadwiseTrainer

every_architecture = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
grid = pytest.mark.parametrize(
    ("config", "dtype"),
    [
        pytest.param(
            config,
            dtype,
            id=f"{name}-{dtype}",
            # One case is fast: the architecture with the most state.
            marks=[] if name == "batchtopk" else pytest.mark.slow,
        )
        for dtype, names in (("float64", CONFIGS), ("float32", ("topk", "jumprelu")))
        for name, config in CONFIGS.items()
        if name in names
    ],
)


@every_architecture
def test_each_head_encodes_and_decodes_as_saelens_does_alone(config):
    sae, x = trained_like(config), randn(5, 7, 3, 6)
    latents = sae.encode(x)
    for head in range(3):
        alone = solo(sae, head)
        torch.testing.assert_close(latents[..., head, :], alone.encode(x[..., head, :]))
        torch.testing.assert_close(
            sae.decode(latents)[..., head, :], alone.decode(latents[..., head, :])
        )


@every_architecture
def test_losses_and_gradients_are_the_sums_of_saelens_losses_head_by_head(config):
    config = dataclasses.replace(config, dtype="float64")
    sae, x = trained_like(config), randn(40, 18, dtype=torch.float64)
    # Heads with more dead latents than k_aux = 3, with fewer, and with none.
    dead = torch.zeros(3, 11, dtype=torch.bool)
    dead[0, :5] = dead[1, 2:4] = True
    solos = [solo(sae, head) for head in range(3)]
    ours = sae.training_forward_pass(step(x, dead.flatten()))
    ours.loss.backward()
    total: dict[str, torch.Tensor] = {}
    for head, alone in enumerate(solos):
        theirs = alone.training_forward_pass(step(x.unflatten(-1, (3, 6))[:, head], dead[head]))
        theirs.loss.backward()
        for name, value in theirs.losses.items():
            total[name] = total.get(name, torch.tensor(0.0)) + value
        for name, parameter in alone.named_parameters():
            rtol = 1e-10 if parameter.dtype == torch.float64 else 1e-6
            torch.testing.assert_close(
                getattr(sae, name).grad[head], parameter.grad, rtol=rtol, atol=1e-12
            )
        for name, buffer in alone.named_buffers():
            torch.testing.assert_close(getattr(sae, name)[head], buffer, rtol=1e-12, atol=0)
    assert set(total) == set(ours.losses)
    for name, value in total.items():
        assert value > 0.01, "the comparison shows too little"
        torch.testing.assert_close(ours.losses[name].double(), value.double())


@every_architecture
def test_what_is_saved_for_inference_is_what_saelens_saves_head_by_head(config):
    sae = trained_like(config)
    assert_saved_alike(sae, [solo(sae, head) for head in range(3)])


@every_architecture
def test_each_head_infers_as_saelens_inference_sae_alone(config):
    sae, x = trained_like(config), randn(5, 7, 3, 6)
    ours = sqs.sae.to_inference(sae)
    latents = ours.encode(x)
    assert 0 < (latents > 0).float().mean() < 1
    for head in range(3):
        alone = solo(sae, head)
        state = dict(alone.state_dict())
        alone.process_state_dict_for_saving_inference(state)
        theirs = SAE.from_dict(alone.cfg.get_inference_sae_cfg_dict())
        theirs.load_state_dict(state)
        torch.testing.assert_close(latents[..., head, :], theirs.encode(x[..., head, :]))
        torch.testing.assert_close(ours(x)[..., head, :], theirs(x[..., head, :]))


@grid
def test_200_steps_of_each_head_are_a_solo_run_of_saelens(config, dtype):
    config = dataclasses.replace(config, dtype=dtype, **more_latents(config))
    n_steps, batch = 200, 64
    # Unequal heads, of which the clip meets some: a global one would couple them.
    size = torch.tensor([0.2, 1.0, 30.0], dtype=sae_dtype(dtype))[:, None]
    batches = randn(n_steps, batch, 3, 6, dtype=sae_dtype(dtype)) * size
    settings = SAETrainerConfig(
        total_training_samples=n_steps * batch,
        train_batch_size_samples=batch,
        lr=1e-3,
        lr_end=1e-4,
        lr_warm_up_steps=20,
        lr_decay_steps=40,
        dead_feature_window=15,
    )
    with temporary_seed(0):
        sae = new(config)
    lay_to_rest(sae)
    solos = [solo(sae, head) for head in range(3)]
    n_dead = []

    def served():
        for batch in batches:
            n_dead.append(int(ours.dead_neurons.sum()))
            yield batch.flatten(-2)

    ours = HeadwiseTrainer(cfg=settings, sae=sae, data_provider=served())
    ours.fit()
    for head, alone in enumerate(solos):
        theirs = SAETrainer(
            cfg=settings, sae=alone, data_provider=(batch[:, head] for batch in batches)
        )
        theirs.fit()
        for name, value in alone.state_dict().items():
            assert difference(sae.state_dict()[name][head], value) <= tolerance(config, value), name
        since = ours.n_forward_passes_since_fired.unflatten(0, (3, -1))[head]
        assert torch.equal(since, theirs.n_forward_passes_since_fired)
    assert_saved_alike(sae, solos)
    assert max(n_dead) > 0, "no latent died: the test shows too little"


@grid
def test_a_run_on_scaled_queries_is_a_solo_run_of_saelens_head_by_head(config, dtype):
    normalize = "expected_average_only_in"
    config = dataclasses.replace(config, dtype=dtype, normalize_activations=normalize)
    n_estimate, n_steps, batch = 3, 40, 64
    size = torch.tensor([0.02, 1.0, 30.0], dtype=sae_dtype(dtype))[:, None]
    # Not centred, so that the decoder biases move; longer in the batches that are estimated from.
    batches = (randn(n_estimate + n_steps, batch, 3, 6, dtype=sae_dtype(dtype)) + 0.5) * size
    batches[:n_estimate] *= torch.tensor([1.5, 2.0, 3.0])[:, None, None, None]
    settings = SAETrainerConfig(
        total_training_samples=n_steps * batch,
        train_batch_size_samples=batch,
        lr=1e-2,
        lr_end=1e-3,
        dead_feature_window=15,
        n_batches_for_norm_estimate=n_estimate,
    )
    with temporary_seed(0):
        sae = new(config)
    lay_to_rest(sae)
    solos = [solo(sae, head) for head in range(3)]
    HeadwiseTrainer(cfg=settings, sae=sae, data_provider=(b.flatten(-2) for b in batches)).fit()
    assert sae.cfg.normalize_activations == "none"
    for head, alone in enumerate(solos):
        assert alone.cfg.normalize_activations == normalize
        SAETrainer(cfg=settings, sae=alone, data_provider=(b[:, head] for b in batches)).fit()
        for name, value in alone.state_dict().items():
            assert difference(sae.state_dict()[name][head], value) <= tolerance(config, value), name
    assert_saved_alike(sae, solos)
    # Heads of which one is 1500 times larger than the other, and in none is it all or nothing.
    fires = (sqs.sae.to_inference(sae).encode(batches[-1]) > 0).double().mean((0, 2))
    assert ((fires > 0.01) & (fires < 0.99)).all()


def more_latents(config) -> dict[str, object]:
    """Sizes at which not every latent of every head is needed."""
    sizes: dict[str, object] = {"d_sae_per_head": 24, "d_sae": 72}
    if widths := getattr(config, "matryoshka_widths", None):
        sizes["matryoshka_widths"] = [*widths[:-1], 24]
    return sizes


@torch.no_grad()
def lay_to_rest(sae) -> None:
    """Let more latents than k_aux = 3 of one head never fire, fewer of the next, none of the last.

    Spread over the latents, so that every level of a Matryoshka has some; unequal, so that no tie
    decides which of them the auxiliary loss takes.
    """
    for head, places in ((0, slice(1, None, 4)), (1, slice(2, 20, 9))):
        sae.W_enc[head, :, places] = 0
        bias = getattr(sae, sae.in_units_of_pre[0])[head, places]
        bias -= torch.linspace(0.5, 0.6, len(bias), dtype=bias.dtype)


def sae_dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "float64": torch.float64}[name]


def tolerance(config, value: torch.Tensor) -> float:
    """Largest relative difference that rounding explains."""
    if config.dtype == "float32":
        return 1e-4
    # SAELens keeps the thresholds of JumpReLU in float32 whatever the SAE is, and may let their
    # rounding into the encoder.
    if value.dtype == torch.float32 or getattr(config, "jumprelu_ste_to_input", False):
        return 1e-6
    return 1e-8


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative difference of two weights; 0 where both are 0."""
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


def assert_saved_alike(sae, solos) -> None:
    """Assert that saving for inference gives every head's weights as SAELens does."""
    ours = dict(sae.state_dict())
    sae.process_state_dict_for_saving_inference(ours)
    for head, alone in enumerate(solos):
        theirs = dict(alone.state_dict())
        alone.process_state_dict_for_saving_inference(theirs)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert difference(ours[name][head], value) <= tolerance(sae.cfg, value), name
