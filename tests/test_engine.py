"""The engine: edits at any site, checked in every pass, with state by model and call."""

import copy
import threading
import warnings
from contextlib import ExitStack

import pytest
import torch
from sae_lens import HookedSAETransformer
from test_attach import hooked_sae_transformer  # noqa: F401  (a fixture)
from transformer_lens.model_bridge import TransformerBridge

import sae_query_steer as sqs
from sae_query_steer.compare.sampling import seeded_sampling
from sae_query_steer.models.activations import read_activations
from sae_query_steer.models.loading import check_not_steered
from sae_query_steer.sites import Site
from sae_query_steer.steering.attach import attached_saes
from sae_query_steer.steering.edit import Edit
from sae_query_steer.steering.engine import SteeringWarning, apply_edits
from sae_query_steer.steering.steerer import JoinedSteerers, Steerer
from sae_query_steer.steering.trace import QueryChange
from sae_query_steer.steering.where import Where

NAME = "blocks.1.attn.hook_q"
PROMPTS = ["w1 w20 w33", "w5"]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "verbose": False, "stop_at_eos": False}


class Shift(Edit):
    """Adds one to everything, and keeps what it saw."""

    def __init__(self) -> None:
        self.seen = []

    def change(self, activations, at, tokens, *, record=False):
        self.seen.append((activations, at, tokens))
        return QueryChange(delta=torch.ones_like(activations))


def shift(model, scope=None, **where) -> Steerer:
    scope = sqs.scopes.EveryPosition() if scope is None else scope
    return Steerer(Shift(), Where(sqs.query_sites(model, [1]), scope=scope, **where))


def tokens_of(model) -> torch.Tensor:
    return model.to_tokens(PROMPTS[0], prepend_bos=True)


ENTRY = {
    "call": lambda model, tokens: model(tokens),
    "forward": lambda model, tokens: model.forward(tokens),
    "generate": lambda model, tokens: model.generate(tokens, **GREEDY),
    "generate_stream": lambda model, tokens: list(model.generate_stream(tokens, **GREEDY)),
    "run_with_cache": lambda model, tokens: model.run_with_cache(tokens),
    "run_with_hooks": lambda model, tokens: model.run_with_hooks(tokens, fwd_hooks=[]),
    "stopped above": lambda model, tokens: (
        model.run_with_cache(tokens, stop_at_layer=2)
        if not hasattr(model, "original_model")
        else model(tokens)
    ),
}
REMOVE = {
    "reset_hooks": lambda model: model.reset_hooks(),
    "remove_all_hook_fns": lambda model: model.remove_all_hook_fns(),
}


@pytest.mark.parametrize("entry", ENTRY)
@pytest.mark.parametrize("remove", REMOVE)
def test_a_pass_without_its_edit_ends_in_an_error_that_names_the_cause(model, entry, remove):
    tokens = tokens_of(model)
    plain = model(tokens)
    with shift(model).apply(model):
        ENTRY[entry](model, tokens)
        REMOVE[remove](model)
        with pytest.raises(RuntimeError, match=rf"reset_hooks.*{NAME}.*this forward pass"):
            ENTRY[entry](model, tokens)
    assert torch.equal(model(tokens), plain)


def test_hf_generate_of_the_bridge_is_followed_too(tiny_models):
    model = tiny_models["bridge"]
    tokens = tokens_of(model)
    settings = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False}
    with shift(model, scope=sqs.LastPromptToken()).apply(model):
        ours = model.generate(tokens, **GREEDY)
        assert torch.equal(model.hf_generate(tokens, **settings), ours)
        model.reset_hooks()
        with pytest.raises(RuntimeError, match="reset_hooks"):
            model.hf_generate(tokens, **settings)


def test_without_a_pass_the_end_of_the_block_tells(model):
    with pytest.raises(RuntimeError, match="the rest of this block"), shift(model).apply(model):
        model.reset_hooks()


def test_hooks_that_are_removed_during_a_pass_are_missed_in_this_pass_or_the_next(model):
    tokens = tokens_of(model)
    for layer in (0, 2):  # before the site, and after it
        name = f"blocks.{layer}.attn.hook_q"
        with shift(model).apply(model):
            with model.hooks(fwd_hooks=[(name, lambda q, hook: model.reset_hooks())]):
                if layer == 0:
                    with pytest.raises(RuntimeError, match="reset_hooks"):
                        model(tokens)
                    continue
                model(tokens)
            with pytest.raises(RuntimeError, match="reset_hooks"):
                model(tokens)


