"""The shipped tutors: they do what is requested, on every host, and a query steers just one."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sae_query_steer as sqs
from sae_query_steer.compare import level_judge
from sae_query_steer.compare.generation import continuations
from sae_query_steer.compare.tutor_task import tutor_cases
from sae_query_steer.storage.records import read_json
from sae_query_steer.toy import (
    NULL_TUTOR_FOLDER,
    TUTOR_FOLDER,
    TutorCorpus,
    restated_level,
    verb_level,
)

FOLDERS = {True: TUTOR_FOLDER, False: NULL_TUTOR_FOLDER}
LEVELS = list(sqs.BloomLevel)


@pytest.fixture(scope="module", params=[True, False], ids=["tutor", "null"])
def notes(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def tutors():
    """Both tutors, by whether their prompts hold notes."""
    return {notes: sqs.load_tutor(notes=notes) for notes in (True, False)}


def plain(folder: Path):
    """A tutor in plain transformers, with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def test_the_folders_are_small_and_hold_no_pickle():
    for folder in FOLDERS.values():
        files = list(folder.iterdir())
        assert {file.suffix for file in files} == {".json", ".safetensors"}
        assert sum(file.stat().st_size for file in files) < 4 * 2**20
    assert (
        sum(f.stat().st_size for folder in FOLDERS.values() for f in folder.iterdir()) < 8 * 2**20
    )


def test_the_weights_are_of_16_bits_and_as_many_as_the_card_says(notes):
    card = read_json(FOLDERS[notes] / "tutor.json")
    model = AutoModelForCausalLM.from_pretrained(FOLDERS[notes])
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert sum(p.numel() for p in model.parameters()) == card["n_parameters"]
    assert model.config.model_type == "llama"
    assert card["settings"]["notes"] is notes


@pytest.mark.slow
def test_the_tutor_does_what_held_out_prompts_request(tutors, notes):
    corpus = TutorCorpus("test", seed=0, notes=notes)
    prompts = [corpus.prompt(LEVELS[i % 6]) for i in range(120)]
    texts = continuations(tutors[notes], [p.text for p in prompts], max_new_tokens=7).texts
    pairs = list(zip(texts, prompts, strict=True))
    assert sum(verb_level(text) == p.requested for text, p in pairs) >= 0.95 * 120
    if notes:
        assert sum(restated_level(text, p) == p.requested for text, p in pairs) >= 0.95 * 120


@pytest.mark.slow
def test_what_it_writes_is_the_same_on_both_hosts_and_in_plain_transformers(tutors, notes):
    model, tokenizer = plain(FOLDERS[notes])
    corpus = TutorCorpus("test", seed=3, notes=notes)
    prompts = [corpus.prompt(level).text for level in (*LEVELS, None)]
    hosts = [tutors[notes], sqs.load_model(FOLDERS[notes], device="cpu", backend="hooked")]
    on_hosts = [continuations(host, prompts, max_new_tokens=32).texts for host in hosts]
    alone = []
    for prompt in prompts:
        ids = torch.tensor([[2, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            written = model.generate(ids, max_new_tokens=32, do_sample=False)
        alone.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    assert on_hosts == [alone, alone]


@pytest.mark.slow
def test_it_writes_two_or_three_sentences_that_the_judges_know(tutors, notes):
    corpus = TutorCorpus("test", seed=4, notes=notes)
    prompts = [corpus.prompt(LEVELS[i % 6]) for i in range(60)]
    texts = continuations(tutors[notes], [p.text for p in prompts], max_new_tokens=40).texts
    assert all(len(re.findall(r"[.?](?: |$)", text)) in (2, 3) for text in texts)
    judged = level_judge()(texts, texts)
    assert sum(a == p.requested for a, p in zip(judged, prompts, strict=True)) >= 57
    if notes:
        restated = [restated_level(text, p) for text, p in zip(texts, prompts, strict=True)]
        assert sum(a == p.requested for a, p in zip(restated, prompts, strict=True)) >= 57


@pytest.fixture(scope="module")
def steered(tutors):
    """What each tutor writes on 48 open prompts, steered to each level in turn: three ways."""
    found = {}
    classifier = level_judge(n_per_level=100)
    for notes, model in tutors.items():
        examples = TutorCorpus("train", seed=0, notes=notes).examples(120)
        sites = sqs.query_sites(model, layers=[1])
        saes = sqs.train_query_saes(
            model,
            [e.prompt + e.response for e in examples],
            sites,
            sqs.TrainingConfig(
                sae=sqs.sae.TopK(d_sae_per_head=64, k=8),
                training_tokens=40_000,
                metric_tokens=0,
            ),
        )
        targets = sqs.CentroidTargetBuilder(model, saes).fit(sqs.tokenize_examples(model, examples))
        cases = tutor_cases("open", "test", 48, seed=5, notes=notes)
        own = sqs.LatentGradientSteerer(
            saes, targets, target=[case.target for case in cases],
            objective=sqs.SquaredDistance(), n_steps=1, step_size=1.0,
        )  # fmt: skip
        random = sqs.baselines.random_direction(own, seed=1)
        rows = {"unsteered": None, "SAE": own, "random": random}
        for name, steerer in rows.items():
            prompts = [case.prompt for case in cases]
            written = continuations(model, prompts, max_new_tokens=32, steerer=steerer)
            judged = classifier(written.texts, written.texts)
            hits = [a == c.target for a, c in zip(judged, cases, strict=True)]
            found[notes, name] = sum(hits) / 48
    return found


@pytest.mark.slow
def test_the_steer_chooses_the_level_and_a_random_direction_does_not(steered):
    assert steered[True, "SAE"] >= 0.85
    assert steered[True, "random"] <= 0.4
    assert steered[True, "unsteered"] <= 0.4


@pytest.mark.slow
def test_on_the_null_the_same_steer_does_nothing(steered):
    assert steered[False, "SAE"] <= 0.4
    assert steered[False, "unsteered"] <= 0.4


@pytest.mark.slow
def test_the_interchange_effect_tells_the_null_beforehand(tutors):
    effect = {}
    for notes, model in tutors.items():
        texts = TutorCorpus("validation", seed=0, notes=notes).examples(120)
        examples = sqs.tokenize_examples(model, texts)
        table = sqs.diagnostics.interchange_effect(
            model, sqs.query_sites(model), examples, n_pairs=90, per_head=False
        )
        effect[notes] = table.set_index("layer")["class_effect"]
        ratio = effect[notes] / table.set_index("layer")["class_effect_se"]
        assert bool(ratio.max() > 2.4) is notes, "2.4: 5 % for four layers (Bonferroni, one-sided)"
    assert effect[True].idxmax() == 1
    assert effect[True][1] > 10 * effect[False].abs().max()
