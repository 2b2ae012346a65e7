"""Steers exported as biases of queries: the plain model computes what the steered one computes."""

import json
from dataclasses import replace

import pytest
import torch
from recipe_models import write_qwen2, write_tiny
from test_architectures import write
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from wheel_check import make_model, word_tokenizer

import sae_query_steer as sqs
from sae_query_steer.baselines import mean_difference, random_direction
from sae_query_steer.descent.control import (
    ActiveLatents,
    ExponentialDecay,
    GivenLatents,
    LatentAbove,
)
from sae_query_steer.descent.objectives import FixedMove
from sae_query_steer.hub import export_query_bias
from sae_query_steer.learning import no_moves
from sae_query_steer.scopes import EveryPosition

CLASSES = ("create", "remember")
TEXTS = [
    sqs.LabelledExample(prompt=f"w{i} w{i + 1} w{2 * i}", label=CLASSES[i % 2]) for i in range(20)
]
PROMPTS = ["w1 w2 w3 w4 w9 w12", "w7", "w30 w3 w30"]


def write_wide_mistral(folder):
    """A Mistral without a sliding window."""
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 52}
    config = MistralConfig(sliding_window=None, initializer_range=0.4, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        MistralForCausalLM(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


MODELS = {
    "gpt2": lambda folder: write("gpt2, learned positions, fused qkv", folder),
    "llama": lambda folder: make_model(folder, n_layers=3, seed=7),
    "mistral": write_wide_mistral,
    "qwen2": write_qwen2,
}


def loaded(folder, kind):
    MODELS[kind](folder)
    return sqs.load_model(folder, device="cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return loaded(tmp_path_factory.mktemp("query_bias") / "llama", "llama")


def moves(model, saes, *, least=None, **changes):
    """A steerer by random moves of latents, as `TargetLearner` makes them."""
    start, generator = no_moves(model, saes, CLASSES), torch.Generator().manual_seed(1)
    means = {
        name: torch.randn(mean.shape, generator=generator) for name, mean in start.means.items()
    }
    if least is not None:
        means = {name: mean.clamp(min=least) for name, mean in means.items()}
    settings = {"target": "create", "objective": FixedMove(), "n_steps": 2, "step_size": 0.7}
    settings |= {"scope": EveryPosition()} | changes
    return sqs.LatentGradientSteerer(saes, replace(start, means=means), **settings)


def dense(model, layers=None):
    return sqs.sae.identity_encoders(sqs.query_sites(model, layers))


def assert_plain_equals_steered(model, steerer, folder):
    """Compare logits, also of left-padded prompts, and greedy text; return the plain model."""
    export_query_bias(model, steerer, folder)
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder), model.tokenizer
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    width, greedy = max(map(len, ids)), {"max_new_tokens": 8, "do_sample": False}
    rows = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    with torch.no_grad():
        padded = plain(rows, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0)).logits
    moved = []
    for row, tokens in enumerate(ids):
        tokens = torch.tensor([tokens])
        with torch.no_grad(), steerer.apply(model):
            steered = model(tokens)[0]
            text = model.generate(tokens, verbose=False, stop_at_eos=False, **greedy)
        with torch.no_grad():
            torch.testing.assert_close(plain(tokens).logits[0], steered, rtol=0, atol=1e-5)
            moved.append(float((model(tokens)[0] - steered).abs().max()))
        torch.testing.assert_close(padded[row, width - len(steered) :], steered, rtol=0, atol=1e-5)
        written = plain.generate(tokens, eos_token_id=-1, pad_token_id=0, **greedy)
        assert written.tolist() == text.tolist()
    assert max(moved) > 1e-2
    return plain


@pytest.mark.parametrize("kind", MODELS)
def test_the_plain_model_writes_what_the_steered_one_writes(kind, tmp_path):
    model = loaded(tmp_path / kind, kind)
    steerer = moves(model, dense(model, [0, 1]), heads={0: [3, 1], 1: [2]})
    plain = assert_plain_equals_steered(model, steerer, tmp_path / "out")
    assert plain.config.model_type == ("llama" if kind == "mistral" else kind)
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / name) for name in (kind, "out")]
    assert len({str(tokenizer("w1 w2")["input_ids"]) for tokenizer in tokenizers}) == 1
    record = json.loads((tmp_path / "out" / "query_bias.json").read_text())
    heads = {"blocks.0.attn.hook_q": [3, 1], "blocks.1.attn.hook_q": [2]}
    assert record == {"model": kind, "heads": heads}


