"""Fixtures shared by the tests: real data where it is at hand, tiny models on both hosts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import jaxtyping
import pytest
import torch
from wheel_check import WORDS, make_model

import sae_query_steer as sqs

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

# The models are tiny: two threads that wait for each other on a busy machine cost 20 x more.
torch.set_num_threads(1)

HOSTS = ("hooked", "bridge")


def as_hooked_transformer(hf, tokenizer) -> HookedTransformer:
    """A HookedTransformer with the weights of a Hugging Face Llama, nothing folded or centred."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    c = hf.config
    config = HookedTransformerConfig(
        d_model=c.hidden_size,
        n_layers=c.num_hidden_layers,
        n_heads=c.num_attention_heads,
        d_head=c.head_dim,
        d_mlp=c.intermediate_size,
        d_vocab=c.vocab_size,
        n_ctx=c.max_position_embeddings,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        positional_embedding_type="rotary",
        rotary_dim=c.head_dim,
        n_key_value_heads=c.num_key_value_heads,
        eps=c.rms_norm_eps,
        original_architecture="LlamaForCausalLM",
        default_prepend_bos=True,
        device="cpu",
    )
    model = HookedTransformer(config, tokenizer=tokenizer)
    model.load_and_process_state_dict(
        convert_llama_weights(hf, model.cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model


@pytest.fixture
def untyped():
    """Switch the type checks of the tests off, to reach the errors that users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A Hugging Face folder: Llama, 3 layers, 4 query heads of 8 over 2 key heads, random."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    with torch.random.fork_rng():
        make_model(folder, n_layers=3, seed=7)
    return folder


@pytest.fixture(scope="session")
def tiny_models(tiny_folder):
    """The tiny model on both hosts, by name."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    return {
        "hooked": as_hooked_transformer(hf, tokenizer),
        "bridge": TransformerBridge.boot_transformers(str(tiny_folder), device="cpu"),
    }


@pytest.fixture(params=HOSTS)
def model(request, tiny_models):
    """The tiny model, once on each host."""
    return tiny_models[request.param]


@pytest.fixture(scope="session")
def examples() -> list[sqs.LabelledExample]:
    """Forty-eight examples of three classes that differ in their words, of different lengths."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for i in range(48):
        k = i % 3
        length = 3 + int(torch.randint(5, (1,), generator=generator))
        ids = torch.randint(16, (length,), generator=generator) + 16 * k
        words = [WORDS[j] for j in ids]
        label = ("apply", "remember", "create")[k]
        made.append(
            sqs.LabelledExample(
                prompt=" ".join(words), response=" " + " ".join(words[::-1]), label=label
            )
        )
    return made


@pytest.fixture(scope="session")
def saes(tiny_models) -> sqs.QuerySAEs:
    """TopK SAEs of layers 0 and 2 of the tiny model: 16 latents a head, 3 of them firing."""
    model = tiny_models["bridge"]
    rows = torch.randint(4, 52, (64, 16), generator=torch.Generator().manual_seed(5))
    return sqs.train_query_saes(
        model,
        rows,
        sqs.query_sites(model, [0, 2]),
        sqs.TrainingConfig(
            sae=sqs.sae.TopK(d_sae_per_head=16, k=3),
            training_tokens=8192,
            train_batch_size_tokens=128,
            lr=3e-3,
        ),
    )


@pytest.fixture(scope="session")
def targets(tiny_models, saes, examples) -> sqs.CentroidTargets:
    """Centroids of the three classes at the last prompt token."""
    return sqs.CentroidTargetBuilder(tiny_models["bridge"], saes).fit(
        sqs.tokenize_examples(tiny_models["bridge"], examples)
    )


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; tests that read it skip where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the real data in ../shared/data, which is absent here")
    return folder


@pytest.fixture(scope="session")
def stories_tokenizer(shared_data: Path):
    """The tokenizer of the pretrained model stories260K (vocabulary of 512)."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_data / "stories260K")


@pytest.fixture(scope="session")
def stories(shared_data: Path, stories_tokenizer):
    """The pretrained model stories260K on both hosts, by name."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    folder = shared_data / "stories260K"
    hf = AutoModelForCausalLM.from_pretrained(folder)
    return {
        "hooked": as_hooked_transformer(hf, stories_tokenizer),
        "bridge": TransformerBridge.boot_transformers(str(folder), device="cpu"),
    }


def greedy_logits(model, prompts) -> torch.Tensor:
    """Logits [row step d_vocab] of a greedy generation of four tokens."""
    output = model.generate(
        prompts,
        max_new_tokens=4,
        do_sample=False,
        verbose=False,
        stop_at_eos=False,
        return_type="tokens",
        output_logits=True,
    )
    return torch.stack(output.logits, dim=1)
