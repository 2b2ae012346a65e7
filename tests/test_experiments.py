"""One smoke test for each experiment; the package itself imports none of them."""

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
import torch

import sae_query_steer as sqs
from experiments.exercise import report
from experiments.gridworld.training import GridTraining, train_gridworld
from experiments.stories import classes
from experiments.tutor.latent_ablation import latent_ablations
from experiments.tutor.training import TutorTraining, train_tutor

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
TINY = {"n_steps": 2, "max_steps": 2, "d_model": 32, "n_layers": 2, "n_heads": 2, "d_mlp": 32}


def test_every_experiment_imports_and_the_package_imports_none():
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        if path.parent.name != "rebuild":  # its adapters run against two versions of the package
            import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for path in (ROOT / "sae_query_steer").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"(from|import) experiments", source), path


def test_a_tutor_that_is_trained_loads_and_its_card_says_how_it_does(tmp_path):
    card = train_tutor(tmp_path / "tutor", TutorTraining(**TINY))
    assert 0 <= card["obeyed"] <= 1
    assert card["steps"] == [2, 2, 2, 2]
    assert sqs.load_model(str(tmp_path / "tutor"), device="cpu").cfg.n_layers == 2


def test_a_gridworld_that_is_trained_loads(tmp_path):
    card = train_gridworld(tmp_path / "grid", GridTraining(**TINY, look_layer=None))
    assert card["n_parameters"] > 0
    assert sqs.load_model(str(tmp_path / "grid"), device="cpu").cfg.n_layers == 2


@pytest.mark.parametrize(
    ("rule", "text", "label"),
    [
        ("dialogue", ' Tim said, "Hello!" She ran.', "dialogue"),
        ("opener", "\nShe was happy.", "pronoun"),
        ("trouble", " The knot was a button.", "none"),
        ("gender", " They ran. He fell.", None),
    ],
)
def test_a_rule_of_the_stories_reads_the_next_sentence(rule, text, label):
    prompt = "Once there was a girl named Lily. She saw a big dragon with Tim."
    assert getattr(classes, rule)(prompt, text) == label


@dataclass(frozen=True)
class Case:
    target: str


def test_without_some_latents_and_by_them_alone_sum_to_the_whole_steer(tiny_models, saes, targets):
    model = tiny_models["bridge"]
    steerer = sqs.LatentGradientSteerer(
        saes,
        targets,
        target="create",
        objective=sqs.SquaredDistance(),
        n_steps=1,
        step_size=0.8,
        layers=[2],
    )
    with steerer.apply(model, record=True, prompt_lengths=[7]) as trace, torch.no_grad():
        model(torch.tensor([[1, 5, 9, 30, 22, 8, 40]]))
    moved = sqs.diagnostics.moved_latents(steerer, trace)
    found = latent_ablations({"create": steerer}, moved, ms=(2,), seeds=(0,))
    assert {a.way for a in found} == {"held", "taken out", "only"}
    top = {a.way: a for a in found if a.which == "top"}
    assert top["held"].share == pytest.approx(
        float(
            pd.DataFrame(moved)
            .sort_values("share", ascending=False)
            .groupby("head")
            .head(2)["share"]
            .sum()
        )
        / moved["head"].nunique()
    )
    drawn = [a for a in found if a.which != "top"]
    for ablation in drawn:
        for head, latents in ablation.latents["create"]["blocks.2.attn.hook_q"].items():
            best = top["held"].latents["create"]["blocks.2.attn.hook_q"][head]
            assert not set(latents) & set(best)


def test_studies_of_exercises_are_told_with_intervals_and_paired_differences():
    rows = [
        {
            "setting": {"study": "methods", "method": name, "n": 4},
            "open": {"success": 0.5, "rule": 0.5, "perplexity_ratio": 1, "change": 0, "each": each},
        }
        for name, each in (("one", [1, 0, 1, 0]), ("other", [0, 0, 1, 0]))
    ]
    (first, _) = report.table(rows).to_dict("records")
    assert first["open: success"] == "0.50 [0.15, 0.85]"
    (told,) = report.differences(rows).to_dict("records")
    assert (told["ahead"], told["of"]) == ("one", "other")
    assert told["open"].startswith("+0.25 [")
    (half, _) = report.table([report.part(row, 2, [0]) for row in rows]).to_dict("records")
    assert half["open: success"].startswith("1.00 [")
    assert report.part(rows[0], 1, [0]) == rows[0]
