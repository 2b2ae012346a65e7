"""Continuations and how likely they are, against a loop over plain transformers."""

from dataclasses import replace

import pytest
import torch
from conftest import HOSTS, on_both_hosts
from transformers import AutoModelForCausalLM, AutoTokenizer
from wheel_check import WORDS

import sae_query_steer as sqs
from sae_query_steer.compare.generation import (
    _behind_cache,
    _most_copies,
    batch_of,
    continuations,
    continuations_side_by_side,
)
from sae_query_steer.compare.likelihoods import divergences, negative_log_likelihoods
from sae_query_steer.learning import no_moves
from sae_query_steer.models.prefix import PrefixedRows, PromptCaches

PROMPTS = ["w1 w20 w33", "w5", "w40 w41 w2 w17 w9", "w13 w30"]
BOS, EOS, N_SPECIAL = 1, 2, 4


def ids_of(text: str) -> list[int]:
    return [BOS, *(N_SPECIAL + WORDS.index(word) for word in text.split())]


@torch.no_grad()
def written_alone(hf, prompt: str, n: int, *, bos: bool = True) -> list[int]:
    """Greedy tokens from whole forward passes over one row, without padding or cache."""
    ids, new = ids_of(prompt)[not bos :], []
    while len(new) < n and new[-1:] != [EOS]:
        new.append(int(hf(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


@pytest.fixture(scope="module")
def ending(tiny_folder, tmp_path_factory):
    """The tiny model, made to end soon after the first prompt: plain, and on both hosts."""
    hf = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    third = written_alone(hf, PROMPTS[0], 3)[2]
    with torch.no_grad():
        hf.lm_head.weight[[EOS, third]] = hf.lm_head.weight[[third, EOS]]
    folder = tmp_path_factory.mktemp("ending") / "ending-llama"
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"plain": hf, **on_both_hosts(folder)}


@pytest.fixture
def make(saes, targets):
    """Make a steerer that visibly changes the tiny model, with some settings changed."""

    def make(**changes) -> sqs.LatentGradientSteerer:
        settings = {
            "target": "create",
            "objective": sqs.SquaredDistance(),
            "n_steps": 4,
            "step_size": 0.5,
        }
        return sqs.LatentGradientSteerer(saes, targets, **{**settings, **changes})

    return make


@pytest.mark.parametrize("batch_size", [1, 3, 256])
@pytest.mark.parametrize("host", HOSTS)
def test_each_continuation_is_what_transformers_writes_after_that_prompt_alone(
    ending, host, batch_size
):
    made = continuations(ending[host], PROMPTS, max_new_tokens=7, batch_size=batch_size)
    expected = [written_alone(ending["plain"], prompt, 7) for prompt in PROMPTS]
    assert [row.tolist() for row in made.tokens] == expected
    words = [[WORDS[i - N_SPECIAL] for i in row if i >= N_SPECIAL] for row in expected]
    assert [text.split() for text in made.texts] == words
    assert all(words)


@pytest.mark.parametrize("host", HOSTS)
def test_a_model_whose_prompts_begin_without_bos_is_read_so(ending, host, monkeypatch):
    monkeypatch.setattr(ending[host].cfg, "default_prepend_bos", False)
    made = continuations(ending[host], PROMPTS, max_new_tokens=4)
    expected = [written_alone(ending["plain"], prompt, 4, bos=False) for prompt in PROMPTS]
    assert [row.tolist() for row in made.tokens] == expected
    (found,) = negative_log_likelihoods(ending[host], PROMPTS[:1], [torch.tensor([9])])
    with torch.no_grad():
        logits = ending["plain"](torch.tensor([ids_of(PROMPTS[0])[1:]])).logits[0, -1]
    assert found == pytest.approx(-float(logits.log_softmax(-1)[9]), rel=1e-4)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("bos", [False, True])
def test_prepend_bos_overrides_the_setting_of_the_model(ending, host, bos, monkeypatch):
    monkeypatch.setattr(ending[host].cfg, "default_prepend_bos", not bos)
    made = continuations(ending[host], PROMPTS, max_new_tokens=4, prepend_bos=bos)
    expected = [written_alone(ending["plain"], prompt, 4, bos=bos) for prompt in PROMPTS]
    assert [row.tolist() for row in made.tokens] == expected


@pytest.mark.parametrize("host", HOSTS)
def test_eos_ends_a_continuation_and_stands_in_its_tokens_but_not_in_its_text(ending, host):
    made = continuations(ending[host], PROMPTS, max_new_tokens=7)
    lengths = [len(row) for row in made.tokens]
    assert lengths[0] == 3
    assert max(lengths) == 7
    assert made.tokens[0].tolist().index(EOS) == 2
    for row, text in zip(made.tokens, made.texts, strict=True):
        assert EOS not in row[:-1]
        assert "</s>" not in text


@pytest.mark.parametrize("host", HOSTS)
def test_a_continuation_is_no_longer_than_it_may_be(ending, host):
    made = continuations(ending[host], PROMPTS, max_new_tokens=2)
    longer = continuations(ending[host], PROMPTS, max_new_tokens=5)
    for short, long in zip(made.tokens, longer.tokens, strict=True):
        assert short.tolist() == long[:2].tolist()


def test_without_a_steerer_nothing_has_changed(model):
    assert continuations(model, PROMPTS, max_new_tokens=2).relative_changes == [0, 0, 0, 0]


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_the_relative_change_of_a_prompt_is_the_mean_of_its_trace(model, make, batch_size):
    steerer = make(heads=[0, 3])
    made = continuations(
        model, PROMPTS, max_new_tokens=3, steerer=steerer, batch_size=batch_size
    ).relative_changes
    with steerer.apply(model, record=True) as trace:
        for prompt in PROMPTS:
            model.generate(
                prompt, max_new_tokens=3, do_sample=False, prepend_bos=True, verbose=False
            )
    table = trace.to_dataframe()
    assert len(table) == 4 * 2 * 2, "4 prompts, 2 layers, 2 heads"
    expected = table.groupby("run")["relative_change"].mean().tolist()
    assert len(set(expected)) == 4
    assert min(expected) > 0.01
    assert made == pytest.approx(expected, rel=1e-3)


def test_a_batch_is_steered_as_each_prompt_alone(model, make):
    steerer = make(objective=sqs.objectives.CentroidContrast(), step_size=4.0)
    together = continuations(model, PROMPTS, max_new_tokens=6, steerer=steerer)
    alone = [continuations(model, [p], max_new_tokens=6, steerer=steerer) for p in PROMPTS]
    assert together.texts == [one.texts[0] for one in alone]
    for row, one in zip(together.tokens, alone, strict=True):
        assert torch.equal(row, one.tokens[0])
    assert together.texts != continuations(model, PROMPTS, max_new_tokens=6).texts


@pytest.mark.parametrize(
    "scope",
    [
        None,
        sqs.scopes.LastPromptToken(),
        sqs.scopes.LastPromptToken() | sqs.scopes.ResponseTokens(),
        sqs.scopes.EveryPosition(),  # acts on the prompt: not from its cache
    ],
)
def test_prompts_that_ran_once_are_continued_like_whole_prompts(model, make, scope):
    steerer = None if scope is None else make(scope=scope, step_size=2.0)
    caches = PromptCaches(model, 2**30)
    whole = continuations(model, PROMPTS, max_new_tokens=6, steerer=steerer)
    for _ in range(2):  # made, then kept
        kept = continuations(model, PROMPTS, max_new_tokens=6, steerer=steerer, caches=caches)
        assert [row.tolist() for row in kept.tokens] == [row.tolist() for row in whole.tokens]
        assert kept.relative_changes == pytest.approx(whole.relative_changes, rel=1e-4)
    expected = negative_log_likelihoods(model, PROMPTS, whole.tokens)
    assert negative_log_likelihoods(model, PROMPTS, whole.tokens, caches=caches) == pytest.approx(
        expected, rel=1e-4
    )


def test_a_logit_bias_acts_behind_kept_prompts_too(model):
    bias = sqs.baselines.LogitBias({"a": ["w7"]}, target="a", bias=50.0)
    caches = PromptCaches(model, 2**30)
    whole = continuations(model, PROMPTS, max_new_tokens=3, steerer=bias)
    kept = continuations(model, PROMPTS, max_new_tokens=3, steerer=bias, caches=caches)
    assert kept.texts == whole.texts
    assert all(text.split()[0] == "w7" for text in kept.texts)


@pytest.mark.parametrize("host", HOSTS)
def test_a_row_that_ends_early_is_cut_behind_kept_prompts_too(ending, host):
    caches = PromptCaches(ending[host], 2**30)
    whole = continuations(ending[host], PROMPTS, max_new_tokens=7)
    kept = continuations(ending[host], PROMPTS, max_new_tokens=7, caches=caches)
    assert [row.tolist() for row in kept.tokens] == [row.tolist() for row in whole.tokens]


def test_what_may_exceed_the_context_runs_as_a_whole(model):
    caches, n_ctx = PromptCaches(model, 2**30), int(model.cfg.n_ctx)
    longest = len(ids_of(PROMPTS[2]))
    assert _behind_cache(model, PROMPTS, None, n_ctx - longest, None, caches) is not None
    assert _behind_cache(model, PROMPTS, None, n_ctx - longest + 1, None, caches) is None


@pytest.mark.parametrize("scope", [sqs.LastPromptToken(), sqs.scopes.EveryPosition()])
def test_a_sampled_text_behind_kept_prompts_is_that_of_its_seed(model, make, scope):
    sampling = {"max_new_tokens": 6, "temperature": 1.3, "seeds": SEEDS}
    caches = PromptCaches(model, 2**30)
    for steerer in (None, make(scope=scope, step_size=2.0)):
        whole = continuations(model, PROMPTS, steerer=steerer, **sampling)
        for _ in range(2):  # made, then kept
            kept = continuations(model, PROMPTS, steerer=steerer, caches=caches, **sampling)
            assert [row.tolist() for row in kept.tokens] == [row.tolist() for row in whole.tokens]


def test_kept_caches_stay_within_their_bytes(model):
    size = PromptCaches(model, 2**30).rows(batch_of(model, PROMPTS, [torch.tensor([5])] * 4, None))
    caches = PromptCaches(model, 2 * size.n_bytes + 1)
    for order in (PROMPTS, PROMPTS[::-1], PROMPTS[1:] + PROMPTS[:1], PROMPTS):
        continuations(model, order, max_new_tokens=2, caches=caches)
    assert len(caches._kept) == 2
    assert sum(rows.n_bytes for rows in caches._kept.values()) <= 2 * size.n_bytes + 1


def test_caches_that_do_not_fit_are_made_anew(model):
    caches = PromptCaches(model, 0)
    whole = continuations(model, PROMPTS, max_new_tokens=3)
    assert continuations(model, PROMPTS, max_new_tokens=3, caches=caches).texts == whole.texts
    assert not caches._kept


def hooks_of(model) -> list[int]:
    modules = [*model.hook_dict.values(), *model.blocks, model.embed]
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]


def test_no_hook_and_no_attribute_is_left_behind(model, make):
    before = hooks_of(model), set(vars(model)), torch.get_rng_state()
    made = continuations(model, PROMPTS, max_new_tokens=2, steerer=make())
    negative_log_likelihoods(model, PROMPTS, made.tokens)
    assert hooks_of(model) == before[0]
    assert set(vars(model)) == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("size", ["max_new_tokens", "batch_size"])
def test_a_size_below_one_is_refused(model, size):
    with pytest.raises(ValueError, match=f"{size} must be a whole number >= 1, got 0"):
        continuations(model, ["w1"], **({"max_new_tokens": 4} | {size: 0}))


def some_tokens() -> list[torch.Tensor]:
    """Tokens after each prompt, of different lengths: one row ends in EOS, one holds a single."""
    return [torch.tensor(row) for row in ([30, 9, EOS], [17], [5, 40, 8, 22, 51], [11, 6])]


@pytest.mark.parametrize("batch_size", [1, 3, 256])
@pytest.mark.parametrize("host", HOSTS)
def test_the_likelihood_is_that_of_a_loop_over_transformers_logits_on_each_row_alone(
    ending, host, batch_size
):
    sums = []
    for prompt, tokens in zip(PROMPTS, some_tokens(), strict=True):
        context, losses = ids_of(prompt), []
        for token in tokens.tolist():
            with torch.no_grad():
                logits = ending["plain"](torch.tensor([context])).logits[0, -1].double()
            losses.append(float(logits.logsumexp(0) - logits[token]))
            context.append(token)
        sums.append(sum(losses))
    found = negative_log_likelihoods(ending[host], PROMPTS, some_tokens(), batch_size=batch_size)
    assert found == pytest.approx(sums, rel=1e-4)


def test_the_greedy_first_token_is_the_likeliest_of_all(model):
    greedy = continuations(model, PROMPTS, max_new_tokens=1).tokens
    best = sum(negative_log_likelihoods(model, PROMPTS, greedy))
    others = [
        sum(negative_log_likelihoods(model, PROMPTS, [torch.tensor([token])] * len(PROMPTS)))
        for token in range(0, 52, 5)
    ]
    assert best < min(others)


def test_prompts_without_their_tokens_are_refused(model):
    with pytest.raises(ValueError, match="shorter"):
        negative_log_likelihoods(model, PROMPTS, some_tokens()[:3])


SEEDS = [5, 8, 5, 13]


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_a_sampled_text_is_its_prompts_and_its_seeds_alone(model, batch_size):
    sampling = {"max_new_tokens": 6, "temperature": 1.3}
    made = continuations(model, PROMPTS, seeds=SEEDS, batch_size=batch_size, **sampling)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        alone = continuations(model, [prompt], seeds=[seed], **sampling)
        assert torch.equal(alone.tokens[0], made.tokens[row])
        assert alone.texts[0] == made.texts[row]
    reversed_ = continuations(model, PROMPTS[::-1], seeds=SEEDS[::-1], batch_size=3, **sampling)
    assert reversed_.texts[::-1] == made.texts
    others = continuations(model, PROMPTS, seeds=[s + 1 for s in SEEDS], **sampling)
    greedy = continuations(model, PROMPTS, max_new_tokens=6)
    for row in range(len(PROMPTS)):
        assert len({made.texts[row], others.texts[row], greedy.texts[row]}) == 3


def test_the_temperature_reaches_the_draw_and_a_low_one_is_greedy(model):
    cold, warm, hot = (
        continuations(model, PROMPTS, max_new_tokens=6, temperature=t, seeds=SEEDS).texts
        for t in (1e-4, 1.0, 50.0)
    )
    assert cold == continuations(model, PROMPTS, max_new_tokens=6).texts
    assert warm not in (cold, hot)


def test_a_sampled_batch_is_steered_as_each_prompt_alone(model, make):
    steerer = make(objective=sqs.objectives.CentroidContrast(), step_size=4.0)
    sampling = {"max_new_tokens": 6, "temperature": 0.8, "steerer": steerer}
    together = continuations(model, PROMPTS, seeds=SEEDS, **sampling)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        alone = continuations(model, [prompt], seeds=[seed], **sampling)
        assert alone.texts == together.texts[row : row + 1]
        assert alone.relative_changes == pytest.approx(
            together.relative_changes[row : row + 1], rel=1e-3
        )
    assert min(together.relative_changes) > 0.01


@pytest.mark.parametrize(
    "given", [{"temperature": 1.0}, {"seeds": [1, 2]}, {"temperature": 1.0, "seeds": [1, 2]}]
)
def test_a_temperature_wants_one_seed_for_each_prompt(model, given):
    message = f"got temperature={given.get('temperature')} and .* for 4 prompts"
    with pytest.raises(ValueError, match=message):
        continuations(model, PROMPTS, max_new_tokens=2, **given)


@torch.no_grad()
@pytest.mark.parametrize("host", HOSTS)
def test_the_divergence_of_a_text_is_that_of_each_row_alone_steered_and_not(
    tiny_models, make, host
):
    model, tokens = tiny_models[host], some_tokens()
    steerer = make()
    found = divergences(model, PROMPTS, tokens, steerer)
    for prompt, row, told in zip(PROMPTS, tokens, found, strict=True):
        ids = torch.cat([torch.tensor(ids_of(prompt)), row])[None]
        n = len(ids_of(prompt))
        at = slice(n - 1, n - 1 + len(row))
        bare = model(ids, prepend_bos=False)[0, at].log_softmax(-1)
        with steerer.apply(model, prompt_lengths=[n]):
            steered = model(ids, prepend_bos=False)[0, at].log_softmax(-1)
        kl = torch.nn.functional.kl_div(steered, bare, reduction="none", log_target=True)
        assert told == pytest.approx(float(kl.sum(-1).mean()), rel=1e-3, abs=1e-6)
    assert min(found) > 1e-4
    assert divergences(model, PROMPTS, tokens, make(n_steps=0)) == pytest.approx([0.0] * 4)


def test_a_divergence_without_a_text_is_refused(model, make):
    with pytest.raises(ValueError, match="shorter"):
        divergences(model, PROMPTS[:2], some_tokens()[:1], make())


def test_one_string_is_not_taken_for_prompts(model, untyped):
    with pytest.raises(TypeError, match="prompts must be a list of texts, .* got 'w1 w2'"):
        continuations(model, "w1 w2", max_new_tokens=2)


def steerers_for(model, make):
    """Steerers of every kind that can share passes, and one of each that can't."""
    width = model.cfg.d_model
    residual = {"blocks.1.hook_resid_post": sqs.sae.IdentityEncoder(n_heads=1, d_head=width)}
    moves = no_moves(model, residual, ["create", "apply"])
    direction = torch.linspace(-1, 1, width) * torch.tensor([1.0, -1.0])[:, None, None]
    offset = sqs.LatentGradientSteerer(
        residual,
        replace(moves, means={name: mean + direction for name, mean in moves.means.items()}),
        target=["create", "apply", "apply", "create"],
        objective=sqs.objectives.FixedMove(),
        n_steps=1,
        step_size=2.0,
    )
    both = sqs.LastPromptToken() | sqs.scopes.ResponseTokens()
    return [
        None,
        make(step_size=2.0),
        make(step_size=2.0, scope=both, target=["create", "apply", "create", "remember"]),
        make(step_size=1.0, scope=sqs.scopes.AfterToken(9), layers=[2], heads=[0, 3]),
        offset,
        sqs.steering.JoinedSteerers(make(step_size=2.0, layers=[0], scope=both), offset),
        make(step_size=2.0, scope=sqs.scopes.EveryPosition()),  # acts on the prompt
        sqs.baselines.LogitBias({"a": ["w7"]}, target="a", bias=50.0),
    ]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.3, "seeds": [5, 6, 7, 8]}])
