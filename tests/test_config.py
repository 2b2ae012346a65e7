"""Settings of a run and of the architectures: checked, light to import, and SAELens's own."""

import ast
import dataclasses
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import sae_lens  # noqa: F401
from sae_lens.registry import get_sae_training_class

import sae_query_steer.sae  # noqa: F401
from sae_query_steer import config
from sae_query_steer.config import (
    ARCHITECTURES,
    BatchTopK,
    Gated,
    JumpReLU,
    KLSparse,
    MatryoshkaBatchTopK,
    Standard,
    TopK,
    TrainingConfig,
)

SITE = {"d_in", "d_sae", "n_heads", "d_head", "device", "metadata", "reshape_activations"}
"""Fields of SAELens's configs that follow from model and site."""

NARROWER = {"dtype", "normalize_activations", "matryoshka_widths", "k"}
"""Fields whose type allows less than SAELens's, or is a tuple for a list."""

REQUIRED = {"d_sae_per_head", "matryoshka_widths"}
"""Fields without a default; SAELens's configs have one that they refuse."""


def fields(kind: type, *without: str) -> dict[str, tuple[object, object]]:
    hints = get_type_hints(kind)
    return {
        field.name: (hints[field.name], field.default)
        for field in dataclasses.fields(kind)
        if field.name not in SITE and field.name not in without
    }


def same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, (kind, default) in ours.items():
        if name not in NARROWER:
            assert kind == theirs[name][0], name
        if name not in REQUIRED:
            assert default == theirs[name][1], name


@pytest.mark.parametrize("settings", ARCHITECTURES)
def test_settings_are_the_fields_of_the_config_that_saelens_is_given(settings):
    same(fields(settings), fields(get_sae_training_class(settings.name)[1]))


@pytest.mark.parametrize("settings", [a for a in ARCHITECTURES if a is not KLSparse])
def test_settings_are_those_of_saelens_own_architecture(settings):
    theirs = get_sae_training_class(settings.name.removeprefix("query_head_"))[1]
    expected = fields(theirs, "use_sparse_activations")
    if "k" in expected:
        assert expected["k"][1] == 100  # of the whole SAE; ours is of one head
        expected["k"] = (expected["k"][0], 32)
    same(fields(settings, "d_sae_per_head"), expected)


def test_the_module_imports_the_standard_library_only():
    tree = ast.parse(Path(config.__file__).read_text(encoding="utf-8"))
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names.remove("sae_query_steer.arguments")
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: TopK(d_sae_per_head=0), "d_sae_per_head whole > 0"),
        (lambda: TopK(d_sae_per_head=8, k=9), "k <= 8 9"),
        (lambda: TopK(d_sae_per_head=8, k=1.5), "k whole 1.5"),
        (lambda: BatchTopK(d_sae_per_head=8, k=0.0), "k > 0.0"),
        (lambda: BatchTopK(d_sae_per_head=64, topk_threshold_lr=0.0), "topk_threshold_lr > 0.0"),
        (lambda: MatryoshkaBatchTopK(d_sae_per_head=64, matryoshka_widths=(64,)), "64 (64,)"),
        (
            lambda: MatryoshkaBatchTopK(d_sae_per_head=64, matryoshka_widths=(9, 8, 64)),
            "(9, 8, 64)",
        ),
        (lambda: Standard(d_sae_per_head=8, l1_coefficient=-1.0), "l1_coefficient 0 -1.0"),
        (lambda: Standard(d_sae_per_head=8, dtype="bfloat16"), "dtype float64 bfloat16"),
        (lambda: Gated(d_sae_per_head=8, l1_warm_up_steps=-1), "l1_warm_up_steps 0 -1"),
        (lambda: JumpReLU(d_sae_per_head=8, jumprelu_bandwidth=0.0), "jumprelu_bandwidth 0 0.0"),
        (
            lambda: JumpReLU(d_sae_per_head=8, jumprelu_sparsity_loss_mode="quadratic"),
            "target_l0 > None",
        ),
        (lambda: KLSparse(d_sae_per_head=8, rho=1.0), "rho 0 1 1.0"),
        (
            lambda: KLSparse(d_sae_per_head=8, normalize_activations="layer_norm"),
            "normalize_activations none layer_norm",
        ),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_settings_are_checked(make, names):
    with pytest.raises((TypeError, ValueError)) as error:
        make()
    assert all(name in str(error.value) for name in names.split()), error.value


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"training_tokens": 511}, "train_batch_size_tokens=512 511"),
        ({"lr": float("nan")}, "lr 0 nan"),
        ({"seed": -1}, "seed 0 -1"),
        ({"context_size": 0}, "context_size > 0"),
        ({"store_batch_size_prompts": 0}, "store_batch_size_prompts > 0"),
        ({"metric_tokens": -1}, "metric_tokens 0 -1"),
        ({"lr_warm_up_steps": 2, "lr_decay_steps": 1}, "lr_warm_up_steps lr_decay_steps 2 1"),
    ],
)
def test_the_run_is_checked(settings, names):
    with pytest.raises(ValueError) as error:
        TrainingConfig(**{"sae": TopK(d_sae_per_head=64), "training_tokens": 1024} | settings)
    assert all(name in str(error.value) for name in names.split()), error.value


@pytest.mark.usefixtures("untyped")
def test_the_architecture_is_one_of_ours():
    with pytest.raises(TypeError, match=r"MatryoshkaBatchTopK.*got str"):
        TrainingConfig(sae="topk", training_tokens=1024)  # pyright: ignore[reportArgumentType]


def test_mixed_precision_is_for_single_precision():
    sae = TopK(d_sae_per_head=64, dtype="float64")
    with pytest.raises(ValueError, match="float32.*float64"):
        TrainingConfig(sae=sae, training_tokens=1024, autocast=True)


def test_the_stored_settings_are_those_that_decide_the_weights():
    run = TrainingConfig(sae=TopK(d_sae_per_head=64), training_tokens=1024)
    stored = run.to_json()
    assert stored["sae"]["architecture"] == "query_head_topk"
    for name, other in (("checkpoint_every", 7), ("metric_tokens", 0)):
        assert dataclasses.replace(run, **{name: other}).to_json() == stored
    assert dataclasses.replace(run, lr=1e-4).to_json() != stored
