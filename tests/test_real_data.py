"""The chain on a real pretrained model and real texts; skipped where they are absent."""

import pytest
import torch
from conftest import HOSTS

import sae_query_steer as sqs
from sae_query_steer.data.tokenized import tokenize_example

pytestmark = [
    pytest.mark.slow,
    # 35 of the 600 questions end in a space; these tests read them as they are.
    pytest.mark.filterwarnings("ignore:.* prompts end in white space:UserWarning"),
]

PROMPTS = ["Once upon a time, there was", "Lily", "The big dog said that"]
GREEDY = {"max_new_tokens": 12, "do_sample": False, "verbose": False}
SCOPES = [
    sqs.scopes.EveryPosition(),
    sqs.LastPromptToken(),
    sqs.scopes.ResponseTokens(),
    sqs.LastPromptToken() | sqs.scopes.ResponseTokens(),
]


@pytest.fixture(scope="module")
def questions(shared_data) -> list[sqs.LabelledExample]:
    """The exam questions of Yahya (2012), 100 for each Bloom level."""
    return sqs.read_examples(
        shared_data / "bloom_yahya2012" / "yahya-2012.csv",
        prompt="QUESTION",
        label="BT LEVEL",
        parse_label=sqs.BloomLevel.parse,
    )


@pytest.fixture(scope="module")
def feedback(shared_data) -> list[sqs.LabelledExample]:
    """Human feedback on students' answers; the first 60 of them."""
    return sqs.read_examples(
        shared_data / "feedback_saf" / "saf.jsonl",
        prompt="Question: {question}\nFeedback:\n",
        response="response_feedback",
        label="verification_feedback",
        where={"lang": "english"},
    )[:60]


@pytest.fixture(scope="module")
def stories_saes(stories, questions, feedback) -> sqs.QuerySAEs:
    model = stories["bridge"]
    return sqs.train_query_saes(
        model,
        [e.prompt for e in questions] + [e.prompt + e.response for e in feedback],
        sqs.query_sites(model, [1, 3]),
        sqs.TrainingConfig(
            sae=sqs.sae.TopK(d_sae_per_head=32, k=6),
            training_tokens=60_000,
            train_batch_size_tokens=512,
            lr=3e-3,
        ),
    )


@pytest.fixture(scope="module")
def bloom_targets(stories, stories_saes, questions) -> sqs.CentroidTargets:
    return sqs.CentroidTargetBuilder(stories["bridge"], stories_saes).fit(
        sqs.tokenize_examples(stories["bridge"], questions)
    )


def steerer(saes, targets, scope) -> sqs.LatentGradientSteerer:
    return sqs.LatentGradientSteerer(
        saes,
        targets,
        target=sqs.BloomLevel.CREATE,
        objective=sqs.PrototypeLogLikelihood(),
        n_steps=20,
        step_size=0.5,
        scope=scope,
    )


def generate(model, prompts, **changes):
    output = model.generate(prompts, return_type="tokens", output_logits=True, **GREEDY | changes)
    return output.sequences, torch.stack(output.logits, dim=1)


def test_a_short_training_explains_most_of_the_real_queries(stories_saes):
    assert (stories_saes.metrics["explained_variance"] > 0.5).all()
    assert stories_saes.metrics["explained_variance"].mean() > 0.75
    assert (stories_saes.metrics["l0"] <= 6).all()
    assert len(stories_saes.metrics) == 2 * 8


def test_prompts_are_read_as_the_hosts_read_them(stories, questions):
    for example in questions[::60]:
        ours = tokenize_example(stories["bridge"], example)
        for host in HOSTS:
            theirs = stories[host].to_tokens(example.prompt)[0]
            assert torch.equal(ours.tokens[: ours.prompt_length], theirs)


@pytest.mark.parametrize("scope", SCOPES, ids=repr)
def test_hosts_agree_and_the_cache_changes_nothing(stories, stories_saes, bloom_targets, scope):
    steer = steerer(stories_saes, bloom_targets, scope)
    results = []
    for host in HOSTS:
        model = stories[host]
        with steer.apply(model):
            results.append(generate(model, PROMPTS))
            results.append(generate(model, PROMPTS, use_past_kv_cache=False))
    for tokens, logits in results[1:]:
        assert torch.equal(tokens, results[0][0])
        torch.testing.assert_close(logits, results[0][1], rtol=0, atol=1e-4)
    plain = generate(stories["bridge"], PROMPTS)[1]
    n = min(plain.shape[1], results[0][1].shape[1])
    assert (plain[:, :n] - results[0][1][:, :n]).abs().max() > 1e-2


def test_bloom_levels_of_real_questions_are_six_classes_with_checks_by_site(
    stories, stories_saes, bloom_targets, questions
):
    model = stories["bridge"]
    assert bloom_targets.classes == tuple(level.value for level in sqs.BloomLevel)
    assert bloom_targets.counts.tolist() == [100] * 6
    tokenized = sqs.tokenize_examples(model, questions)
    apart = sqs.diagnostics.separability(model, stories_saes, tokenized)
    moved = sqs.diagnostics.interchange_effect(
        model, sqs.query_sites(model, [1, 3]), tokenized, n_pairs=12, per_head=False
    )
    assert apart["chance"].tolist() == pytest.approx([1 / 6] * len(apart))
    assert (apart["n_test"] == 300).all()
    assert (moved["kl"] > 1e-3).all()


def test_feedback_is_read_over_its_response_tokens(stories, stories_saes, feedback):
    model = stories["bridge"]
    tokenized = sqs.tokenize_examples(model, feedback, span=sqs.scopes.ResponseTokens())
    targets = sqs.CentroidTargetBuilder(model, stories_saes).fit(tokenized)
    assert int(targets.counts.sum()) == sum(e.response_length for e in tokenized)


def test_the_trace_says_how_far_a_steer_towards_a_level_came(stories, stories_saes, bloom_targets):
    steer = steerer(stories_saes, bloom_targets, sqs.LastPromptToken())
    with steer.apply(stories["bridge"], record=True) as trace:
        stories["bridge"].generate(PROMPTS, **GREEDY)
    table = trace.to_dataframe()
    assert len(table) == 3 * 2 * 8
    before, after = ((table[f"nearest_{when}"] == "create").mean() for when in ("before", "after"))
    assert before < 0.3
    assert after > before + 0.2
    assert (table["loss_after"] < table["loss_before"]).all()
