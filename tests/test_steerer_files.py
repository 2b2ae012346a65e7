"""Steerers in folders: what comes back steers alike, and nothing else is read."""

import json

import pytest
import torch

import sae_query_steer as sqs
from sae_query_steer.steering.files import steerer_settings

NAME = "blocks.2.attn.hook_q"
GREEDY = {"max_new_tokens": 4, "do_sample": False, "verbose": False}
KINDS = {
    "plain": {},
    "by row": {"target": ["create", {"apply": 1, "create": -0.5}], "n_steps": [3, 5]},
    "bounded": {
        "scope": sqs.LastPromptToken()
        | (sqs.scopes.FirstResponseTokens(3) & ~sqs.scopes.AtPositions([4])),
        "schedule": sqs.control.ExponentialDecay(half_life=2.0),
        "latents": sqs.control.GivenLatents({NAME: {0: [1, 2], 3: [4]}}),
        "gate": sqs.control.PosteriorBelow(0.9),
        "until": 0.8,
        "trust_radius": 2.0,
        "max_relative_change": 0.5,
        "keep_norm": True,
        "heads": {2: [0, 3]},
    },
    "all but some": {"latents": sqs.control.ExceptLatents({NAME: {0: [1, 2], 3: [4]}})},
    "marked": {
        "scope": sqs.scopes.AfterToken(20) | sqs.scopes.RowMask(torch.eye(2, 9, dtype=torch.bool))
    },
    "probe": {"objective": sqs.objectives.LinearProbe(torch.arange(64.0).reshape(4, 16) / 64)},
    "gaussian": {
        "objective": sqs.objectives.GaussianLogLikelihood(floor=0.3),
        "latents": sqs.control.TopLatents(3),
    },
}


@pytest.fixture
def make(saes, targets):
    def made(encoders=saes, centroids=targets, **changes):
        settings = {
            "target": sqs.BloomLevel.CREATE,
            "objective": sqs.PrototypeLogLikelihood(temperature=0.7),
            "n_steps": 4,
            "step_size": 0.3,
            "layers": [2],
        }
        return sqs.LatentGradientSteerer(encoders, centroids, **{**settings, **changes})

    return made


