"""Every kind of scope inside real forward passes, on both hosts: it steers there and only there."""

import re

import pytest
import torch
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache

import sae_query_steer as sqs
from sae_query_steer.steering.edit import Edit
from sae_query_steer.steering.steerer import Steerer
from sae_query_steer.steering.trace import QueryChange
from sae_query_steer.steering.where import Where

PROMPTS = ["w1 w20 w33", "w5", "w40 w41 w2 w17 w9"]  # with BOS 4, 2 and 6 tokens
LENGTHS = [4, 2, 6]
NEW = 5
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "verbose": False, "stop_at_eos": False}
AT = [[0, 5], [1, 2, 7], [3, 6, 11]]
MASK = torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < 0.4


class Shove(Edit):
    """A change of queries that is cheap, large and the same wherever it acts."""

    def change(self, activations, at, tokens, *, record=False):
        return QueryChange(delta=2 * activations.roll(1, -1) + 1)


def shove(model, scope) -> Steerer:
    return Steerer(Shove(), Where(sqs.query_sites(model, [0, 2]), scope=scope, heads=[0, 2]))


def greedy(model, prompts, **changes):
    """Tokens and logits [row step d_vocab] of a greedy generation."""
    settings = {"return_type": "tokens", "output_logits": True, **GREEDY, **changes}
    output = model.generate(prompts, **settings)
    return output.sequences, torch.stack(output.logits, dim=1)


def steered_at(trace) -> list[set[tuple[int, int]]]:
    """Rows and positions that were steered, run by run."""
    table = trace.to_dataframe()
    if len(table) == 0:
        return []
    return [set(zip(run["row"], run["position"], strict=True)) for _, run in table.groupby("run")]


@pytest.fixture(scope="module")
def markers(tiny_models):
    """The second token that each row generates unsteered, but for those of the prompts."""
    tokens = greedy(tiny_models["hooked"], PROMPTS)[0]
    return sorted(set(tokens[:, 1 - NEW].tolist()) - set(tokens[:, :-NEW].flatten().tolist()))


# The scope for some of the rows, and whether it names position p of row r, whose tokens are t and
# whose prompt has n tokens. Both are told the markers.
KINDS = {
    "prompt": (lambda rows, m: sqs.scopes.PromptTokens(), lambda p, r, t, n, m: p < n),
    "last prompt tokens": (
        lambda rows, m: sqs.scopes.LastPromptTokens(3),
        lambda p, r, t, n, m: n - 3 <= p < n,
    ),
    "first response tokens": (
        lambda rows, m: sqs.scopes.FirstResponseTokens(2),
        lambda p, r, t, n, m: n <= p < n + 2,
    ),
    "window": (lambda rows, m: sqs.scopes.Window(1, 5), lambda p, r, t, n, m: 1 <= p < 5),
    "around the prompt's end": (
        lambda rows, m: sqs.scopes.WindowAroundPromptEnd(-2, 2),
        lambda p, r, t, n, m: n - 2 <= p < n + 2,
    ),
    "positions": (
        lambda rows, m: sqs.scopes.AtPositions([0, 3, 7]),
        lambda p, r, t, n, m: p in (0, 3, 7),
    ),
    "positions by row": (
        lambda rows, m: sqs.scopes.AtPositions([AT[r] for r in rows]),
        lambda p, r, t, n, m: p in AT[r],
    ),
    "mask": (
        lambda rows, m: sqs.scopes.RowMask(MASK[rows]),
        lambda p, r, t, n, m: p < 9 and bool(MASK[r, p]),
    ),
    "after a token": (
        lambda rows, m: sqs.scopes.AfterToken(m),
        lambda p, r, t, n, m: bool(set(t[:p]) & set(m)),
    ),
    "from a token on": (
        lambda rows, m: sqs.scopes.AfterToken(m, inclusive=True),
        lambda p, r, t, n, m: bool(set(t[: p + 1]) & set(m)),
    ),
    "intersection": (
        lambda rows, m: (
            sqs.scopes.ResponseTokens() & ~sqs.scopes.AfterToken(m) & sqs.scopes.Window(3)
        ),
        lambda p, r, t, n, m: p >= max(n, 3) and not set(t[:p]) & set(m),
    ),
    "complement": (
        lambda rows, m: ~(sqs.LastPromptToken() | sqs.scopes.AtPositions([0])),
        lambda p, r, t, n, m: p not in (0, n - 1),
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS)
few_kinds = pytest.mark.parametrize("kind", ["positions by row", "after a token", "intersection"])


def expected_at(kind, tokens, rows, markers, lengths=LENGTHS) -> set[tuple[int, int]]:
    """Rows and positions by the reference; the last token of a row is never read."""
    names = KINDS[kind][1]
    return {
        (row, p)
        for row, number in enumerate(rows)
        for own in [tokens[row, -(lengths[number] + NEW) :].tolist()]
        for p in range(len(own) - 1)
        if names(p, number, own, lengths[number], markers)
    }


@kinds
def test_cache_on_equals_cache_off_and_a_padded_batch_equals_its_rows(model, kind, markers):
    make, rows = KINDS[kind][0], [0, 1, 2]
    with shove(model, make(rows, markers)).apply(model, record=True) as trace:
        tokens, logits = greedy(model, PROMPTS)
        without_cache = greedy(model, PROMPTS, use_past_kv_cache=False)
        again = greedy(model, PROMPTS)
    expected = expected_at(kind, tokens, rows, markers)
    assert expected, "a scope that names nothing shows nothing"
    assert steered_at(trace) == [expected] * 3
    assert torch.equal(tokens, without_cache[0])
    torch.testing.assert_close(logits, without_cache[1], rtol=0, atol=1e-4)
    assert torch.equal(again[1], logits), "the second call did not start afresh"
    assert not torch.allclose(logits, greedy(model, PROMPTS)[1], atol=1e-2)
    for row, prompt in enumerate(PROMPTS):
        with shove(model, make([row], markers)).apply(model, record=True) as alone:
            own_tokens, own_logits = greedy(model, prompt)
        own = {(0, p) for r, p in expected if r == row}
        assert steered_at(alone) == ([own] if own else [])
        assert torch.equal(tokens[row, -NEW:], own_tokens[0, -NEW:])
        torch.testing.assert_close(logits[row], own_logits[0], rtol=0, atol=1e-4)


@few_kinds
def test_generate_stream_and_prompts_as_text_lists_or_tokens_agree(model, kind, markers):
    make, prompt = KINDS[kind][0], PROMPTS[2]
    tokens = model.to_tokens(prompt)
    with shove(model, make([2], markers)).apply(model, record=True) as trace:
        expected = greedy(model, prompt)[0]
        for same in ([prompt], tokens):
            assert torch.equal(greedy(model, same)[0], expected)
        for cache in (True, False):
            parts = model.generate_stream(
                tokens, max_tokens_per_yield=2, use_past_kv_cache=cache, **GREEDY
            )
            assert torch.equal(torch.cat(list(parts), dim=1), expected)
    own = expected_at(kind, expected, [2], markers)
    assert steered_at(trace) == [own] * 5


def new_cache(model):
    if isinstance(model, TransformerBridge):
        return DynamicCache()
    return TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 1)