def test_only_the_biases_of_chosen_heads_differ_from_the_source(llama, tmp_path):
    steerer = moves(llama, dense(llama, [1]), heads=[2])
    export_query_bias(llama, steerer, tmp_path / "out")
    one, two = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (llama.original_model.name_or_path, tmp_path / "out")
    )
    added = {name: value for name, value in two.items() if name not in one}
    assert all(torch.equal(two[name], value) for name, value in one.items())
    assert len(added) == 12
    bias = added.pop("model.layers.1.self_attn.q_proj.bias").view(4, 8)
    targets = steerer.targets
    move = targets.means["blocks.1.attn.hook_q"][targets.class_index("create"), 2]
    torch.testing.assert_close(bias[2], 1.4 * move)
    assert not bias[[0, 1, 3]].any()
    assert not any(bool(value.any()) for value in added.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trust_radius": 0.5},
        {"target": {"create": 1.0, "remember": 0.5}},
        {"latents": GivenLatents({"blocks.0.attn.hook_q": {1: [3, 5]}}), "step_size": 3.0},
    ],
    ids=str,
)
def test_moves_of_sparse_latents_that_only_rise_leave_as_well(tiny_models, saes, tmp_path, changes):
    model = tiny_models["bridge"]
    assert_plain_equals_steered(model, moves(model, saes, least=0.0, **changes), tmp_path / "out")


def test_given_latents_that_rise_leave_while_others_would_be_lowered(tiny_models, saes, tmp_path):
    model = tiny_models["bridge"]
    found = moves(model, saes).targets
    rise = found.means["blocks.0.attn.hook_q"][found.class_index("create"), 1].argmax()
    chosen = GivenLatents({"blocks.0.attn.hook_q": {1: [int(rise)]}})
    steerer = moves(model, saes, latents=chosen, layers=[0], step_size=3.0)
    assert_plain_equals_steered(model, steerer, tmp_path / "out")


def test_a_dense_move_within_a_trust_radius_and_a_mean_difference_leave(llama, tmp_path):
    steerer = moves(llama, dense(llama), trust_radius=1.5)
    assert_plain_equals_steered(llama, steerer, tmp_path / "moves")
    examples = sqs.tokenize_examples(llama, TEXTS)
    means = sqs.baselines.class_means(llama, examples, [0, 2], "attn.hook_q")
    steerer = mean_difference(means, target="create", strength=2.0, scope=EveryPosition())
    assert_plain_equals_steered(llama, steerer, tmp_path / "means")


@pytest.mark.filterwarnings("ignore::sae_query_steer.learning.learner.LearningWarning")
def test_moves_that_were_learned_at_every_position_within_a_trust_radius_leave(llama, tmp_path):
    recipe = moves(llama, dense(llama, [1]), trust_radius=2.0)
    start = replace(recipe, targets=no_moves(llama, recipe.saes, CLASSES))
    texts = [replace(text, response=" w40 w41") for text in TEXTS]
    learner = sqs.TargetLearner(llama, start, n_updates=6, every=3, learning_rate=0.5)
    learned = learner.fit(sqs.tokenize_examples(llama, texts))
    steerer = replace(recipe, targets=learned)
    assert_plain_equals_steered(llama, steerer, tmp_path / "out")


