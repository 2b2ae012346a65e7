"""Seeded sampling: a draw from the softmax, by the row's own seed alone."""

import re

import pytest
import torch
from scipy.stats import chisquare
from transformer_lens.model_bridge import TransformerBridge
from transformers import Gemma2Config, Gemma2ForCausalLM
from wheel_check import word_tokenizer

import sae_query_steer as sqs
from sae_query_steer.compare.sampling import seeded_sampling

PROMPTS = ["w1 w20 w33", "w5", "w40 w41 w2 w17 w9", "w13 w30"]
SEEDS = [11, 7, 7, 2**40]
N_ROWS = 4000


def written(model, prompts, n: int = 5, **changes) -> torch.Tensor:
    """The new tokens of a greedy call, [row n]."""
    settings = {
        "max_new_tokens": n,
        "do_sample": False,
        "verbose": False,
        "stop_at_eos": False,
        "prepend_bos": True,
        "return_type": "tokens",
    }
    return model.generate(prompts, **settings | changes)[:, -n:]


def sampled(model, prompts, seeds, *, temperature: float = 1.0, **changes) -> torch.Tensor:
    with seeded_sampling(model, seeds, temperature=temperature):
        return written(model, prompts, **changes)


def p_value(drawn: torch.Tensor, log_probs: torch.Tensor) -> float:
    """Of the chi-square test that tokens were drawn from softmax(log_probs), rare ones as one."""
    expected = len(drawn) * log_probs.double().softmax(-1)
    counts = torch.bincount(drawn, minlength=len(expected)).double()
    often = expected >= 8
    rest = (counts[~often].sum(), expected[~often].sum())
    observed = [*counts[often].tolist(), *([float(rest[0])] if rest[1] >= 8 else [])]
    wanted = [*expected[often].tolist(), *([float(rest[1])] if rest[1] >= 8 else [])]
    assert len(wanted) > 5, "a test over few tokens says little"
    scale = sum(observed) / sum(wanted)
    return float(chisquare(observed, [w * scale for w in wanted]).pvalue)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
def test_draws_are_as_frequent_as_the_softmax_says(model, temperature):
    row = model.to_tokens(PROMPTS[0], prepend_bos=True)
    with torch.no_grad():
        logits = model(row)[0, -1]
    drawn = sampled(
        model, row.expand(N_ROWS, -1), range(N_ROWS), temperature=temperature, n=1
    ).flatten()
    assert p_value(drawn, logits / temperature) > 1e-3
    assert p_value(drawn, logits / (1.25 * temperature)) < 1e-6, "the test sees no difference"


def test_the_second_token_is_drawn_anew(model):
    row = model.to_tokens(PROMPTS[0], prepend_bos=True)
    first, second = sampled(model, row.expand(2000, -1), range(2000), n=2).T
    token = int(first.mode().values)
    with torch.no_grad():
        logits = model(torch.cat([row, torch.tensor([[token]])], dim=1))[0, -1]
    assert (first == token).sum() > 300
    assert p_value(second[first == token], logits) > 1e-3


def test_the_cache_and_the_batch_change_no_draw(model):
    drawn = sampled(model, PROMPTS, SEEDS)
    assert torch.equal(sampled(model, PROMPTS, SEEDS, use_past_kv_cache=False), drawn)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        assert torch.equal(sampled(model, [prompt], [seed])[0], drawn[row])
    back = sampled(model, PROMPTS[::-1], SEEDS[::-1])
    assert torch.equal(back.flip(0), drawn)
    assert (drawn != written(model, PROMPTS)).any(1).all()


def test_a_row_follows_its_seed_and_both_hosts_draw_alike(tiny_models):
    model, other = tiny_models["bridge"], tiny_models["hooked"]
    first = sampled(model, [PROMPTS[0]] * 3, [1, 2, 1])
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    assert torch.equal(sampled(other, [PROMPTS[0]] * 3, [1, 2, 1]), first)


def test_a_low_temperature_is_greedy(model):
    for temperature in (1e-3, 1e-6):
        drawn = sampled(model, PROMPTS, SEEDS, temperature=temperature)
        assert torch.equal(drawn, written(model, PROMPTS))


def test_a_stream_draws_what_generate_does(model):
    row = model.to_tokens(PROMPTS[0], prepend_bos=True)
    expected = sampled(model, row, [3], n=6)
    with seeded_sampling(model, [3]):
        parts = list(
            model.generate_stream(
                row,
                max_new_tokens=6,
                max_tokens_per_yield=2,
                do_sample=False,
                stop_at_eos=False,
                verbose=False,
            )
        )
    assert torch.equal(torch.cat(parts, dim=1)[:, -6:], expected)


def test_a_steerer_and_the_sampling_may_come_in_either_order(tiny_folder, saes, targets):
    steerer = sqs.LatentGradientSteerer(
        saes, targets, target="create", objective=sqs.SquaredDistance(), n_steps=4, step_size=0.5
    )
    made = []
    for inside in (True, False):
        model = sqs.load_model(str(tiny_folder), device="cpu")  # unknown to the steerer: checked
        sampling = seeded_sampling(model, SEEDS[:2])  # as many rows as the fingerprint
        if inside:
            with sampling, steerer.apply(model):
                made.append(written(model, PROMPTS[:2]))
        else:
            with steerer.apply(model), sampling:
                made.append(written(model, PROMPTS[:2]))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], sampled(model, PROMPTS[:2], SEEDS[:2]))


