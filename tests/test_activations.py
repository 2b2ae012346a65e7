"""Reading activations: what the backend caches, in eval mode and outside autocast."""

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

import sae_query_steer as sqs
from sae_query_steer.models.activations import (
    LOGITS,
    key_hook,
    pattern_hook,
    read_activations,
    read_at_span,
    without_hooks,
)

TOKENS = torch.tensor([[1, 5, 9, 20, 33], [1, 7, 6, -1, -1]])
ATTENTION = [f"blocks.{n}.attn.hook_{what}" for n in (0, 2) for what in "qkvz"]
ROTATED = [f"blocks.1.attn.hook_rot_{what}" for what in "qk"]
SQUARE = ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"]
LATE = ["blocks.2.hook_mlp_out", "unembed.hook_out"]
RESIDUAL = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"]


def test_activations_are_those_of_the_backends_cache(model):
    names = [*ATTENTION, *ROTATED, *SQUARE, *RESIDUAL, LOGITS]
    found = read_activations(model, TOKENS, names)
    logits, cache = model.run_with_cache(TOKENS.clamp(min=0), prepend_bos=False)
    assert list(found) == names
    assert torch.equal(found[LOGITS], logits)
    for name in names[:-1]:
        assert torch.equal(found[name].flatten(), cache[name].flatten()), name
    heads = {"q": 4, "k": 2, "v": 2, "z": 4}
    for name in [*ATTENTION, *ROTATED]:
        assert found[name].shape == (2, 5, heads[name[-1]], 8), name
    assert {found[name].shape for name in RESIDUAL} == {(2, 5, 1, 24)}
    assert {found[name].shape for name in SQUARE} == {(2, 4, 5, 5)}
    assert not any(value.requires_grad for value in found.values())


def test_the_pass_stops_after_the_last_layer_that_is_needed(model):
    seen = []

    def note(value, hook):
        seen.append(hook.name)
        return value

    hooks = [(f"blocks.{layer}.hook_resid_post", note) for layer in range(3)]
    read_activations(model, TOKENS, ["blocks.1.hook_resid_post"], fwd_hooks=hooks)
    assert len(seen) == 2
    read_activations(model, TOKENS, ["blocks.0.attn.hook_q", LOGITS], fwd_hooks=hooks)
    assert len(seen) == 5
    read_activations(model, TOKENS, ["blocks.0.attn.hook_q"])
    assert len(seen) == 5  # the hooks are gone


def test_a_bridge_runs_nothing_that_no_read_needs(tiny_models):
    model, seen = tiny_models["bridge"], []
    hooks = [(name, lambda value, hook: seen.append(hook.name)) for name in LATE]
    read_activations(model, TOKENS, ["blocks.2.attn.hook_q"], fwd_hooks=hooks)
    assert not seen
    read_activations(model, TOKENS, ["blocks.2.hook_resid_post"], fwd_hooks=hooks)
    assert len(seen) == 1


def test_what_keep_returns_takes_the_place_of_an_activation(model):
    names = ["blocks.1.attn.hook_q", "blocks.2.attn.hook_k"]
    plain = read_activations(model, TOKENS, names)
    found = read_activations(model, TOKENS, names, keep=lambda name, value: value[:, -1] + 1)
    assert list(found) == names
    assert all(torch.equal(found[name], plain[name][:, -1] + 1) for name in names)


def test_a_bridge_keeps_attention_only_where_it_is_read_and_no_cache(tiny_models, monkeypatch):
    model, seen = tiny_models["bridge"], []
    inner, forward = type(model.original_model), type(model.original_model).forward
    monkeypatch.setattr(
        inner, "forward", lambda *args, **given: seen.append(given) or forward(*args, **given)
    )
    read_activations(model, TOKENS, ["blocks.1.attn.hook_q"])
    read_activations(model, TOKENS, [pattern_hook(1)])
    assert [given.get("output_attentions", False) for given in seen] == [False, True]
    assert [given["use_cache"] for given in seen] == [False, False]


def test_hooks_change_what_is_read_and_the_users_own_stay_in_place(model):
    name = "blocks.1.attn.hook_q"
    later = "blocks.2.attn.hook_q"
    plain = read_activations(model, TOKENS, [name, later])

    def add(value, hook):
        return value + 1

    with model.hooks(fwd_hooks=[(name, add)]):
        once = read_activations(model, TOKENS, [name])
        twice = read_activations(
            model, TOKENS, [name, "blocks.2.attn.hook_q"], fwd_hooks=[(name, add)]
        )
        with without_hooks(model):
            bare = read_activations(model, TOKENS, [name])
        again = read_activations(model, TOKENS, [name])
    torch.testing.assert_close(once[name], plain[name] + 1)
    torch.testing.assert_close(twice[name], plain[name] + 2)
    assert not torch.equal(twice[later], plain[later])
    assert torch.equal(bare[name], plain[name])
    assert torch.equal(again[name], once[name])


def test_padding_changes_nothing_before_it(model):
    (name,) = RESIDUAL[1:]
    padded = read_activations(model, TOKENS, [name])[name][1, :3]
    alone = read_activations(model, TOKENS[1:, :3], [name])[name][0]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-4)