def read(model, tokens, cache):
    """Logits of the last column of a forward pass with a cache."""
    if isinstance(cache, DynamicCache):
        return model(tokens, past_key_values=cache, use_cache=True)[:, -1]
    return model(tokens, past_kv_cache=cache)[:, -1]


@few_kinds
def test_a_hand_written_loop_agrees_with_generate_and_the_next_one_starts_afresh(
    model, kind, markers
):
    prompt = PROMPTS[2]
    steerer = shove(model, KINDS[kind][0]([2], markers))
    with steerer.apply(model):
        expected = greedy(model, prompt)[0]
    own = expected_at(kind, expected, [2], markers)
    with steerer.apply(model, record=True, prompt_lengths=6) as trace, torch.no_grad():
        for _ in range(2):
            tokens = new = model.to_tokens(prompt)
            cache = new_cache(model)
            for _ in range(NEW):
                new = read(model, new, cache).argmax(-1, keepdim=True)
                tokens = torch.cat([tokens, new], dim=1)
            assert torch.equal(tokens, expected)
    assert steered_at(trace) == [own] * 2
    with steerer.apply(model, prompt_lengths=6), torch.no_grad():
        tokens = model.to_tokens(prompt)
        for _ in range(NEW):  # without a cache: whole rows
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, expected)


def test_two_hand_written_loops_in_turns_keep_their_own_tokens_apart(model, markers):
    scope = sqs.scopes.AfterToken(markers, inclusive=True)
    expected, loops = [], []
    with shove(model, scope).apply(model):
        for prompt in (PROMPTS[0], PROMPTS[2]):
            expected.append(greedy(model, prompt)[0])
    with shove(model, scope).apply(model), torch.no_grad():
        for prompt in (PROMPTS[0], PROMPTS[2]):
            tokens = model.to_tokens(prompt)
            loops.append([tokens, tokens, new_cache(model)])
        for loop in (loops[turn] for turn in (0, 1, 1, 0, 0, 0, 1, 1, 0, 1)):
            loop[1] = read(model, loop[1], loop[2]).argmax(-1, keepdim=True)
            loop[0] = torch.cat([loop[0], loop[1]], dim=1)
    for loop, tokens in zip(loops, expected, strict=True):
        assert torch.equal(loop[0], tokens)


def test_a_prompt_that_is_read_in_pieces_has_its_tokens(model):
    tokens = model.to_tokens(PROMPTS[2])
    scope = sqs.scopes.AfterToken(int(tokens[0, 2]))
    with shove(model, scope).apply(model, record=True) as trace, torch.no_grad():
        cache = new_cache(model)
        for piece in (tokens[:, :3], tokens[:, 3:5], tokens[:, 5:]):
            read(model, piece, cache)
    assert steered_at(trace) == [{(0, 3), (0, 4), (0, 5)}]


