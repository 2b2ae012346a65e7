import re
from types import SimpleNamespace

import pytest
import torch

from sae_query_steer.sites import QuerySite, query_sites

# The tiny model has 3 layers, and 4 query heads of 8 over 2 key heads.


def refuses(*parts: object):
    return pytest.raises(ValueError, match=".*".join(re.escape(str(part)) for part in parts))


def test_a_site_has_the_hook_name_of_its_layer_and_the_size_of_all_heads():
    site = QuerySite(layer=11, n_heads=3, d_head=5)
    assert site.hook_name == "blocks.11.attn.hook_q"
    assert site.d_in == 15
    assert QuerySite.from_hook_name(site.hook_name, n_heads=3, d_head=5) == site


@pytest.mark.parametrize(
    "name",
    ["blocks.1.attn.hook_k", "blocks.1.attn.hook_q.x", "x.blocks.1.attn.hook_q", "blocks.-1.attn."],
)
def test_another_hook_name_is_refused(name):
    with refuses(repr(name), "hook_q", "hook_rot_q"):
        QuerySite.from_hook_name(name, n_heads=3, d_head=5)


def test_a_model_has_one_site_a_layer_with_its_query_heads(model):
    assert query_sites(model) == tuple(QuerySite(layer=n, n_heads=4, d_head=8) for n in range(3))


def test_a_site_names_a_hook_point_whose_activation_has_its_shape(model):
    (site,) = query_sites(model, [1])
    seen = {}
    tokens = torch.tensor([[1, 5, 9, 13, 17]])
    with torch.no_grad():
        model.run_with_hooks(
            tokens,
            fwd_hooks=[(site.hook_name, lambda q, hook: seen.update({hook.name: q.shape}))],  # noqa: ARG005
        )
    assert list(seen.values()) == [(1, 5, site.n_heads, site.d_head)]


def test_sites_come_in_the_order_of_the_layers(model):
    assert [site.layer for site in query_sites(model, [2, 0])] == [0, 2]
    assert query_sites(model, iter([2, 0])) == query_sites(model, [0, 2])


@pytest.mark.parametrize("layer", [3, -1])
def test_a_layer_that_the_model_does_not_have_is_refused(model, layer):
    with refuses(f"layer {layer}", "3 layers", "0 to 2"):
        query_sites(model, [0, layer])


@pytest.mark.parametrize("layers", [[], [1, 0, 1]])
def test_naming_no_layer_or_one_twice_is_refused(model, layers):
    with refuses("layers", "at least one", "once", layers):
        query_sites(model, layers)


@pytest.mark.parametrize(("n_heads", "d_head"), [(2, 8), (4, 16)])
def test_a_site_of_another_model_is_refused(model, n_heads, d_head):
    with refuses("layer 1", f"{n_heads} heads of {d_head}", "4 heads of 8"):
        QuerySite(layer=1, n_heads=n_heads, d_head=d_head).check(model)


def test_an_architecture_that_does_not_expose_its_queries_is_refused():
    hooks = ("blocks.1.attn.hook_z", "blocks.1.attn.hook_in", "blocks.0.attn.hook_k", "hook_embed")
    model = SimpleNamespace(
        cfg=SimpleNamespace(n_layers=2, n_heads=3, d_head=5),
        hook_dict=dict.fromkeys(hooks),
        tokenizer=None,
    )
    with refuses("blocks.1.attn.hook_q", ["hook_in", "hook_z"]):
        query_sites(model, [1])


@pytest.mark.parametrize("layers", ["1-3", 2, [1.5], ["1"]])
def test_layers_that_are_no_list_of_whole_numbers_are_refused(model, layers):
    with pytest.raises(TypeError, match=r"list of whole numbers, such as \[1, 2\], got"):
        query_sites(model, layers)


def test_what_is_no_model_has_no_sites():
    with pytest.raises(TypeError, match="TransformerBridge, such as load_model returns, got str"):
        query_sites("model", [1])
