import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

from sae_query_steer.models.fingerprint import (
    Fingerprint,
    check_queries,
    check_reconstructions,
    default_tolerance,
    fingerprint_tokens,
    relative_difference,
)
from sae_query_steer.storage.tensors import read_tensors, write_tensors
from sae_query_steer.targets.builder import ClassMoments
from sae_query_steer.targets.centroids import CentroidTargets

# The later layer stands first, and "10" sorts before "2": orders must survive as they are.
HOOKS = ("blocks.2.attn.hook_q", "blocks.10.attn.hook_q")
CLASSES = ("remember", "apply", "create")
N_CLASSES, N_HEADS, D_LATENT, D_HEAD = 3, 2, 7, 5


def rows():
    """Fifty-nine values [head d_latent] far from zero, of four classes; the third is empty."""
    generator = torch.Generator().manual_seed(17)
    values = 1000 + torch.randn(59, N_HEADS, D_LATENT, generator=generator, dtype=torch.float64)
    classes = torch.tensor([0, 1, 3])[torch.randint(3, (59,), generator=generator)]
    return values, classes


def moments(*batches) -> ClassMoments:
    made = ClassMoments(4, (N_HEADS, D_LATENT))
    for values, classes in batches:
        made.update(values, classes)
    return made


def assert_equal_moments(actual: ClassMoments, expected: ClassMoments) -> None:
    assert torch.equal(actual.count, expected.count)
    torch.testing.assert_close(actual.mean, expected.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(actual.variance(), expected.variance(), rtol=1e-12, atol=0)


def some_fingerprint() -> Fingerprint:
    generator = torch.Generator().manual_seed(41)

    def group():
        return {name: torch.randn(2, 6, N_HEADS, D_HEAD, generator=generator) for name in HOOKS}

    return Fingerprint(tokens=fingerprint_tokens(52), queries=group(), reconstructions=group())


def some_targets(**changes) -> CentroidTargets:
    generator = torch.Generator().manual_seed(19)

    def group():
        shape = (N_CLASSES, N_HEADS, D_LATENT)
        return {name: torch.rand(shape, generator=generator) for name in HOOKS}

    made = dict(
        classes=CLASSES,
        means=group(),
        variances=group(),
        counts=torch.tensor([31, 4, 15]),
        span="LastPromptToken()",
        fingerprint=some_fingerprint(),
    )
    return CentroidTargets(**(made | changes))


def refuses(text: str, error=ValueError):
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def test_moments_are_mean_and_population_variance_of_each_class():
    values, classes = rows()
    made = moments((values, classes))
    for k in (0, 1, 3):
        chosen = values[classes == k]
        assert made.count[k] == len(chosen)
        torch.testing.assert_close(made.mean[k], chosen.mean(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(
            made.variance()[k], chosen.var(0, unbiased=False), rtol=1e-10, atol=0
        )


def test_a_class_that_was_never_seen_stays_zero_with_count_zero():
    made = moments(rows())
    assert made.count[2] == 0
    assert made.mean[2].eq(0).all()
    assert made.variance()[2].eq(0).all()


def test_the_order_of_the_rows_does_not_matter():
    values, classes = rows()
    order = torch.randperm(59, generator=torch.Generator().manual_seed(3))
    shuffled = moments((values[order], classes[order]))
    assert_equal_moments(shuffled, moments((values, classes)))


@pytest.mark.parametrize("splits", [[1, 58], [20, 0, 20, 19], [1] * 59])
def test_the_split_into_batches_does_not_matter(splits):
    values, classes = rows()
    split = moments(*zip(values.split(splits), classes.split(splits), strict=True))
    assert_equal_moments(split, moments((values, classes)))


@pytest.mark.parametrize("cut", [0, 1, 23, 59])
def test_merging_two_is_reading_both(cut):
    values, classes = rows()
    first, second = moments((values[:cut], classes[:cut])), moments((values[cut:], classes[cut:]))
    first.merge(second)
    assert_equal_moments(first, moments((values, classes)))


def test_values_of_32_bits_are_summed_in_64():
    values, classes = rows()
    values = values.float()
    assert_equal_moments(moments((values, classes)), moments((values.double(), classes)))


def test_centroids_come_back_bit_for_bit(tmp_path):
    saved = some_targets()
    saved.save(tmp_path / "centroids")
    read = CentroidTargets.load(tmp_path / "centroids")
    assert (read.classes, read.span) == (CLASSES, "LastPromptToken()")
    assert torch.equal(read.counts, saved.counts)
    assert torch.equal(read.fingerprint.tokens, saved.fingerprint.tokens)
    for mine, theirs in (
        (read.means, saved.means),
        (read.variances, saved.variances),
        (read.fingerprint.queries, saved.fingerprint.queries),
        (read.fingerprint.reconstructions, saved.fingerprint.reconstructions),
    ):
        assert tuple(mine) == HOOKS
        assert all(torch.equal(mine[name], theirs[name]) for name in HOOKS)


def test_saving_over_centroids_takes_overwrite(tmp_path):
    folder = tmp_path / "centroids"
    some_targets().save(folder)
    changed = some_targets(span="ResponseTokens()")
    with refuses(f"{folder} exists: give another folder, or overwrite=True", FileExistsError):
        changed.save(folder)
    assert CentroidTargets.load(folder).span == "LastPromptToken()"
    changed.save(folder, overwrite=True)
    assert CentroidTargets.load(folder).span == "ResponseTokens()"


def test_centroids_print_their_classes_counts_span_and_sites():
    assert repr(some_targets()) == (
        "CentroidTargets(remember 31, apply 4, create 15; span LastPromptToken(); sites "
        "['blocks.2.attn.hook_q', 'blocks.10.attn.hook_q'])"
    )


def test_a_class_has_the_index_of_its_place_and_an_unknown_one_is_refused():
    targets = some_targets()
    assert [targets.class_index(name) for name in CLASSES] == [0, 1, 2]
    known = "['remember', 'apply', 'create']"
    with refuses(f"no class 'Apply': the classes are {known}; did you mean 'apply'?"):
        targets.class_index("Apply")


@pytest.mark.parametrize("classes", [("apply", "create", "apply"), ("apply",), ()])
def test_classes_must_be_two_or_more_different_names(classes):
    with refuses(f"classes={classes} must be two or more different names"):
        some_targets(classes=classes)


@pytest.mark.parametrize("variance", [torch.zeros(N_CLASSES, N_HEADS, 6), None])
def test_variances_of_another_shape_than_the_means_are_refused(variance):
    good, bad = HOOKS
    variances = {good: torch.ones(N_CLASSES, N_HEADS, D_LATENT)}
    if variance is not None:
        variances[bad] = variance
    with refuses(
        f"centroids at {bad} have shape [3, 2, 7]: expected 3 classes and variances of the same "
        "shape"
    ):
        some_targets(variances=variances)


def test_one_more_centroid_than_there_are_names_is_refused():
    more = {HOOKS[0]: torch.ones(4, N_HEADS, D_LATENT)}
    with refuses(
        f"centroids at {HOOKS[0]} have shape [4, 2, 7]: expected 3 classes and variances of the "
        "same shape"
    ):
        some_targets(means=more, variances=more, counts=torch.tensor([31, 4, 15, 6]))


@pytest.mark.parametrize("group", ["means", "variances"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(group, value):
    changed = dict(getattr(some_targets(), group))
    changed[HOOKS[1]][2, 1, 6] = value
    with refuses(f"centroids at {HOOKS[1]} hold values that are not finite, or a variance below 0"):
        some_targets(**{group: changed})


@pytest.fixture
def saved(tmp_path):
    some_targets().save(tmp_path / "centroids")
    return tmp_path / "centroids"


@pytest.mark.parametrize("name", ["centroids.json", "centroids.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(saved / name))):
        CentroidTargets.load(saved)


@pytest.mark.parametrize("other", ["sae_query_steer.centroids/2", None])
def test_another_format_is_refused(saved, other):
    settings = json.loads((saved / "centroids.json").read_text())
    (saved / "centroids.json").write_text(json.dumps(settings | {"format": other}))
    with pytest.raises(ValueError, match=f"centroids.json .*format: .*, got {other!r}"):
        CentroidTargets.load(saved)


def test_a_truncated_tensor_file_is_refused(saved):
    path = saved / "centroids.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is not a readable safetensors file: "):
        CentroidTargets.load(saved)


@pytest.mark.parametrize(
    "name",
    ["counts", "fingerprint.tokens", f"mean.{HOOKS[0]}", f"reconstruction.{HOOKS[1]}"],
)
def test_a_missing_tensor_is_named(saved, name):
    path = saved / "centroids.safetensors"
    tensors = read_tensors(path.parent, path.name)
    del tensors[name]
    write_tensors(path, tensors)
    with refuses(f"{path} is incomplete: it has no tensor '{name}'"):
        CentroidTargets.load(saved)


@pytest.mark.parametrize("name", ["classes", "span", "hook_names"])
def test_a_missing_setting_is_named(saved, name):
    settings = json.loads((saved / "centroids.json").read_text())
    del settings[name]
    (saved / "centroids.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"centroids.json .*: {name}: Field required"):
        CentroidTargets.load(saved)


@given(st.integers(1, 300_000))
def test_fingerprint_tokens_are_in_any_vocabulary(d_vocab):
    tokens = fingerprint_tokens(d_vocab)
    assert tokens.shape == (2, 6)
    assert tokens.min() >= 0
    assert tokens.max() < d_vocab


@pytest.mark.parametrize("d_vocab", [52, 512, 32_000, 50_257, 128_256])
def test_fingerprint_tokens_are_twelve_different_ones(d_vocab):
    tokens = fingerprint_tokens(d_vocab)
    assert len(set(tokens.flatten().tolist())) == 12
    assert torch.equal(tokens, fingerprint_tokens(d_vocab))


def test_the_relative_difference_is_measured_by_the_second_norm():
    b = torch.tensor([3.0, 4.0])
    assert relative_difference(b + torch.tensor([0.3, -0.4]), b) == pytest.approx(0.1)
    assert relative_difference(3 * b, b) == pytest.approx(2)
    assert relative_difference(b, b) == 0
    assert relative_difference(b[:1], b) == float("inf")


def test_short_floats_may_differ_more():
    assert default_tolerance("float64", "float32") == default_tolerance("float32") == 1e-3
    assert default_tolerance("float16") == default_tolerance("float32", "bfloat16") == 0.1


def test_noise_within_the_tolerance_is_the_same_model_and_the_same_sae():
    stored = some_fingerprint()
    near = {name: query * 1.0009 for name, query in stored.queries.items()}
    check_queries(stored, near, tolerance=1e-3)
    short = {HOOKS[0]: stored.queries[HOOKS[0]].bfloat16()}
    check_queries(stored, short, tolerance=default_tolerance("bfloat16"))
    near = {name: made * 1.0009 for name, made in stored.reconstructions.items()}
    check_reconstructions(stored, near, tolerance=1e-3)


def test_another_model_is_refused_with_the_site_and_the_distance():
    stored = some_fingerprint()
    queries = {HOOKS[0]: stored.queries[HOOKS[0]], HOOKS[1]: stored.queries[HOOKS[1]] * 1.002}
    with refuses(
        f"another model: at {HOOKS[1]} the activations differ from the fingerprint by 0.002 "
        "(relative), more than 0.001; shape here [2, 6, 2, 5], in the fingerprint [2, 6, 2, 5]. "
        "Load the model that these centroids were made with, or make them anew with "
        "CentroidTargetBuilder"
    ):
        check_queries(stored, queries, tolerance=1e-3)


def test_a_model_of_another_shape_is_refused_with_both_shapes():
    stored = some_fingerprint()
    with refuses(
        f"another model: at {HOOKS[1]} the activations differ from the fingerprint by inf "
        "(relative), more than 0.001; shape here [2, 6, 4, 5], in the fingerprint [2, 6, 2, 5]. "
        "Load the model that these centroids were made with, or make them anew with "
        "CentroidTargetBuilder"
    ):
        check_queries(stored, {HOOKS[1]: torch.ones(2, 6, 4, D_HEAD)}, tolerance=1e-3)


def test_a_site_without_a_fingerprint_is_refused_with_those_that_have_one():
    stored = some_fingerprint()
    with refuses(
        "no fingerprint for blocks.3.attn.hook_q: there is one for ['blocks.10.attn.hook_q', "
        "'blocks.2.attn.hook_q']"
    ):
        check_queries(stored, {"blocks.3.attn.hook_q": stored.queries[HOOKS[0]]}, tolerance=1e-3)


def test_another_sae_is_refused_with_the_site_and_the_distance():
    stored = some_fingerprint()
    made = {HOOKS[1]: stored.reconstructions[HOOKS[1]] * 1.25}
    with refuses(
        f"another SAE: at {HOOKS[1]} its reconstructions differ from the fingerprint by 0.25 "
        "(relative), more than 0.1; shape here [2, 6, 2, 5], in the fingerprint [2, 6, 2, 5]. "
        "Load the SAE that these centroids were made with, or make them anew with "
        "CentroidTargetBuilder"
    ):
        check_reconstructions(stored, made, tolerance=0.1)


def test_an_sae_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=rf"^another SAE: at {re.escape(HOOKS[0])} .* by inf "):
        check_reconstructions(
            some_fingerprint(), {HOOKS[0]: torch.ones(2, 6, 4, D_HEAD)}, tolerance=0.1
        )


def test_a_fingerprint_that_is_not_a_number_matches_nothing():
    stored = Fingerprint(
        tokens=fingerprint_tokens(20),
        queries={"a": torch.ones(2, 6, 3, 4)},
        reconstructions={"a": torch.ones(2, 6, 3, 4)},
    )
    nan = {"a": torch.full((2, 6, 3, 4), torch.nan)}
    with pytest.raises(ValueError, match="another model"):
        check_queries(stored, nan, tolerance=1e-3)
    with pytest.raises(ValueError, match="another SAE"):
        check_reconstructions(stored, nan, tolerance=1e-3)
    with pytest.raises(ValueError, match="no fingerprint for b"):
        check_reconstructions(stored, {"b": nan["a"]}, tolerance=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": "abc"}, "array, got 'abc'"),
        ({"classes": None}, "array, got None"),
        ({"classes": [1, 2, 3]}, "classes.0: Input should be a valid string, got 1"),
        ({"hook_names": 7}, "hook_names: Input should be a valid array, got 7"),
        ({"hook_names": ["blocks.3.attn.hook_q", "a", "b"]}, "is incomplete: it has no"),
    ],
)
def test_damaged_settings_are_refused(tmp_path, change, message):
    some_targets().save(tmp_path / "targets")
    path = tmp_path / "targets" / "centroids.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=re.escape(message)):
        CentroidTargets.load(tmp_path / "targets")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("counts", torch.tensor([4, 0, 2]), "must be 3 whole numbers above 0"),
        ("counts", torch.tensor([4, 2]), "must be 3 whole numbers above 0"),
        (f"mean.{HOOKS[0]}", torch.ones(3, 4), r"have shape \[3, 4\]"),
    ],
)
def test_damaged_tensors_are_refused(tmp_path, untyped, name, tensor, message):
    some_targets().save(tmp_path / "targets")
    path = tmp_path / "targets" / "centroids.safetensors"
    write_tensors(path, read_tensors(path.parent, path.name) | {name: tensor})
    with pytest.raises(ValueError, match=message):
        CentroidTargets.load(tmp_path / "targets")


def targets_of(latents, classes) -> CentroidTargets:
    """Centroids of latents [token head d_latent] at the second site; another at the first."""
    found = ClassMoments(N_CLASSES, latents.shape[1:])
    found.update(latents, classes)
    other = torch.arange(N_CLASSES).double()[:, None, None].expand(found.mean.shape).clone()
    return some_targets(
        means={HOOKS[0]: other, HOOKS[1]: found.mean},
        variances={HOOKS[0]: torch.zeros_like(other), HOOKS[1]: found.variance()},
        counts=found.count,
    )


def unequal_classes():
    """Seventy-one tokens of three classes of 50, 4 and 17, which differ in their means."""
    generator = torch.Generator().manual_seed(23)
    classes = torch.tensor([0] * 50 + [1] * 4 + [2] * 17)
    means = 0.4 * torch.randn(N_CLASSES, N_HEADS, D_LATENT, generator=generator).double()
    noise = torch.randn(71, N_HEADS, D_LATENT, generator=generator).double()
    scale = torch.tensor([1.0, 3.0, 0.5]).double()[classes, None, None]
    return 5 + means[classes] + scale * noise, classes


def test_the_share_of_the_class_is_what_a_regression_on_the_class_explains():
    latents, classes = unequal_classes()
    flat, indicators = latents.flatten(1).numpy(), torch.eye(N_CLASSES)[classes].numpy()
    fitted = LinearRegression().fit(indicators, flat).predict(indicators)
    expected = r2_score(flat, fitted, multioutput="variance_weighted")
    assert 0.05 < expected < 0.5
    found = targets_of(latents, classes).class_share_of_variance(HOOKS[1])
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_share_of_the_class_is_the_same_after_a_shift_and_in_other_units():
    latents, classes = unequal_classes()
    share = targets_of(latents, classes).class_share_of_variance(HOOKS[1])
    shifted = 100 - 3 * latents
    found = targets_of(shifted, classes).class_share_of_variance(HOOKS[1])
    assert found == pytest.approx(share, rel=1e-6)


def test_the_share_is_zero_where_all_centroids_are_one_and_one_where_nothing_else_varies():
    latents, classes = unequal_classes()
    centred = latents.clone()
    for k in range(N_CLASSES):
        centred[classes == k] -= latents[classes == k].mean(0)
    assert targets_of(centred, classes).class_share_of_variance(HOOKS[1]) < 1e-12
    pure = targets_of(latents - centred, classes)
    assert pure.class_share_of_variance(HOOKS[1]) == pytest.approx(1, abs=1e-9)
    assert pure.class_share_of_variance(HOOKS[0]) == 1


def test_the_share_of_one_head_asks_no_other_head():
    latents, classes = unequal_classes()
    targets = targets_of(latents, classes)
    for head in range(latents.shape[1]):
        alone = targets_of(latents[:, head : head + 1], classes)
        found = targets.class_share_of_variance(HOOKS[1], head=head)
        assert found == pytest.approx(alone.class_share_of_variance(HOOKS[1]), rel=1e-9)


def test_of_few_tokens_the_share_is_too_high_by_as_much_as_is_said():
    noise = torch.randn(11, 1, 5000, generator=torch.Generator().manual_seed(2)).double()
    classes = torch.tensor([0] * 6 + [1] * 2 + [2] * 3)
    found = targets_of(noise, classes).class_share_of_variance(HOOKS[1])
    assert found == pytest.approx((N_CLASSES - 1) / (11 - 1), rel=0.05)


def test_a_share_of_a_site_without_centroids_is_refused():
    with pytest.raises(KeyError, match="blocks.1.attn.hook_q"):
        some_targets().class_share_of_variance("blocks.1.attn.hook_q")
