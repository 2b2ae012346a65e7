"""Architectures beside Llama, tiny, from their Hugging Face configs."""

from dataclasses import replace

import pytest
import torch
from recipe_models import write_qwen2
from test_prefix import largest_difference, later_layers
from transformer_lens import HookedTransformer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from wheel_check import word_tokenizer

import sae_query_steer as sqs
from sae_query_steer.learning import no_moves

IDS = {"vocab_size": 52, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ROTARY = IDS | {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
}
ARCHITECTURES = {
    "gpt2, learned positions, fused qkv": (
        GPT2LMHeadModel,
        lambda: GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4, **IDS
        ),
    ),
    "mistral, a window of 4 tokens": (
        MistralForCausalLM,
        lambda: MistralConfig(sliding_window=4, head_dim=8, **ROTARY),
    ),
    "phi3, fused qkv": (
        Phi3ForCausalLM,
        lambda: Phi3Config(original_max_position_embeddings=64, **ROTARY),
    ),
}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "verbose": False, "stop_at_eos": False}
PROMPTS = ["w1 w2 w3 w4 w9 w12", "w7"]


def write(name, folder):
    """Write a model of an architecture to a folder, with its tokenizer."""
    cls, config = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        cls(config()).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request, tmp_path_factory):
    """A tiny model of another architecture, its sites, and dense centroids of two classes."""
    folder = tmp_path_factory.mktemp("architecture")
    write(request.param, folder)
    model = sqs.load_model(str(folder), device="cpu")
    examples = [
        sqs.LabelledExample(prompt=f"w{i} w{i + 1} w{2 * i}", label="ab"[i % 2]) for i in range(20)
    ]
    sites = sqs.query_sites(model)
    targets = sqs.CentroidTargetBuilder(model, sqs.sae.identity_encoders(sites)).fit(
        sqs.tokenize_examples(model, examples)
    )
    return model, sites, targets


def generate(model, prompts, **changes):
    output = model.generate(prompts, return_type="tokens", output_logits=True, **GREEDY | changes)
    return torch.stack(output.logits, dim=1)


@pytest.mark.parametrize(
    ("scope", "positions"),
    [
        (sqs.scopes.EveryPosition(), [range(14), range(9)]),
        (sqs.LastPromptToken(), [[6], [1]]),
        (sqs.scopes.ResponseTokens(), [range(7, 14), range(2, 9)]),
    ],
    ids=repr,
)
def test_positions_are_exact_with_cache_without_and_in_a_padded_batch(
    architecture, scope, positions
):
    model, sites, targets = architecture
    steerer = sqs.baselines.mean_difference(targets, target="a", strength=2.0, scope=scope)
    with steerer.apply(model, record=True) as trace:
        on = generate(model, PROMPTS)
    with steerer.apply(model):
        off = generate(model, PROMPTS, use_past_kv_cache=False)
        alone = [generate(model, prompt) for prompt in PROMPTS]
    torch.testing.assert_close(on, off, rtol=0, atol=1e-4)
    for row, logits in enumerate(alone):
        torch.testing.assert_close(on[row], logits[0], rtol=0, atol=1e-4)
    assert not torch.allclose(on, generate(model, PROMPTS), atol=1e-2)
    table = trace.to_dataframe()
    for row, wanted in enumerate(positions):
        steered = table.loc[table["row"] == row, "position"].unique().tolist()
        assert steered == list(wanted)[: 14 if row == 0 else 9]


@pytest.mark.parametrize("name", ["llama", *ARCHITECTURES])
def test_a_hooked_transformer_of_a_folder_computes_what_the_bridge_computes(
    name, tiny_folder, tmp_path
):
    folder = tmp_path / "gemma-2-llama"  # a name that is no clue to what it holds
    if name == "llama":  # whose heads are not d_model / n_heads wide
        folder.symlink_to(tiny_folder)
    else:
        write(name, folder)
    bridge = sqs.load_model(folder, device="cpu")
    model = sqs.load_model(folder, device="cpu", backend="hooked")
    assert isinstance(model, HookedTransformer)
    for prompt in PROMPTS:
        torch.testing.assert_close(model(prompt), bridge(prompt), rtol=0, atol=1e-4)