def test_a_model_in_half_precision_keeps_its_format(llama, tmp_path):
    model = sqs.load_model(llama.original_model.name_or_path, device="cpu", dtype="bfloat16")
    export_query_bias(model, moves(model, dense(model, [1])), tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scope": sqs.LastPromptToken()}, r"scope must be EveryPosition\(\).*got LastPromptToken"),
        ({"target": ["create", "remember"]}, "target must be one for all rows"),
        ({"step_size": [1.0, 2.0]}, "step_size must be one for all rows"),
        ({"max_relative_change": 0.5}, "max_relative_change must be None .* got 0.5"),
        ({"keep_norm": True}, "keep_norm must be False"),
        ({"schedule": ExponentialDecay(8.0)}, "schedule must be None"),
        ({"gate": LatentAbove(3)}, "gate must be None"),
        ({"latents": ActiveLatents()}, "latents must be one of .*got ActiveLatents"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_depends_on_the_token_is_refused_by_name(llama, tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"{message}.*steerer.apply"):
        export_query_bias(llama, moves(llama, dense(llama), **changes), tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_descents_other_sites_and_moves_that_lower_latents_are_refused(
    tiny_models, saes, targets, tmp_path, untyped
):
    model, every = tiny_models["bridge"], {"scope": EveryPosition()}
    settings = {"target": "create", "n_steps": 1, "step_size": 1.0, **every}
    descent = sqs.LatentGradientSteerer(saes, targets, objective=sqs.SquaredDistance(), **settings)
    rotated = sqs.sae.identity_encoders(sqs.query_sites(model, [0], rotated=True))
    at_values = sqs.baselines.class_means(
        model, sqs.tokenize_examples(model, TEXTS), [0], "attn.hook_v"
    )
    for steerer, message in (
        (descent, "objective must be one of FixedMove.*got SquaredDistance"),
        (moves(model, saes), "must lower no latent, but lowers .*identity_encoders"),
        (moves(model, rotated), "site must be blocks.L.attn.hook_q .*hook_rot_q"),
        (mean_difference(at_values, strength=1.0, target="create", **every), "got .*hook_v"),
    ):
        with pytest.raises(ValueError, match=message):
            export_query_bias(model, steerer, tmp_path / "out")
    for steerer, message in (
        (random_direction(descent), "got RandomDirection"),
        (sqs.steering.JoinedSteerers(descent), "got JoinedSteerers"),
    ):
        with pytest.raises(TypeError, match=message):
            export_query_bias(model, steerer, tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_models_without_a_bias_of_queries_are_refused(tmp_path, tiny_models):
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 52}
    Qwen3ForCausalLM(Qwen3Config(**sizes)).save_pretrained(tmp_path / "qwen3")
    word_tokenizer().save_pretrained(tmp_path / "qwen3")
    write("phi3, fused qkv", tmp_path / "phi3")
    write_tiny("mistralai/Mistral-7B-Instruct-v0.2", tmp_path / "window")
    for name, message in (
        ("qwen3", "one of .*'llama'.* got qwen3: it normalises queries"),
        ("phi3", "got phi3: its fused projection"),
        ("window", "sliding_window must be None, got 6: "),
    ):
        model = sqs.load_model(tmp_path / name, device="cpu")
        with pytest.raises(ValueError, match=message):
            export_query_bias(model, moves(model, dense(model)), tmp_path / "out")
    model = tiny_models["hooked"]
    with pytest.raises(TypeError, match="TransformerBridge, got HookedTransformer.*bridge"):
        export_query_bias(model, moves(model, dense(model)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_of_a_model_that_is_not_its_source(tmp_path):
    model = loaded(tmp_path / "llama", "llama")
    steerer = moves(model, dense(model, [0]))
    with torch.no_grad():
        model.unembed.weight.mul_(1.1)
    with pytest.raises(ValueError, match="differ by up to .*save the model that you changed"):
        export_query_bias(model, steerer, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_a_folder_is_replaced_only_if_an_export_wrote_it(llama, tmp_path):
    steerer = moves(llama, dense(llama, [1]))
    export_query_bias(llama, steerer, tmp_path / "out")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export_query_bias(llama, steerer, tmp_path / "out")
    export_query_bias(llama, steerer, tmp_path / "out", overwrite=True)
    make_model(tmp_path / "mine")
    with pytest.raises(FileExistsError, match="no query_bias.json"):
        export_query_bias(llama, steerer, tmp_path / "mine", overwrite=True)