def test_an_exception_on_its_way_is_not_replaced(model):
    def fail(q, hook):
        raise KeyError("of the user")

    tokens = tokens_of(model)
    with pytest.raises(KeyError, match="of the user"), shift(model).apply(model):
        model.reset_hooks()
        with model.hooks(fwd_hooks=[("blocks.2.attn.hook_q", fail)]):
            model(tokens)


def test_passes_that_do_not_come_to_the_site_are_no_error(tiny_models):
    for model in tiny_models.values():
        tokens = tokens_of(model)
        with shift(model).apply(model):
            model.run_with_cache(tokens, stop_at_layer=1)
            model.run_with_hooks(tokens, stop_at_layer=1)
    model = tiny_models["hooked"]
    residual = model(tokens_of(model), stop_at_layer=2)
    with shift(model).apply(model):
        model(residual, start_at_layer=2)


def test_the_hooks_of_a_user_come_and_go(model):
    tokens = tokens_of(model)
    with shift(model).apply(model):
        steered = model(tokens)
        outer = model.hooks(fwd_hooks=[(NAME, lambda q, hook: q * 2)])
        outer.__enter__()
        assert not torch.equal(model(tokens), steered)
        outer.__exit__(None, None, None)
        assert torch.equal(model(tokens), steered)


@pytest.mark.parametrize("how", ["add_sae", "run_with_saes", "reset_saes"])
def test_an_sae_of_saelens_in_the_place_of_the_hook_point_is_told(
    hooked_sae_transformer,  # noqa: F811
    saes,
    how,
):
    model: HookedSAETransformer = hooked_sae_transformer
    sae = saes["blocks.2.attn.hook_q"]
    tokens = tokens_of(model)
    site = sqs.query_sites(model, [2])
    steerer = Steerer(Shift(), Where(site, scope=sqs.scopes.EveryPosition()))
    try:
        with steerer.apply(model):
            if how == "run_with_saes":
                with pytest.raises(RuntimeError, match=r"add_sae or run_with_saes took the place"):
                    model.run_with_saes(tokens, saes=[sae])
            else:
                model.add_sae(sae)
                if how == "reset_saes":
                    model.reset_saes()
                with pytest.raises(RuntimeError, match="SAELens"):
                    model(tokens)
    finally:
        model.reset_saes()


def test_a_deep_copy_is_a_model_of_its_own_that_is_not_steered(model):
    tokens, kind = tokens_of(model), type(model)
    plain, plain_text = model(tokens), model.generate(tokens, **GREEDY)
    with shift(model).apply(model, record=True):
        steered = model(tokens)
        other = copy.deepcopy(model)
        assert type(other) is kind
        assert torch.equal(other(tokens), plain)
        assert torch.equal(other.generate(tokens, **GREEDY), plain_text)
        assert torch.equal(model(tokens), steered)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert torch.equal(model(tokens), steered), "the copy shares nothing"
        check_not_steered(other)
        with pytest.raises(ValueError, match="being changed at blocks.1.attn"):
            check_not_steered(model)
    assert torch.equal(model(tokens), plain)
    assert type(model) is kind
    points = {id(point): point for point in other.hook_dict.values()}.values()
    assert not any(point.fwd_hooks or point._forward_hooks for point in points)


def test_a_model_that_was_copied_is_steered_as_before(model):
    with shift(model, sqs.LastPromptToken()).apply(model):
        before = model.generate(tokens_of(model), **GREEDY)
        copy.deepcopy(model)
        assert torch.equal(model.generate(tokens_of(model), **GREEDY), before)


