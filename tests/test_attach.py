"""Reconstructions in the place of queries, on both hosts and on SAELens's own model."""

import pytest
import torch
from sae_lens import HookedSAETransformer
from transformer_lens import HookedTransformer

import sae_query_steer as sqs
from sae_query_steer.models.activations import read_activations
from sae_query_steer.sae.heads import split_heads
from sae_query_steer.steering.attach import attached_saes

HOOK = "blocks.2.attn.hook_q"
GREEDY = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "stop_at_eos": False}
PROMPTS = ["w1 w20 w33", "w5", "w40 w41 w2 w17 w9"]


@pytest.fixture(scope="session")
def hooked_sae_transformer(tiny_models) -> HookedSAETransformer:
    """SAELens's model with the weights of the tiny one."""
    hooked = tiny_models["hooked"]
    model = HookedSAETransformer(hooked.cfg, tokenizer=hooked.tokenizer)
    model.load_state_dict(hooked.state_dict())
    return model


@pytest.fixture(params=["hooked", "bridge", "hooked sae"])
def model(request, tiny_models):
    """The tiny model on each host, and as SAELens's own."""
    if request.param == "hooked sae":
        return request.getfixturevalue("hooked_sae_transformer")
    return tiny_models[request.param]


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(4, 52, (2, 7), generator=torch.Generator().manual_seed(11))


def headed(q: torch.Tensor) -> torch.Tensor:
    return q.reshape(*q.shape[:2], 4, 8)


def watched(model, saes, run, **settings):
    """Run between two hooks of a user on layer 2; return the queries before and after ours."""
    before, after = [], []

    def keep(into):
        return lambda q, hook: into.append(headed(q.detach().clone()))

    with (
        model.hooks(fwd_hooks=[(HOOK, keep(before))]),
        attached_saes(model, saes, **settings),
        model.hooks(fwd_hooks=[(HOOK, keep(after))]),
    ):
        run()
    return before, after


def assert_bare(model) -> None:
    points = {id(point): point for point in model.hook_dict.values()}.values()
    assert not any(point._forward_hooks or point.fwd_hooks for point in points)


@pytest.mark.parametrize("heads", [None, [1], [3, 0], {2: [2]}])
def test_chosen_heads_carry_their_reconstruction_and_others_are_bitwise_unchanged(
    model, saes, tokens, heads
):
    (before,), (after,) = watched(model, saes, lambda: model(tokens), heads=heads)
    chosen = range(4) if heads is None else heads[2] if isinstance(heads, dict) else heads
    for head in range(4):
        q, one = before[:, :, head], split_heads(saes[HOOK])[head]
        if head in chosen:
            torch.testing.assert_close(after[:, :, head], one(q), rtol=0, atol=1e-5)
            assert not torch.allclose(after[:, :, head], q, atol=1e-2)
        else:
            assert torch.equal(after[:, :, head], q)
    assert_bare(model)


def test_chosen_layers_alone_are_touched(model, saes, tokens):
    names = [f"blocks.{layer}.attn.hook_q" for layer in range(3)]
    plain = read_activations(model, tokens, names)
    with attached_saes(model, saes, layers=[2]):
        now = read_activations(model, tokens, names)
    assert torch.equal(now[names[0]], plain[names[0]])
    assert torch.equal(now[names[1]], plain[names[1]])
    assert not torch.equal(now[names[2]], plain[names[2]])


@pytest.mark.parametrize("error_term", [False, True])
def test_the_identity_in_the_place_of_saes_changes_nothing(model, tokens, error_term):
    plain = model(tokens)
    encoders = sqs.sae.identity_encoders(sqs.query_sites(model))
    with attached_saes(model, encoders, error_term=error_term):
        assert torch.equal(model(tokens), plain)


def test_with_the_error_term_the_logits_are_those_of_the_bare_model(model, saes, tokens):
    plain = model(tokens)
    with attached_saes(model, saes):
        assert not torch.allclose(model(tokens), plain, atol=1e-2)
    with attached_saes(model, saes, error_term=True):
        torch.testing.assert_close(model(tokens), plain, rtol=0, atol=1e-5)


