"""Prompts in a chat template: read and continued as transformers does, on the bridge."""

import re

import pytest
import torch
from recipe_models import PUBLISHED, write_tiny
from transformers import AutoModelForCausalLM

import sae_query_steer as sqs
from sae_query_steer.compare.generation import continuations
from sae_query_steer.compare.interchange import interchange_methods
from sae_query_steer.compare.judges import RuleJudge
from sae_query_steer.compare.likelihoods import negative_log_likelihoods
from sae_query_steer.compare.methods import Method, SteeringCase
from sae_query_steer.compare.scorer import TextScorer
from sae_query_steer.data.prompts import chat_prompt
from sae_query_steer.data.tokenized import tokenize_example
from sae_query_steer.models.activations import read_activations
from sae_query_steer.models.loading import end_tokens

PROMPTS = ["w1 w2 w3 w4 w9 w12 w7 w8", "w7", "w30 w2 w44"]


@pytest.fixture(scope="module", params=list(PUBLISHED)[::2], ids=["mistral", "phi3"])
def chat(request, tmp_path_factory):
    """A tiny chat model on the bridge and in transformers, in 32 bits."""
    folder = write_tiny(request.param, tmp_path_factory.mktemp("chat") / "model")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return sqs.load_model(str(folder), device="cpu"), plain


def read(model, prompt):
    example = sqs.LabelledExample(prompt=prompt, label="none")
    return tokenize_example(model, example, chat_template=True).tokens


def written_alone(plain, tokens, n, **changes):
    made = plain.generate(tokens[None], max_new_tokens=n, do_sample=False, **changes)
    return made[0, len(tokens) :].tolist()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_chat_prompt_is_continued_as_transformers_does_after_its_tokens(chat, batch_size):
    model, plain = chat
    made = continuations(
        model, PROMPTS, max_new_tokens=6, batch_size=batch_size, chat_template=True
    )
    expected = [written_alone(plain, read(model, prompt), 6) for prompt in PROMPTS]
    assert [row.tolist() for row in made.tokens] == expected
    without = continuations(model, PROMPTS, max_new_tokens=6)
    assert [row.tolist() for row in without.tokens] != expected


def test_the_likelihood_is_that_after_the_chat_prompt(chat):
    model, plain = chat
    own = [torch.tensor([10, 11, 12]), torch.tensor([13]), torch.tensor([14, 15])]
    found = negative_log_likelihoods(model, PROMPTS, own, batch_size=2, chat_template=True)
    for prompt, tokens, loss in zip(PROMPTS, own, found, strict=True):
        before = read(model, prompt)
        with torch.no_grad():
            logits = plain(torch.cat([before, tokens])[None]).logits[0, len(before) - 1 : -1]
        scores = logits.log_softmax(-1).gather(1, tokens[:, None])
        assert loss == pytest.approx(-float(scores.sum()), rel=1e-4)


def test_a_turn_ends_at_each_token_that_the_generation_config_names(chat):
    model, plain = chat
    tokenizer = model.tokenizer
    before = plain.generation_config.eos_token_id
    long = written_alone(plain, read(model, PROMPTS[0]), 6, eos_token_id=-1)
    assert tokenizer.eos_token_id not in long
    config = model.original_model.generation_config
    try:
        config.eos_token_id = [tokenizer.eos_token_id, long[2]]
        assert end_tokens(model) == config.eos_token_id
        made = continuations(model, PROMPTS, max_new_tokens=6, chat_template=True)
    finally:
        config.eos_token_id = before
    assert made.tokens[0].tolist() == long[: long.index(long[2]) + 1]
    assert continuations(model, PROMPTS[:1], max_new_tokens=6, chat_template=True).tokens[
        0
    ].tolist() == written_alone(plain, read(model, PROMPTS[0]), 6)


def test_a_scorer_reads_its_cases_in_the_chat_template(chat):
    model, _ = chat
    cases = {"task": [SteeringCase(prompt=prompt, target="a") for prompt in PROMPTS]}
    judge = RuleJudge(lambda _prompt, _text: "a", ("a", "b"))
    unsteered = Method(name="unsteered")
    scorer = TextScorer(model, cases, judge, max_new_tokens=4, split="test", chat_template=True)
    outcome = scorer.score(unsteered, 0.0, ["task"])["task"]
    expected = continuations(model, PROMPTS, max_new_tokens=4, chat_template=True).texts
    assert list(outcome.texts) == expected
    assert outcome.perplexity_ratio == pytest.approx(1.0, rel=1e-5)
    own = [torch.tensor([10, 11, 12]), torch.tensor([13]), torch.tensor([14, 15])]
    losses = negative_log_likelihoods(model, PROMPTS, own, chat_template=True)
    assert scorer._mean_loss(PROMPTS, own) == pytest.approx(sum(losses) / 6)


def test_the_reference_reads_requesting_prompts_in_the_chat_template(chat):
    model, _ = chat
    cases = [
        SteeringCase(prompt=prompt, target="x", requesting=f"w5 {prompt}") for prompt in PROMPTS
    ]
    (method,) = interchange_methods(model, [[1]], chat_template=True)
    assert method.steerer is not None
    (found,) = method.steerer(cases, 0.0).edit.queries.values()
    for row, case in zip(found, cases, strict=True):
        tokens = read(model, case.requesting)[None]
        name = "blocks.1.attn.hook_q"
        torch.testing.assert_close(row, read_activations(model, tokens, [name])[name][0, -1])


def test_a_template_that_the_host_reads_otherwise_is_refused(chat, monkeypatch):
    model, _ = chat
    monkeypatch.setattr(model.cfg, "tokenizer_prepends_bos", False)
    text = chat_prompt("w7", model.tokenizer)
    message = f"the backend must read the chat prompt {text!r} as "
    with pytest.raises(ValueError, match=re.escape(message)):
        continuations(model, ["w7"], max_new_tokens=2, chat_template=True)


def test_without_a_template_the_tokenizer_is_named(tiny_models):
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        continuations(tiny_models["bridge"], ["w7"], max_new_tokens=2, chat_template=True)