def test_autocast_around_the_call_changes_nothing_and_the_option_uses_it(model):
    name = "blocks.2.attn.hook_q"
    plain = read_activations(model, TOKENS, [name])[name]
    with torch.autocast("cpu", torch.bfloat16):
        inside = read_activations(model, TOKENS, [name])[name]
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(inside, plain)
    half = read_activations(model, TOKENS, [name], autocast=True)[name]
    assert 1e-4 < float((half.float() - plain).norm() / plain.norm()) < 0.1


def dropout_model(kind: str, tokenizer) -> TransformerBridge:
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        config = GPT2Config(
            n_embd=24, n_layer=2, n_head=3, n_positions=32, attn_pdrop=0.5, resid_pdrop=0.5, **sizes
        )
    else:
        config = LlamaConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=16,
            max_position_embeddings=32,
            attention_dropout=0.5,
            **sizes,
        )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(config)
    return TransformerBridge.boot_transformers(kind, hf_model=hf, tokenizer=tokenizer, device="cpu")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_model_with_dropout_in_train_mode_is_read_in_eval_mode_and_put_back(kind, tiny_folder):
    model = dropout_model(kind, AutoTokenizer.from_pretrained(tiny_folder))
    name = "blocks.1.attn.hook_q"
    model.eval()
    plain = read_activations(model, TOKENS, [name])[name]
    model.train()
    model.blocks[1].eval()
    modes = [module.training for module in [*model.modules(), *model.original_model.modules()]]
    assert torch.equal(read_activations(model, TOKENS, [name])[name], plain)
    with pytest.raises(ZeroDivisionError):
        read_activations(model, TOKENS, [name], fwd_hooks=[(name, lambda q, hook: q / (1 // 0))])
    after = [module.training for module in [*model.modules(), *model.original_model.modules()]]
    assert after == modes
    assert any(modes)
    assert not torch.equal(
        model.run_with_cache(TOKENS.clamp(min=0), prepend_bos=False)[1][name].flatten(),
        plain.flatten(),
    )


def test_a_hook_point_that_there_is_not_is_named_with_its_neighbours(model):
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.hook_query.*'hook_q'.*blocks\.1\.attn"):
        read_activations(model, TOKENS, ["blocks.1.attn.hook_query"])


def test_keys_and_patterns_of_a_site_are_found(model):
    plain, rotated = (sqs.query_sites(model, [1], rotated=r)[0] for r in (False, True))
    assert key_hook(plain) == "blocks.1.attn.hook_k"
    assert key_hook(rotated) == "blocks.1.attn.hook_rot_k"
    found = read_activations(model, TOKENS, [rotated.hook_name, key_hook(rotated), pattern_hook(1)])
    query, key = found[rotated.hook_name], found[key_hook(rotated)].repeat_interleave(2, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / 8**0.5
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    pattern = scores.where(seen, -torch.inf).softmax(-1)
    torch.testing.assert_close(found[pattern_hook(1)], pattern, rtol=0, atol=1e-5)


def test_every_token_of_the_span_is_read_once(model, examples):
    tokenized = sqs.tokenize_examples(
        model, examples, span=sqs.scopes.ResponseTokens(), batch_size=5
    )
    names = ["blocks.1.attn.hook_q", "blocks.2.hook_resid_pre"]
    seen = {}
    for batch in read_at_span(model, tokenized, names):
        for i, (row, position) in enumerate(
            zip(batch.row.tolist(), batch.position.tolist(), strict=True)
        ):
            assert (row, position) not in seen
            assert int(batch.token[i]) == int(tokenized[row].tokens[position])
            seen[row, position] = [batch.activations[name][i] for name in names]
    wanted = {
        (row, position)
        for row, example in enumerate(tokenized)
        for position in range(example.prompt_length, len(example.tokens))
    }
    assert set(seen) == wanted
    alone = read_activations(model, tokenized[7].tokens[None], names)
    for (row, position), values in seen.items():
        if row == 7:
            for name, value in zip(names, values, strict=True):
                torch.testing.assert_close(value, alone[name][0, position], rtol=0, atol=1e-4)


def test_an_example_outside_the_span_is_refused_before_the_model_runs(model, examples, monkeypatch):
    bare = sqs.LabelledExample(prompt="w1 w2", label="apply")
    tokenized = sqs.tokenize_examples(model, [*examples, bare], span=sqs.scopes.ResponseTokens())
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=r"example 48 \('apply'\).*ResponseTokens"):
        next(read_at_span(model, tokenized, ["blocks.0.attn.hook_q"]))


def test_values_that_are_not_finite_are_refused_by_name(model, examples):
    tokenized = sqs.tokenize_examples(model, examples[:3])
    name = "blocks.0.attn.hook_q"
    with (
        model.hooks(fwd_hooks=[(name, lambda q, hook: q / 0)]),
        pytest.raises(ValueError, match=rf"{name} are not finite"),
    ):
        next(read_at_span(model, tokenized, [name]))