def test_contexts_that_end_in_another_order_restore_the_model(model):
    before, tokens, kind = set(vars(model)), tokens_of(model), type(model)
    plain = model(tokens)
    made = [
        shift(model).apply(model),
        seeded_sampling(model, [1]),
        shift(model, heads=[0]).apply(model),
        model.hooks(fwd_hooks=[(NAME, lambda q, hook: None)]),
    ]
    for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)):
        contexts = [
            shift(model).apply(model),
            seeded_sampling(model, [1]),
            shift(model, heads=[0]).apply(model),
            shift(model, heads=[1]).apply(model, record=True),
        ]
        for context in contexts:
            context.__enter__()
        assert not torch.equal(model(tokens), plain)
        model.generate(tokens, **GREEDY)
        for i in order:
            contexts[i].__exit__(None, None, None)
        assert torch.equal(model(tokens), plain)
        assert set(vars(model)) == before
        assert type(model) is kind
    with pytest.warns(SteeringWarning, match="was called and never entered") as caught:
        made.clear()
    assert len(caught) == 3
    modules = [*model.hook_dict.values(), *model.blocks, model.embed]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_threads_that_share_a_steered_model_take_turns(model):
    prompts = [model.to_tokens(prompt, prepend_bos=True) for prompt in PROMPTS] * 3
    found: dict[int, torch.Tensor] = {}
    with shift(model, scope=sqs.LastPromptToken()).apply(model):
        expected = [model.generate(tokens, **GREEDY) for tokens in prompts]

        def run(i: int) -> None:
            found[i] = model.generate(prompts[i], **GREEDY)

        threads = [threading.Thread(target=run, args=[i]) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[i], tokens) for i, tokens in enumerate(expected))


def test_the_mathematics_is_in_32_bits_outside_autocast(tiny_folder):
    model = sqs.load_model(str(tiny_folder), device="cpu")
    steerer, tokens, inside = shift(model), tokens_of(model), []

    class Watch(Shift):
        def change(self, activations, at, tokens, *, record=False):
            inside.append((activations.dtype, torch.is_autocast_enabled("cpu")))
            assert (activations @ activations.mT).dtype == torch.float32
            return super().change(activations, at, tokens, record=record)

    steerer = Steerer(Watch(), Where(sqs.query_sites(model, [1]), scope=sqs.scopes.EveryPosition()))
    with torch.autocast("cpu", torch.bfloat16), steerer.apply(model):
        model(tokens)
        model.generate(tokens, **GREEDY)
    assert set(inside) == {(torch.float32, False)}


def test_a_steerer_belongs_to_its_model_in_train_mode_and_under_autocast(
    tiny_folder, saes, targets
):
    model = sqs.load_model(str(tiny_folder), device="cpu").train()
    steerer = sqs.LatentGradientSteerer(
        saes, targets, target="create", objective=sqs.SquaredDistance(), n_steps=1, step_size=0.5
    )
    with torch.autocast("cpu", torch.bfloat16), steerer.apply(model):
        model.generate(tokens_of(model), **GREEDY)
    assert all(module.training for module in model.modules())


SITES = [
    *(f"blocks.1.attn.hook_{kind}" for kind in ("k", "rot_k", "v", "z")),
    *(f"blocks.1.hook_resid_{kind}" for kind in ("pre", "post")),
]


@pytest.mark.parametrize("name", SITES)
def test_other_sites_are_edited_at_the_chosen_heads_and_tokens_alone(model, name):
    site, tokens = Site.of(model, name), tokens_of(model)
    heads = [site.n_heads - 1]
    where = Where([site], scope=sqs.scopes.Window(1, 3), heads=heads)
    before = read_activations(model, tokens, [name])[name]
    with apply_edits(model, [(Shift(), where)]), ExitStack():
        after = read_activations(model, tokens, [name])[name]
    expected = torch.zeros_like(before)
    expected[:, 1:3, heads] = 1
    assert before.shape[2:] == (site.n_heads, site.d_head)
    torch.testing.assert_close(after - before, expected)
    assert torch.equal(after[:, [0, 3]], before[:, [0, 3]])


class HeadNumber(Edit):
    """Adds its number to each head."""

    def change(self, activations, at, tokens, *, record=False):
        numbers = torch.tensor(at.heads, dtype=activations.dtype)
        return QueryChange(delta=numbers[None, :, None].expand_as(activations))


