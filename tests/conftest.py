"""Fixtures shared by the tests: real data where it is at hand, tiny models on both hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from wheel_check import WORDS, make_model

import sae_query_steer as sqs

# The models are tiny: two threads that wait for each other on a busy machine cost 20 x more.
torch.set_num_threads(1)

HOSTS = ("hooked", "bridge")


def on_both_hosts(folder: Path) -> dict[str, Any]:
    """A model of a folder on both hosts, by name."""
    return {name: sqs.load_model(folder, device="cpu", backend=name) for name in HOSTS}


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
    return on_both_hosts(tiny_folder)


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
            metric_tokens=2048,
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
def stories(shared_data: Path):
    """The pretrained model stories260K on both hosts, by name."""
    return on_both_hosts(shared_data / "stories260K")


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


def one_per_row(n_rows: int) -> Any:
    """One token in each row, at position 0: to call an edit outside a model."""
    from sae_query_steer.scopes.positions import TokenPositions

    rows = torch.arange(n_rows)
    return TokenPositions(row=rows, position=torch.zeros_like(rows), n_rows=n_rows)