def capped(host: str, tiny_folder, tiny_models):
    """A model that caps its logits: Gemma 2 on the bridge, a setting of HookedTransformer."""
    if host == "hooked":
        return tiny_models["hooked"]
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 52,
        "initializer_range": 0.5,
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        gemma = Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=1.5))
    folder = tiny_folder.parent / "tiny-gemma"
    gemma.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return TransformerBridge.boot_transformers(str(folder), device="cpu")


@pytest.mark.parametrize("host", ["hooked", "bridge"])
def test_a_model_that_caps_its_logits_is_sampled_from_the_capped_ones(
    host, tiny_folder, tiny_models, monkeypatch
):
    model = capped(host, tiny_folder, tiny_models)
    if host == "hooked":
        monkeypatch.setattr(model.cfg, "output_logits_soft_cap", 1.5)
    row = model.to_tokens(PROMPTS[0], prepend_bos=True)
    with torch.no_grad():
        logits = model(row)[0, -1]
    assert 1.0 < logits.abs().max() <= 1.5
    drawn = sampled(model, row.expand(N_ROWS, -1), range(N_ROWS), n=1).flatten()
    assert p_value(drawn, logits) > 1e-3


def test_half_precision_makes_no_ties_among_large_logits(model):
    def equal_and_large(_unembed, _args, logits):
        return torch.full_like(logits, 100.0, dtype=torch.bfloat16)

    row = model.to_tokens(PROMPTS[0], prepend_bos=True)
    handle = model.unembed.register_forward_hook(equal_and_large)
    try:
        drawn = sampled(model, row.expand(N_ROWS, -1), range(N_ROWS), n=1).flatten()
    finally:
        handle.remove()
    assert p_value(drawn, torch.zeros(52)) > 1e-3


def test_the_global_random_state_is_neither_read_nor_changed(model):
    drawn = sampled(model, PROMPTS, SEEDS)
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        before = torch.get_rng_state()
        again = sampled(model, PROMPTS, SEEDS)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again, drawn)


def state_of(model):
    return set(vars(model)), dict(model.unembed._forward_hooks)


def test_nothing_is_left_behind_after_an_exception_too(model):
    before, greedy = state_of(model), written(model, PROMPTS)

    def fail(_activation, hook):
        assert model.unembed._forward_hooks
        raise RuntimeError("a user's error")

    with (
        pytest.raises(RuntimeError, match="a user's error"),
        model.hooks(fwd_hooks=[("blocks.1.attn.hook_q", fail)]),
        seeded_sampling(model, SEEDS),
    ):
        written(model, PROMPTS)
    assert state_of(model) == before
    assert torch.equal(written(model, PROMPTS), greedy)


def test_a_stream_that_is_left_early_leaves_nothing_behind(model):
    before = state_of(model)
    with seeded_sampling(model, [3]):
        stream = model.generate_stream(
            model.to_tokens("w1"), max_tokens_per_yield=1, do_sample=False, verbose=False
        )
        next(stream)
        stream.close()
        assert not model.unembed._forward_hooks
    assert state_of(model) == before


def test_forward_passes_outside_generate_are_left_alone_and_every_call_starts_afresh(model):
    tokens = model.to_tokens(PROMPTS[0], prepend_bos=True)
    plain, drawn = model(tokens), sampled(model, PROMPTS, SEEDS)
    with seeded_sampling(model, SEEDS):
        assert torch.equal(model(tokens), plain)
        assert torch.equal(written(model, PROMPTS), drawn)
        assert torch.equal(written(model, PROMPTS), drawn)


@pytest.mark.parametrize("given", [{"do_sample": True}, {}])
def test_the_backends_own_sampling_on_top_is_refused(model, given):
    for name in ("generate", "generate_stream"):
        with seeded_sampling(model, [1]), pytest.raises(ValueError, match="do_sample must be"):
            list(getattr(model, name)("w1", verbose=False, **given))


def test_another_number_of_rows_is_refused_and_leaves_nothing(model):
    message = (
        "the batch has 4 rows, there are 3 seeds: give one for each prompt, and all prompts in one "
        "call of generate()"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sampled(model, PROMPTS, SEEDS[:3])
    assert not model.unembed._forward_hooks


@pytest.mark.parametrize("temperature", [0.0, -1.0, 1e-7, float("nan"), float("inf")])
def test_a_temperature_that_is_no_temperature_is_refused(model, temperature):
    message = f"temperature must be a finite number >= 1e-06, got {temperature}"
    with pytest.raises(ValueError, match=message):
        sampled(model, PROMPTS, SEEDS, temperature=temperature)
    assert not model.unembed._forward_hooks


def test_a_compiled_model_is_refused(tiny_models):
    compiled = torch.compile(tiny_models["hooked"], backend="eager")
    with pytest.raises(ValueError, match=r"is compiled by torch\.compile"):
        sampled(compiled, PROMPTS, SEEDS)