@pytest.mark.parametrize("heads", [[3, 1], [1, 3], [2, 0, 3, 1]])
def test_heads_get_their_own_change_in_whatever_order_they_are_listed(model, heads):
    where = Where(sqs.query_sites(model, [1]), scope=sqs.scopes.EveryPosition(), heads=heads)
    before = read_activations(model, tokens_of(model), [NAME])[NAME]
    with apply_edits(model, [(HeadNumber(), where)]):
        after = read_activations(model, tokens_of(model), [NAME])[NAME]
    expected = torch.tensor([float(head if head in heads else 0) for head in range(4)])
    torch.testing.assert_close(after - before, expected[:, None].expand_as(before))


def test_a_prompt_longer_than_the_context_is_refused_with_its_row(model):
    n_ctx = model.cfg.n_ctx
    long = " ".join(["w1"] * n_ctx)
    with (
        shift(model).apply(model),
        pytest.raises(ValueError, match=f"prompt 1 has {n_ctx + 1} tokens, .*context of {n_ctx}"),
    ):
        model.generate(["w1", long], **GREEDY)


def test_prompt_lengths_in_generate_must_be_those_of_the_prompts(model):
    with (
        shift(model).apply(model, prompt_lengths=[3, 2]),
        pytest.raises(ValueError, match=r"must be those of the prompts, \[4, 2\], got \[3, 2\]"),
    ):
        model.generate(PROMPTS, **GREEDY)
    with shift(model).apply(model, prompt_lengths=[4, 2]):
        model.generate(PROMPTS, **GREEDY)


def test_a_change_that_diverges_is_warned_of_with_distances_and_steps(model, saes, targets):
    steerer = sqs.LatentGradientSteerer(
        saes, targets, target="create", objective=sqs.SquaredDistance(), n_steps=1, step_size=1e4
    )
    said = r"times the activations' norm; mean distance .* \S+ before, \S+ after; 0% of"
    with steerer.apply(model), pytest.warns(SteeringWarning, match=said) as caught:
        model.generate(PROMPTS, **GREEDY)
    assert len(caught) == len(saes)  # once for each site


def test_a_descent_that_passes_its_target_is_warned_of_once(model, saes, targets):
    settings = {"objective": sqs.SquaredDistance(), "n_steps": 1, "layers": [2]}
    for step_size, n_warnings in ((1.5, 0), (4.0, 1)):
        steerer = sqs.LatentGradientSteerer(
            saes, targets, target=["create", "apply"], step_size=step_size, **settings
        )
        with steerer.apply(model), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SteeringWarning)
            model.generate(PROMPTS, **GREEDY)
        assert len([one for one in caught if one.category is SteeringWarning]) == n_warnings


def test_centroids_of_texts_with_bos_do_not_steer_a_model_whose_prompts_begin_without(
    model, saes, targets, monkeypatch
):
    assert targets.prepend_bos is True
    steerer = sqs.LatentGradientSteerer(
        saes, targets, target="create", objective=sqs.SquaredDistance(), n_steps=1, step_size=0.5
    )
    monkeypatch.setattr(model.cfg, "default_prepend_bos", False)
    with (
        pytest.raises(ValueError, match="prepend_bos=True, but by .*=False prompts begin without"),
        steerer.apply(model),
    ):
        pass


class KeyedShift(Edit):
    """Adds a large number to queries, and sees keys."""

    needs_keys = True

    def change(self, activations, at, tokens, *, record=False, keys):
        return QueryChange(delta=torch.full_like(activations, 1e4))


def test_an_edit_that_sees_keys_is_warned_of_too(model):
    steerer = Steerer(KeyedShift(), Where(sqs.query_sites(model, [1])))
    said = r"the change at \S+ is \S+ times the activations' norm"
    with steerer.apply(model, prompt_lengths=[4]), pytest.warns(SteeringWarning, match=said):
        model(tokens_of(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "gpu"}, "device must be one of .*'cpu'.*got 'gpu'"),
        ({"backend": "nnsight"}, "backend must be 'bridge' or 'hooked', got 'nnsight'"),
        ({"dtype": "int8"}, "dtype must be one of .*'float16'.*got 'int8'"),
        ({"device_map": "auto", "device": "cpu"}, "device_map must be given .* without device"),
        ({"device_map": "auto", "backend": "hooked"}, "device_map must be given with backend='br"),
    ],
)
def test_a_model_is_not_loaded_on_a_device_or_in_a_format_that_there_is_not(
    tiny_folder, settings, message
):
    with pytest.raises(ValueError, match=message):
        sqs.load_model(str(tiny_folder), **settings)
    loaded = sqs.load_model(str(tiny_folder), device="cpu", dtype="bfloat16")
    assert next(loaded.parameters()).dtype == torch.bfloat16


