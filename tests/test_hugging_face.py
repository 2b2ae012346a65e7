"""The ways of Hugging Face to generate with the model inside a bridge: each is steered as ours."""

import pytest
import torch
from transformers import pipeline

import sae_query_steer as sqs
from sae_query_steer.scopes import ResponseTokens
from sae_query_steer.steering import AttentionSteerer, LookAt

PROMPTS = ["w1 w20 w33 w5", "w20 w33", "w40 w41 w20 w33 w9 w17"]
N_NEW = 6
WAYS = {
    "plain": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}
PLAIN = {"do_sample": False, "max_new_tokens": N_NEW, "min_new_tokens": N_NEW}


@pytest.fixture
def bridge(tiny_models):
    return tiny_models["bridge"]


@pytest.fixture(params=["descent", "attention"])
def steerer(request, saes, targets):
    scope = sqs.LastPromptToken() | ResponseTokens()
    if request.param == "attention":
        return AttentionSteerer(saes, LookAt("w20 w33"), scope=scope)
    return sqs.LatentGradientSteerer(
        saes,
        targets,
        target="create",
        objective=sqs.SquaredDistance(),
        n_steps=2,
        step_size=0.9,
        scope=scope,
    )


def rows_of(bridge, prompts):
    given = bridge.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    return {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}


def generated(bridge, given, **settings):
    made = bridge.original_model.generate(**given, **PLAIN | settings, pad_token_id=0)
    return made[:, given["input_ids"].shape[1] :]


def ours(bridge, prompts):
    settings = {"do_sample": False, "max_new_tokens": N_NEW, "verbose": False}
    made = bridge.generate(prompts, **settings, stop_at_eos=False, return_type="tokens")
    return made[:, -N_NEW:]


@pytest.mark.parametrize("way", WAYS)
def test_generate_of_the_inner_model_is_steered_as_that_of_the_bridge(bridge, steerer, way):
    prompts = PROMPTS[:1] if way == "prompt lookup" else PROMPTS  # which takes one row
    given = rows_of(bridge, prompts)
    plain = generated(bridge, given, **WAYS[way])
    if way == "static cache" and isinstance(steerer, AttentionSteerer):
        with pytest.raises(ValueError, match="got 12 keys.*leave cache_implementation out"):
            with steerer.apply(bridge):
                generated(bridge, given, **WAYS[way])
    else:
        with steerer.apply(bridge):
            expected = ours(bridge, prompts)
            steered = generated(bridge, given, **WAYS[way])
        assert torch.equal(steered, expected)
        assert not torch.equal(steered, plain)
    assert torch.equal(generated(bridge, given, **WAYS[way]), plain)


def test_beams_have_the_likelihood_of_whole_passes(bridge, steerer):
    given, n_beams = rows_of(bridge, PROMPTS), 3
    beams = {"num_beams": n_beams, "num_return_sequences": n_beams, "output_scores": True}
    with steerer.apply(bridge):
        made = bridge.original_model.generate(
            **given, **PLAIN, **beams, pad_token_id=0, return_dict_in_generate=True
        )
    lengths = given["attention_mask"].sum(1).tolist()
    found = []
    for i, row in enumerate(made.sequences):
        n = lengths[i // n_beams]
        row = row[-n - N_NEW :]
        with steerer.apply(bridge, prompt_lengths=[n]), torch.no_grad():
            logits = bridge(row[None])[0]
        log_probs = logits.log_softmax(-1)[n - 1 : -1]
        found.append(float(log_probs.gather(1, row[n:, None]).mean()))
    torch.testing.assert_close(torch.tensor(found), made.sequences_scores, rtol=1e-4, atol=1e-4)
    assert len({tuple(row.tolist()) for row in made.sequences}) == len(made.sequences)


def test_targets_for_each_row_are_refused_for_beams(bridge, saes, targets):
    steerer = sqs.LatentGradientSteerer(
        saes,
        targets,
        target=["create", "apply", "remember"],
        objective=sqs.SquaredDistance(),
        n_steps=1,
        step_size=0.5,
    )
    with pytest.raises(ValueError, match="target is for 3 rows, the batch has 6"):
        with steerer.apply(bridge):
            generated(bridge, rows_of(bridge, PROMPTS), num_beams=2)


def test_pipelines_and_an_assistant_are_followed(bridge, steerer):
    text = pipeline("text-generation", model=bridge.original_model, tokenizer=bridge.tokenizer)
    with steerer.apply(bridge):
        texts = bridge.tokenizer.batch_decode(ours(bridge, PROMPTS), skip_special_tokens=True)
        made = text(PROMPTS, batch_size=3, return_full_text=False, **PLAIN)
        given = rows_of(bridge, PROMPTS[:1])
        assisted = generated(bridge, given, assistant_model=bridge.original_model)
        assert torch.equal(assisted, ours(bridge, PROMPTS[:1]))
    assert [one[0]["generated_text"].split() for one in made] == [t.split() for t in texts]