def test_a_hooked_transformer_that_would_differ_is_refused(tmp_path):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    LlamaForCausalLM(LlamaConfig(**ROTARY, rope_parameters=rope)).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="log probabilities differ by .*use backend='bridge'"):
        sqs.load_model(tmp_path, device="cpu", backend="hooked")


def test_rows_behind_a_prefix_equal_whole_passes(architecture):
    assert largest_difference(architecture[0], [7, 5, 13, 2]) < 1e-4
    assert max(later_layers(architecture[0])) < 1e-4


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """A tiny Qwen2 chat model: biases of q, k and v, and a tokenizer without BOS."""
    folder = write_qwen2(tmp_path_factory.mktemp("qwen2") / "model")
    return sqs.load_model(folder, device="cpu")


def chats(model, request):
    """Prompts in the chat template, with a request and responses of each class."""
    made = [
        sqs.LabelledExample(prompt=f"{request[k]}{n}", response=k * 4, label=k)
        for n in range(8)
        for k in request
    ]
    return sqs.tokenize_examples(model, made, chat_template=True)


OPEN, REQUESTED = dict.fromkeys("ab", "Go "), {"a": "An a ", "b": "A bee "}


@pytest.mark.parametrize("sparse", [False, True])
def test_qwen2_learns_targets_that_steer_its_chats(qwen2, sparse):
    model = qwen2
    sites = sqs.query_sites(model, [1, 2])
    saes = sqs.sae.identity_encoders(sites)
    if sparse:
        rows = torch.randint(3, 200, (32, 16), generator=torch.Generator().manual_seed(0))
        config = sqs.TrainingConfig(
            sae=sqs.sae.TopK(d_sae_per_head=16, k=4),
            training_tokens=1024,
            train_batch_size_tokens=128,
            metric_tokens=0,
        )
        saes = sqs.train_query_saes(model, rows, sites, config)
    scope = sqs.LastPromptToken() | sqs.scopes.ResponseTokens()
    recipe = sqs.LatentGradientSteerer(
        *(saes, no_moves(model, saes, ["a", "b"])),
        target="a",
        objective=sqs.objectives.FixedMove(),
        n_steps=1,
        step_size=1.0,
        scope=scope,
    )
    learner = sqs.TargetLearner(model, recipe, n_updates=6, every=3, learning_rate=0.2)
    learned = learner.fit(chats(model, OPEN), counterparts=chats(model, REQUESTED))
    assert all(share > 0.01 for share in learned.share_removed.values())
    steered = replace(recipe, targets=learned, target=["a", "b"])
    settings = {"max_new_tokens": 4, "chat_template": True}
    one, two = sqs.compare.continuations(
        model, ["Go 1", "Go 20"], steerer=steered, **settings
    ).tokens
    alone = sqs.compare.continuations(
        model, ["Go 20"], steerer=replace(recipe, targets=learned, target="b"), **settings
    )
    assert torch.equal(alone.tokens[0], two)
    assert alone.relative_changes[0] > 0.01
    assert len(one) > 0


def test_qwen2_heads_turn_to_a_phrase_of_a_chat_prompt(qwen2):
    model = qwen2
    encoders = sqs.sae.identity_encoders(sqs.query_sites(model, [1, 2]))
    steerer = sqs.steering.AttentionSteerer(encoders, sqs.steering.LookAt("blue"))
    with steerer.apply(model, record=True) as trace:
        sqs.compare.continuations(
            model, ["red or blue", "blue, green or red"], max_new_tokens=2, chat_template=True
        )
    table = trace.summary()
    assert (table["mass_after"] > 1.2 * table["mass_before"]).all()


def test_qwen2_computes_what_transformers_computes_and_its_chat_prompts_get_no_bos(tmp_path):
    folder = write_qwen2(tmp_path / "model")
    source = AutoModelForCausalLM.from_pretrained(folder)
    assert source.model.layers[0].self_attn.q_proj.bias.abs().max() > 0
    for backend in ("bridge", "hooked"):
        model = sqs.load_model(folder, device="cpu", backend=backend)
        tokens = chats(model, REQUESTED)[0].tokens
        text = "<|im_start|>user\nAn a 0<|im_end|>\n<|im_start|>assistant\naaaa"
        assert model.tokenizer.decode(tokens) == text
        ours = model(tokens[None])
        torch.testing.assert_close(ours, source(tokens[None]).logits, rtol=0, atol=1e-4)