def test_steerers_side_by_side_write_what_each_writes_alone(model, make, sampling, monkeypatch):
    steerers, caches = steerers_for(model, make), PromptCaches(model, 2**30)
    given = {"max_new_tokens": 6, **sampling}
    passes = []
    run = PrefixedRows._run

    def counted(self, tokens, *args, **kwargs):
        passes.append(tuple(tokens.shape))
        return run(self, tokens, *args, **kwargs)

    monkeypatch.setattr(PrefixedRows, "_run", counted)
    made = continuations_side_by_side(model, PROMPTS, steerers, caches=caches, **given)
    shared = type(model).__name__ == "TransformerBridge"
    assert ((4, 6) in passes) == shared, "6 copies of 4 prompts, one token each"
    texts = set()
    for steerer, found in zip(steerers, made, strict=True):
        alone = continuations(model, PROMPTS, steerer=steerer, **given)
        assert [row.tolist() for row in found.tokens] == [row.tolist() for row in alone.tokens]
        assert found.relative_changes == pytest.approx(alone.relative_changes, rel=1e-3)
        texts.add(tuple(alone.texts))
    assert len(texts) > 5, "the steerers differ"


def test_a_single_steerer_that_is_left_for_shared_passes_runs_alone(model, make):
    steerers = [make(step_size=2.0), make(step_size=2.0, scope=sqs.scopes.EveryPosition())]
    given = {"max_new_tokens": 4, "caches": PromptCaches(model, 2**30)}
    found = continuations_side_by_side(model, PROMPTS, steerers, **given)  # one acts on the prompt
    for steerer, one in zip(steerers, found, strict=True):
        alone = continuations(model, PROMPTS, steerer=steerer, max_new_tokens=4)
        assert [row.tolist() for row in one.tokens] == [row.tolist() for row in alone.tokens]


