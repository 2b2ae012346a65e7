"""Models that are compiled, quantised, or spread over devices."""

import re

import pytest
import torch

import sae_query_steer as sqs
from sae_query_steer.sae.encoders import on_device
from sae_query_steer.steering.files import steerer_settings

NAME = "blocks.2.attn.hook_q"
PROMPTS = ["w1 w20 w33", "w5", "w40 w41 w2 w17 w9"]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "verbose": False, "stop_at_eos": False}


@pytest.fixture(scope="module")
def make(saes, targets):
    def make(saes=saes, targets=targets, **changes):
        settings = {
            "target": "create",
            "objective": sqs.SquaredDistance(),
            "n_steps": 3,
            "step_size": 0.3,
            "scope": sqs.LastPromptToken() | sqs.scopes.ResponseTokens(),
        }
        return sqs.LatentGradientSteerer(saes, targets, **{**settings, **changes})

    return make


class Int8Linear(torch.nn.Module):
    """A linear layer whose weights are whole numbers, as those of quantised models are."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        assert linear.bias is None
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = torch.nn.Parameter(
            (linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight * self.scale).T.to(x.dtype)


def quantized(folder):
    """The tiny model, booted on the bridge, with all linear layers of its blocks in 8 bits."""
    model = sqs.load_model(str(folder), device="cpu")
    for parent in list(model.original_model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.Linear) and child.out_features != model.cfg.d_vocab:
                setattr(parent, name, Int8Linear(child))
    return model


@pytest.mark.slow
def test_a_compiled_model_is_refused_before_anything_is_placed(tiny_folder, make):
    def whole(model):
        return torch.compile(model, backend="eager"), "the model"

    def in_place(model):
        model.blocks[1].compile(backend="eager")
        return model, "blocks.1"

    def function(model):
        model.blocks[2].forward = torch.compile(model.blocks[2].forward, backend="eager")
        return model, "blocks.2._original_component"

    for compiled in (whole, in_place, function):
        model, part = compiled(sqs.load_model(str(tiny_folder), device="cpu"))
        text = f"{part} is compiled by torch.compile, which may skip hooks"
        with pytest.raises(ValueError, match=re.escape(text)), make().apply(model):
            pass
        with pytest.raises(ValueError, match=re.escape(text)):
            make().fwd_hooks(model)
        assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_a_quantised_model_is_steered_by_what_was_made_on_it(tiny_folder, saes, make, examples):
    model = quantized(tiny_folder)
    assert any(p.dtype == torch.int8 for p in model.parameters())
    own = sqs.CentroidTargetBuilder(model, saes).fit(sqs.tokenize_examples(model, examples))
    bare = model.generate(PROMPTS, return_type="tokens", **GREEDY)
    with make(targets=own).apply(model, record=True) as trace:
        steered = model.generate(PROMPTS, return_type="tokens", **GREEDY)
        again = model.generate(PROMPTS, return_type="tokens", use_past_kv_cache=False, **GREEDY)
    assert torch.equal(steered, again)
    assert not torch.equal(steered, bare)
    table = trace.summary()
    assert (table["loss_after"] < table["loss_before"]).all()


def test_a_steerer_moves_to_a_device_and_the_one_before_stays(saes, make):
    steerer = make()
    moved = steerer.to("meta")
    assert {sae.device.type for sae in moved.saes.values()} == {"meta"}
    assert {sae.device.type for sae in steerer.saes.values()} == {"cpu"}
    assert steerer_settings(moved) == steerer_settings(steerer)
    here = steerer.to("cpu")
    assert all(here.saes[name] is saes[name] for name in saes), "nothing is copied without need"


@pytest.mark.parametrize("heads", [None, [1, 3]])
def test_the_encoder_follows_the_device_of_the_activations(make, heads):
    steerer = make(heads=heads)
    n_heads = 4 if heads is None else 2
    encoder = steerer._encoder(steerer.where.chosen[NAME], torch.device("meta"))
    assert encoder.W_dec.device.type == "meta"
    assert encoder.n_heads == n_heads
    latents = encoder.encode(torch.empty(5, n_heads, 8, device="meta"))
    assert latents.device.type == "meta"
    assert (
        steerer._encoder(steerer.where.chosen[NAME], torch.device("cpu")).W_dec.device.type == "cpu"
    )


def test_an_encoder_without_weights_is_everywhere(tiny_models):
    (encoder,) = sqs.sae.identity_encoders(sqs.query_sites(tiny_models["bridge"], [1])).values()
    assert on_device(encoder, "meta") is encoder