def steered(model, steerer):
    with steerer.apply(model, record=True) as trace:
        texts = model.generate(["w1 w20 w3", "w4 w5"], **GREEDY)
    return texts, trace.to_dataframe()["delta_norm"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_back_steers_alike(tiny_models, make, tmp_path, kind):
    model, steerer = tiny_models["bridge"], make(**KINDS[kind])
    sqs.steering.save_steerer(steerer, tmp_path / "steerer")
    loaded = sqs.steering.load_steerer(tmp_path / "steerer")
    assert steerer_settings(loaded) == steerer_settings(steerer)
    before, after = steered(model, steerer), steered(model, loaded)
    assert before[0] == after[0]
    assert before[1].equals(after[1])
    assert (before[1] > 0).any()


def test_dense_steerers_come_back_too(tiny_models, make, tmp_path, examples):
    model = tiny_models["bridge"]
    dense = sqs.sae.identity_encoders(sqs.query_sites(model, [2]))
    centroids = sqs.CentroidTargetBuilder(model, dense).fit(sqs.tokenize_examples(model, examples))
    steerer = make(dense, centroids)
    sqs.steering.save_steerer(steerer, tmp_path / "dense")
    loaded = sqs.steering.load_steerer(tmp_path / "dense")
    assert loaded.saes == dense
    assert steered(model, loaded)[0] == steered(model, steerer)[0]
    assert not (tmp_path / "dense" / "saes").exists()


LOOKS = {
    "phrase": sqs.steering.LookAt("w20"),
    "several": (
        sqs.steering.LookAt(("w1", "w3")),
        sqs.steering.LookAt(sqs.scopes.AtPositions([1]), weight=-0.5),
    ),
    "by row": [
        (sqs.steering.LookAt("w1"), sqs.steering.LookAt("w3", 2.0)),
        sqs.steering.LookAt(sqs.scopes.RowMask(torch.ones(2, 9, dtype=torch.bool))),
    ],
}


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kind", LOOKS)
def test_attention_steerers_come_back_too(tiny_models, saes, tmp_path, kind, dense):
    model = tiny_models["bridge"]
    encoders = sqs.sae.identity_encoders(sqs.query_sites(model, [0, 2])) if dense else saes
    prompts = ["w1 w20 w3", "w1 w20 w3 w5"]
    steerer = sqs.steering.AttentionSteerer(
        encoders,
        LOOKS[kind],
        n_steps=3,
        step_size=0.1,
        n_latents=4,
        layers=range(2, 3),
        heads=[0, 3],
        scope=sqs.LastPromptToken() | sqs.scopes.ResponseTokens(),
        until=0.9 if kind == "phrase" else None,
    )
    sqs.steering.save_steerer(steerer, tmp_path / "steerer")
    loaded = sqs.steering.load_steerer(tmp_path / "steerer")
    assert isinstance(loaded, sqs.steering.AttentionSteerer)
    assert steerer_settings(loaded) == steerer_settings(steerer)
    assert (tmp_path / "steerer" / "saes").exists() != dense
    found = []
    for one in (steerer, loaded):
        with one.apply(model, record=True) as trace:
            texts = model.generate(prompts, **GREEDY)
        found.append((texts, trace.to_dataframe()["mass_after"].tolist()))
    assert found[0] == found[1]


def test_saes_of_attention_steerers_may_be_referred_to(saes, tmp_path):
    saes.save(tmp_path / "saes")
    steerer = sqs.steering.AttentionSteerer(saes, LOOKS["phrase"])
    sqs.steering.save_steerer(steerer, tmp_path / "steerer", saes="../saes")
    with pytest.raises(ValueError, match="follow_references=True"):
        sqs.steering.load_steerer(tmp_path / "steerer")
    loaded = sqs.steering.load_steerer(tmp_path / "steerer", follow_references=True)
    assert loaded.saes.keys() == saes.keys()


def test_attention_steerers_that_cant_be_read_back_are_refused(saes, tmp_path):
    own = sqs.steering.LookAt(lambda positions: positions.valid)
    message = "look_at=<function .* can't be saved: it is no value of this package"
    for look_at in (own, (own, LOOKS["phrase"]), [LOOKS["phrase"], own]):
        steerer = sqs.steering.AttentionSteerer(saes, look_at)
        with pytest.raises(ValueError, match=message):
            sqs.steering.save_steerer(steerer, tmp_path / "steerer")
    steerer = sqs.steering.AttentionSteerer(saes, LOOKS["phrase"])
    with pytest.raises(ValueError, match="targets must be None, got t: an AttentionSteerer has"):
        sqs.steering.save_steerer(steerer, tmp_path / "steerer", targets="t")
    assert list(tmp_path.iterdir()) == []


def test_saes_and_centroids_may_be_referred_to(tiny_models, make, tmp_path, saes, targets):
    saes.save(tmp_path / "shared-saes")
    targets.save(tmp_path / "shared-targets")
    sqs.steering.save_steerer(
        make(), tmp_path / "steerer", saes="../shared-saes", targets=tmp_path / "shared-targets"
    )
    assert [p.name for p in (tmp_path / "steerer").iterdir()] == ["steerer.json"]
    loaded = sqs.steering.load_steerer(tmp_path / "steerer", follow_references=True)
    assert steered(tiny_models["bridge"], loaded)[0] == steered(tiny_models["bridge"], make())[0]
    (tmp_path / "shared-saes").rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError):
        sqs.steering.load_steerer(tmp_path / "steerer", follow_references=True)


def test_functions_and_foreign_encoders_are_refused_and_nothing_is_written(make, tmp_path, untyped):
    class Mine(sqs.SquaredDistance):
        """Named here, so no file may name it."""

    for changes, message in (
        ({"gate": lambda z, goal: z[..., 0] > 0}, "gate=<function .* can't be saved: it is no"),
        ({"scope": lambda positions: positions.valid}, "scope=<function .* can't be saved"),
        ({"objective": Mine()}, r"objective=.*Mine\(\) can't be saved"),
    ):
        with pytest.raises(ValueError, match=message):
            sqs.steering.save_steerer(make(**changes), tmp_path / "steerer")
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_hostile_folders_are_refused(make, tmp_path):
    sqs.steering.save_steerer(make(), tmp_path / "steerer")
    path = tmp_path / "steerer" / "steerer.json"
    good = json.loads(path.read_text())

    def refused(message, **changes):
        path.write_text(json.dumps({**good, **changes}))
        with pytest.raises(ValueError, match=message):
            sqs.steering.load_steerer(tmp_path / "steerer")

    settings = good["settings"]
    refused("format: .*, got 'other/1'", format="other/1")
    refused("is damaged", settings={**settings, "objective": {"nothing": 1}})
    refused(
        "there is no value 'Popen': allowed are",
        settings={**settings, "scope": {"kind": "Popen", "fields": {"args": ["true"]}}},
    )
    refused("is damaged: .*colour", settings={**settings, "colour": "red"})
    refused("is damaged: one of its settings", targets=None)
    refused("no class 'nobody'", settings={**settings, "target": "nobody"})
    with pytest.raises(FileExistsError, match="exists: give another folder, or overwrite=True"):
        sqs.steering.save_steerer(make(), tmp_path / "steerer")