@pytest.mark.parametrize("max_bytes", [2**30, 0])
def test_rows_that_end_are_cut_and_not_counted_any_further(ending, max_bytes):
    model = ending["bridge"]
    encoders = sqs.sae.identity_encoders(sqs.query_sites(model, [1]))
    moves = no_moves(model, encoders, ["create", "apply"])
    both = sqs.LastPromptToken() | sqs.scopes.ResponseTokens()
    small = {name: mean + torch.linspace(0, 0.01, 8) for name, mean in moves.means.items()}
    offset = sqs.LatentGradientSteerer(
        encoders,
        replace(moves, means=small),
        target="create",
        objective=sqs.objectives.FixedMove(),
        n_steps=1,
        step_size=1.0,
        scope=both,
    )
    steerers, caches = [None, offset, offset], PromptCaches(model, max_bytes)
    found = continuations_side_by_side(model, PROMPTS, steerers, max_new_tokens=7, caches=caches)
    for i, prompt in enumerate(PROMPTS):
        for steerer, together in zip(steerers, found, strict=True):
            alone = continuations(model, [prompt], max_new_tokens=7, steerer=steerer)
            assert together.tokens[i].tolist() == alone.tokens[0].tolist()
            expected = pytest.approx(alone.relative_changes[0], rel=1e-4)
            assert together.relative_changes[i] == expected
    assert len(set(map(len, found[1].tokens))) > 1, "some rows end before others"