def test_a_device_map_is_given_to_the_bridge(tiny_folder, tiny_models, monkeypatch):
    given, boot = {}, TransformerBridge.boot_transformers
    monkeypatch.setattr(
        TransformerBridge,
        "boot_transformers",
        lambda name, **settings: given.update(settings) or boot(name, **settings),
    )
    model = sqs.load_model(tiny_folder, device_map={"": "cpu"})
    assert given["device_map"] == {"": "cpu"}
    tokens = tokens_of(model)
    assert torch.equal(model(tokens), tiny_models["bridge"](tokens))


def test_saes_and_targets_in_the_wrong_order_are_refused(saes, targets, untyped):
    with pytest.raises(TypeError, match="in this order, got CentroidTargets and QuerySAEs"):
        sqs.LatentGradientSteerer(
            targets, saes, target="create", objective=sqs.SquaredDistance(), n_steps=1, step_size=1
        )


def test_what_is_no_model_is_refused_with_what_is(model):
    with (
        pytest.raises(TypeError, match="HookedTransformer or a TransformerBridge.*got str"),
        shift(model).apply("w1 w2"),
    ):
        pass


def test_other_sites_that_there_are_not_are_refused(model):
    with pytest.raises(ValueError, match="hook_name must be"):
        Site.of(model, "blocks.0.mlp.hook_post")
    with pytest.raises(ValueError, match="layer 7"):
        Site.of(model, "blocks.7.hook_resid_pre")
    wrong = Site(hook_name="blocks.1.attn.hook_k", n_heads=3, d_head=8)
    with pytest.raises(ValueError, match="3 heads of 8.*2 heads of 8"):
        wrong.check(model)
    with (
        pytest.raises(ValueError, match="3 heads"),
        Steerer(Shift(), Where([wrong])).apply(model),
    ):
        pass


def test_a_compiled_model_is_refused_wherever_the_compilation_sits(tiny_folder):
    model = sqs.load_model(str(tiny_folder), device="cpu")
    model.original_model.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled"), shift(model).apply(model):
        pass


def test_a_steerer_prints_in_one_line(model):
    assert "\n" not in repr(shift(model))
    assert NAME in repr(shift(model))


@pytest.mark.parametrize("name", ["runs/my-llama", "a/b/c", "/none", "no model"])
def test_a_model_that_is_nowhere_is_named(name):
    with pytest.raises(
        FileNotFoundError, match=f"no model folder '?{name}'?(, and no model of|: check)"
    ):
        sqs.load_model(name)


def test_a_block_in_which_no_model_ran_is_warned_of(model):
    with (
        pytest.warns(SteeringWarning, match="no forward pass ran .* generate inside it"),
        shift(model).apply(model),
    ):
        pass


@pytest.mark.parametrize("made", ["joined", "edits", "saes"])
def test_what_is_never_entered_is_warned_of(model, saes, made):
    steerer = shift(model)
    block = {
        "joined": lambda: JoinedSteerers(steerer, steerer).apply(model),
        "edits": lambda: apply_edits(model, [(steerer.edit, steerer.where)]),
        "saes": lambda: attached_saes(model, saes),
    }[made]()
    assert "no effect until it is entered by `with`" in repr(block)
    with pytest.warns(SteeringWarning, match="called and never entered, so it had no effect"):
        del block


def test_padding_of_a_float64_bridge_is_not_told_as_an_overflow_of_float16(tiny_folder):
    model = sqs.load_model(tiny_folder, device="cpu", dtype="float64")
    where = Where(sqs.query_sites(model, [2]), scope=sqs.scopes.EveryPosition())
    with (
        Steerer(Shift(), where).apply(model),
        pytest.raises(ValueError, match=r"NaN of padding: use float32") as caught,
    ):
        model.generate(PROMPTS, **GREEDY)
    assert "float16" not in str(caught.value)