def test_with_the_error_term_an_edit_of_the_latents_counts_and_nothing_else(model, saes, tokens):
    sae = saes[HOOK]

    def double_the_first_head(latents, hook):
        latents = latents.clone()
        latents[..., 1, :] *= 2
        return latents

    with sae.hooks(fwd_hooks=[("hook_sae_acts_post", double_the_first_head)]):
        (before, _), (after, again) = watched(
            model,
            saes,
            lambda: (model(tokens), model(tokens)),
            heads=[1, 3],
            error_term=True,
        )
    assert torch.equal(after, again), "the hook of the SAE was lost after one pass"
    latents = sae.encode(before)[..., 1, :]
    one = split_heads(sae)[1]
    expected = before[..., 1, :] + one.decode(2 * latents) - one.decode(latents)
    torch.testing.assert_close(after[..., 1, :], expected, rtol=0, atol=1e-5)
    assert not torch.allclose(after[..., 1, :], before[..., 1, :], atol=1e-2)
    torch.testing.assert_close(after[..., 3, :], before[..., 3, :], rtol=0, atol=1e-5)
    assert torch.equal(after[..., [0, 2], :], before[..., [0, 2], :])


@pytest.mark.parametrize("error_term", [False, True])
def test_gradients_pass_through_the_latents_of_chosen_heads_and_not_the_error(
    model, saes, tokens, error_term
):
    given, out = [], []

    def leaf(q, hook):
        given.append(q.detach().clone().requires_grad_())
        return given[0]

    def keep(q, hook):
        out.append(headed(q))

    with (
        model.hooks(fwd_hooks=[(HOOK, leaf)]),
        attached_saes(model, saes, heads=[1], error_term=error_term),
        model.hooks(fwd_hooks=[(HOOK, keep)]),
    ):
        model(tokens)
    weights = torch.randn(out[0].shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((out[0] * weights).sum(), given[0])
    # The referee: the plain SAE of the head, and no error at all.
    q = headed(given[0].detach())[:, :, 1].requires_grad_()
    (expected,) = torch.autograd.grad((split_heads(saes[HOOK])[1](q) * weights[:, :, 1]).sum(), q)
    gradient = headed(gradient)
    torch.testing.assert_close(gradient[:, :, 1], expected, rtol=0, atol=1e-5)
    assert torch.equal(gradient[:, :, [0, 2, 3]], weights[:, :, [0, 2, 3]])


def test_generate_with_the_cache_equals_without_and_a_batch_equals_its_rows(model, saes):
    def generate(prompts, **changes):
        made = model.generate(
            prompts, return_type="tokens", output_logits=True, **GREEDY, **changes
        )
        return made.sequences, torch.stack(made.logits, dim=1)

    bare = generate(PROMPTS)
    with attached_saes(model, saes):
        sequences, logits = generate(PROMPTS)
        without_cache = generate(PROMPTS, use_past_kv_cache=False)
        alone = [generate(prompt) for prompt in PROMPTS]
    with attached_saes(model, saes, error_term=True):
        whole = generate(PROMPTS)
    assert torch.equal(sequences, without_cache[0])
    torch.testing.assert_close(logits, without_cache[1], rtol=0, atol=1e-4)
    for row, (_, own) in enumerate(alone):
        torch.testing.assert_close(logits[row], own[0], rtol=0, atol=1e-4)
    assert not torch.allclose(logits, bare[1], atol=1e-2)
    assert torch.equal(whole[0], bare[0])
    torch.testing.assert_close(whole[1], bare[1], rtol=0, atol=1e-5)
    assert_bare(model)


def test_all_hosts_give_equal_logits(tiny_models, hooked_sae_transformer, saes, tokens):
    results = []
    for model in (*tiny_models.values(), hooked_sae_transformer):
        with attached_saes(model, saes, heads={0: [1, 3], 2: [0]}):
            results.append(model(tokens))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-4)


def test_after_an_exception_no_hook_is_left_and_a_users_hook_still_runs(model, saes, tokens):
    plain, seen = model(tokens), []

    def fail(q, hook):
        raise RuntimeError("a user's hook failed")

    with model.hooks(fwd_hooks=[(HOOK, lambda q, hook: seen.append(1))]):
        for where in ("model", "sae"):
            hooks = (
                model.hooks(fwd_hooks=[(HOOK, fail)])
                if where == "model"
                else saes[HOOK].hooks(fwd_hooks=[("hook_sae_recons", fail)])
            )
            with (
                pytest.raises(RuntimeError, match="a user's hook failed"),
                attached_saes(model, saes, error_term=True),
                hooks,
            ):
                model(tokens)
        seen.clear()
        assert torch.equal(model(tokens), plain)
        assert seen == [1]
    assert_bare(model)
    assert not any(point._forward_hooks for point in saes[HOOK].hook_dict.values())