def test_a_hook_of_the_user_that_does_not_know_copies_is_heeded(tiny_models, make):
    model, caches = tiny_models["bridge"], PromptCaches(tiny_models["bridge"], 2**30)
    steerers = [None, make(step_size=2.0), None]
    given = {"max_new_tokens": 4, "caches": caches}
    continuations_side_by_side(model, PROMPTS, steerers, **given)

    def last(activation, hook):
        del hook
        activation = activation.clone()
        activation[:, -1] += 3 * torch.linspace(-1, 1, activation.shape[-1])
        return activation

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", last)]):
        found = continuations_side_by_side(model, PROMPTS, steerers, **given)
        for steerer, one in zip(steerers, found, strict=True):
            alone = continuations(model, PROMPTS, steerer=steerer, **given)
            assert [row.tolist() for row in one.tokens] == [row.tolist() for row in alone.tokens]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": 1.0}, "given together"),
        ({"temperature": -1.0, "seeds": [1, 2, 3, 4]}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_wrong_arguments_are_refused_side_by_side_too(tiny_models, wrong, message):
    model = tiny_models["bridge"]
    given = {"max_new_tokens": 2, "caches": PromptCaches(model, 0)} | wrong
    with pytest.raises(ValueError, match=message):
        continuations_side_by_side(model, PROMPTS, [None, None], **given)
    with pytest.raises(TypeError, match="steerer"):
        continuations_side_by_side(
            model, PROMPTS, ["x"], max_new_tokens=2, caches=PromptCaches(model, 0)
        )


def test_copies_fit_into_the_memory_the_context_and_the_window(tiny_models, monkeypatch):
    model = tiny_models["bridge"]
    rows = _behind_cache(model, PROMPTS, None, 5, None, PromptCaches(model, 2**30))
    width = len(ids_of(PROMPTS[2])) - 1
    assert _most_copies(rows, 5, 2**40) == 8
    one = 5 * rows.n_bytes // width + 8 * 4 * model.cfg.d_vocab
    assert _most_copies(rows, 5, 3 * one + 1) == 3
    assert _most_copies(rows, 5, one - 1) == 0
    monkeypatch.setattr(model.original_model.config, "sliding_window", width + 13, raising=False)
    assert _most_copies(rows, 5, 2**40) == 2
    monkeypatch.setattr(model.original_model.config, "sliding_window", None)
    monkeypatch.setattr(model.cfg, "n_ctx", width + 6)
    assert _most_copies(rows, 5, 2**40) == 1