@pytest.mark.parametrize("inside", [True, False])
def test_a_cache_that_is_cut_back_keeps_the_tokens_before_the_cut(model, inside):
    tokens, cache, seen = model.to_tokens(PROMPTS[2]), new_cache(model), []

    def watch(positions):
        seen.append(None if positions.tokens is None else positions.tokens.tolist())
        return positions.index == 0

    with torch.no_grad():
        if not inside:
            read(model, tokens[:, :1], cache)
        with shove(model, watch).apply(model):
            read(model, tokens[:, (0 if inside else 1) :], cache)
            if isinstance(cache, DynamicCache):
                cache.crop(-5)  # of 6 columns
            else:
                for entry in cache.entries:
                    entry.past_keys = entry.past_keys[:, :1]
                    entry.past_values = entry.past_values[:, :1]
                cache.previous_attention_mask = cache.previous_attention_mask[:, :1]
            read(model, torch.tensor([[9, 10]]), cache)
    whole, after = tokens.tolist(), [[int(tokens[0, 0]), 9, 10]]
    assert seen == ([whole, after] if inside else [None] * 2), "asked once a pass"


@pytest.mark.parametrize("record", [False, True])
def test_a_marker_raises_where_the_cache_was_begun_outside(model, record):
    tokens, cache = model.to_tokens(PROMPTS[0]), new_cache(model)
    with torch.no_grad():
        read(model, tokens, cache)
        with (
            shove(model, sqs.scopes.AfterToken(5)).apply(model, record=record),
            pytest.raises(ValueError, match=r"begin the KV cache inside apply\(\)"),
        ):
            model(tokens)  # another row, whose tokens are no concern of the cached one
            read(model, tokens[:, :1], cache)


def test_a_marker_that_is_also_padding_counts_only_where_it_is_real(model):
    pad = model.tokenizer.pad_token_id
    with shove(model, sqs.scopes.AfterToken(pad) | sqs.scopes.AtPositions([0])).apply(
        model, record=True
    ) as trace:
        tokens = greedy(model, PROMPTS)[0]
    after = {
        (r, p)
        for r, n in enumerate(LENGTHS)
        for own in [tokens[r, -(n + NEW) :].tolist()]
        for p in range(len(own) - 1)
        if pad in own[:p] or p == 0
    }
    assert steered_at(trace) == [after]


def test_a_users_function_sees_the_tokens_of_its_rows(model):
    seen = []

    def watch(positions):
        seen.append(positions.tokens.tolist())
        return positions.index == 0

    with shove(model, watch).apply(model):
        tokens = greedy(model, PROMPTS[:2])[0]
    first = model.to_tokens(PROMPTS[0])[0].tolist()
    assert seen[0] == [first, [*model.to_tokens(PROMPTS[1])[0].tolist(), -1, -1]]
    assert seen[-1][0] == tokens[0, :-1].tolist()


def test_plain_pairs_read_tokens_that_they_are_given(model):
    tokens = model.to_tokens(PROMPTS[2])
    steerer = shove(model, sqs.scopes.AfterToken(int(tokens[0, 2])))
    with steerer.apply(model):
        expected = model(tokens)
    pairs = steerer.fwd_hooks(model, tokens=tokens)
    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=pairs), expected)
    assert not torch.allclose(model(tokens), expected)
    with pytest.raises(ValueError, match=r"and pass tokens=\[batch pos\] to fwd_hooks\(\)$"):
        model.run_with_hooks(tokens, fwd_hooks=steerer.fwd_hooks(model))


@kinds
def test_a_forward_pass_outside_generate_needs_prompt_lengths_where_the_scope_does(
    model, kind, markers
):
    steerer = shove(model, KINDS[kind][0]([2], markers))
    tokens = model.to_tokens(PROMPTS[2])
    relative = ("prompt", "last prompt tokens", "first response tokens", "around the prompt's end")
    with steerer.apply(model):
        if kind in (*relative, "intersection", "complement"):
            with pytest.raises(ValueError, match=r"pass prompt_lengths=\[\.\.\.\]"):
                model(tokens)
        else:
            model(tokens)


@pytest.mark.parametrize(
    "scope", [sqs.scopes.AtPositions([[1], [2]]), sqs.scopes.RowMask(MASK[:2])], ids=repr
)
def test_other_rows_than_those_of_the_scope_are_refused_before_a_token_is_generated(model, scope):
    text = f"{scope!r} is for 2 rows, the batch has 3: give all prompts in one call of generate()"
    generated = []
    with (
        shove(model, scope).apply(model),
        model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", lambda x, hook: generated.append(1))]),
        pytest.raises(ValueError, match=re.escape(text)),
    ):
        greedy(model, PROMPTS)
    assert generated == []