def test_a_steerer_inside_the_block_starts_from_the_reconstruction(model, saes, targets, tokens):
    steerer = sqs.LatentGradientSteerer(
        saes,
        targets,
        target="create",
        objective=sqs.SquaredDistance(),
        n_steps=0,
        step_size=0.5,
        scope=sqs.scopes.EveryPosition(),
    )
    with attached_saes(model, saes):
        expected = model(tokens)
        with steerer.apply(model):
            assert torch.equal(model(tokens), expected)


def test_a_model_in_bfloat16_stays_in_bfloat16(tiny_folder, saes, tokens):
    half = sqs.load_model(str(tiny_folder), device="cpu", dtype=torch.bfloat16)
    (before,), (after,) = watched(half, saes, lambda: half(tokens), heads=[1], error_term=True)
    assert after.dtype == torch.bfloat16
    assert torch.equal(before[..., [0, 2, 3], :], after[..., [0, 2, 3], :])
    # The error is taken in 32 bits: rounded to 16, the sum is the query again.
    torch.testing.assert_close(after, before, rtol=2**-7, atol=1e-6)


def test_measuring_queries_with_saes_attached_is_refused(model, saes, examples):
    builder = sqs.CentroidTargetBuilder(model, saes)
    with attached_saes(model, saes), pytest.raises(ValueError, match="leave the `with"):
        builder.fit(sqs.tokenize_examples(model, examples))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [1]}, r"no site at layer 1: there are some at \[0, 2\]"),
        ({"heads": [4]}, "no head 4 at layer 0: the heads are 0 to 3"),
        ({"heads": [1, 1]}, "heads at layer 0 must name"),
        ({"heads": {1: [0]}}, "no site at layer 1"),
    ],
)
def test_heads_and_layers_that_there_are_not_are_refused(model, saes, settings, message):
    with pytest.raises(ValueError, match=message), attached_saes(model, saes, **settings):
        pass
    assert_bare(model)


def test_an_sae_of_another_model_is_refused_before_the_first_hook(model, saes):
    other = sqs.sae.QueryHeadTopKSAE(
        sqs.sae.QueryHeadTopKSAEConfig(n_heads=2, d_head=8, d_sae_per_head=16, k=3)
    )
    with (
        pytest.raises(ValueError, match="has 2 heads of 8: the model has 4 heads of 8"),
        attached_saes(model, {**saes, HOOK: other}),
    ):
        pass
    assert_bare(model)


def test_saelens_itself_rewrites_all_heads_with_the_sae_of_one(
    hooked_sae_transformer, saes, tokens
):
    """What the docstring of `attach` says of `add_sae`; a change in SAELens shows here."""
    model, one = hooked_sae_transformer, split_heads(saes[HOOK])[1]
    assert one.cfg.metadata.hook_head_index == 1
    q = read_activations(model, tokens, [HOOK])[HOOK]
    out = f"{HOOK}.hook_sae_output"
    with model.saes(saes=[one]):
        by_one = model.run_with_cache(tokens, names_filter=[out])[1][out]
        assert HOOK not in model.hook_dict, "the hook point is gone"
        with (
            pytest.raises(ValueError, match=rf"by add_sae.*model\.reset_saes\('{HOOK}'\) first"),
            attached_saes(model, saes),
        ):
            pass
        with pytest.raises(ValueError, match=rf"by add_sae.*model\.reset_saes\('{HOOK}'\) first"):
            sqs.query_sites(model, [2])
    for head in range(4):
        assert torch.equal(by_one[:, :, head], one(q[:, :, head]))
        assert not torch.allclose(by_one[:, :, head], q[:, :, head], atol=1e-2)
    with model.saes(saes=[saes[HOOK]]):  # a query-head SAE is what add_sae takes it for
        by_ours, logits = model.run_with_cache(tokens, names_filter=[out])[1][out], model(tokens)
    assert torch.equal(by_ours, saes[HOOK](q))
    with attached_saes(model, saes, layers=[2]):
        assert torch.equal(model(tokens), logits)


def test_saelens_drops_the_hooks_on_the_hook_point_and_this_package_does_not(
    hooked_sae_transformer, saes, tokens
):
    model, seen = hooked_sae_transformer, []
    assert isinstance(model, HookedTransformer)
    with model.hooks(fwd_hooks=[(HOOK, lambda q, hook: seen.append(1))]):
        with attached_saes(model, saes):
            model(tokens)
        assert seen == [1]
        with model.saes(saes=[saes[HOOK]]):
            model(tokens)
        model(tokens)
        assert seen == [1], "add_sae put the SAE in the place of the hook point, and then a new one"
    assert_bare(model)
