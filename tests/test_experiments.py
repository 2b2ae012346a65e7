"""One smoke test for each experiment; the package itself imports none of them."""

import json
import re
import runpy
import sys
from argparse import Namespace
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
import torch
from recipe_models import write_bytes, write_qwen2

import sae_query_steer as sqs
from experiments.exercise import figures, mechanism, report, run, studies, task, utility
from experiments.gridworld.training import GridTraining, train_gridworld
from experiments.gridworld.words import Aim
from experiments.stories import classes
from experiments.tutor.latent_ablation import latent_ablations
from experiments.tutor.training import TutorTraining, train_tutor
from sae_query_steer.compare.exercise_judges import verb_judge

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


@pytest.mark.parametrize("name", ["run", "mechanism", "utility", "confusion", "figures", "report"])
def test_a_command_of_the_exercise_study_tells_its_options(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, f"experiments.exercise.{name}", raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"experiments.exercise.{name}", run_name="__main__")
    assert end.value.code == 0
    assert "--out" in capsys.readouterr().out


def test_a_tutor_that_is_trained_loads_and_its_card_says_how_it_does(tmp_path):
    card = train_tutor(tmp_path / "tutor", TutorTraining(**TINY))
    assert 0 <= card["obeyed"] <= 1
    assert card["steps"] == [2, 2, 2, 2]
    assert sqs.load_model(str(tmp_path / "tutor"), device="cpu").cfg.n_layers == 2


@pytest.mark.parametrize("look_layer", [None, 1])
def test_a_gridworld_that_is_trained_loads_and_its_card_has_every_aim(tmp_path, look_layer):
    card = train_gridworld(tmp_path / "grid", GridTraining(**TINY, look_layer=look_layer))
    assert card["n_parameters"] > 0
    assert list(card["walks"]) == [*Aim, "open"]
    assert all(0 <= sum(shares.values()) <= 1 for shares in card["walks"].values())
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


def test_dictionaries_are_compared_over_settings_and_seeds():
    rows = [
        {
            "setting": {"study": "noise", "dictionary": kind, "wrong": wrong, "tasks": ["open"]}
            | ({"seed": seed} if seed else {}),
            "open": {"each": [1] * n + [0] * (10 - n)},
        }
        for kind, of_seed in (("trained", [(8, 6), (9, 7), (7, 9)]), ("random", [(5, 5)] * 3))
        for seed, hits in enumerate(of_seed)
        for wrong, n in zip((0.3, 0.0), hits, strict=True)
    ]
    (told,) = report.over_seeds(rows).to_dict("records")
    assert (told["ahead"], told["of"], told["by seed"]) == (
        "random",
        "trained",
        "-0.20 / -0.30 / -0.30",
    )
    assert told["mean"] == "-0.27 [-0.41, -0.12]"  # sem 0.0333, t 4.303


@pytest.mark.filterwarnings("ignore::sae_query_steer.learning.learner.LearningWarning")
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "phi3"])
def test_rivals_and_mechanism_run_on_a_model_of_each_family(tmp_path, monkeypatch, kind):
    folder = tmp_path / "model"
    write_qwen2(folder) if kind == "qwen2" else write_bytes(folder, kind)
    monkeypatch.setattr(task.Task, "fitted_judge", lambda _: verb_judge())
    monkeypatch.setattr(task, "MAX_NEW_TOKENS", 3)
    monkeypatch.setattr(mechanism, "MAX_NEW_TOKENS", 3)
    monkeypatch.setitem(studies.LONG, "n_updates", 2)
    sizes = {"n_train": 4, "n_judge": 8, "n_rivals": 6, "n_validation": 6, "n_answer": 3}
    sizes |= {"n_updates": 2, "training_tokens": 2048, "cache_gb": 0.1}
    sizes |= {"matmul_precision": "highest"}
    tasks = ["open, trained wording", "redirected, trained wording"]
    args = Namespace(out=tmp_path, model=str(folder), tasks=tasks, **sizes)
    own = task.Task(args)
    # Every method once, and what is learned on each family.
    run.run(own, ["rivals"], "0/1", only=("" if kind == "llama" else "learned",))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == (24 if kind == "llama" else 8)
    for row in rows:
        assert all(len(row[name]["each"]) == 6 for name in tasks)
        chosen = row[tasks[0]].get("validation", [])
        assert all(point["perplexity_ratio"] > 0 for point in chosen)
        if chosen:
            strengths = {(p["strength"], tuple(p["layers"] or ())) for p in chosen}
            assert (row[tasks[0]]["strength"], tuple(row[tasks[0]]["layers"] or ())) in strengths
    run.run(own, ["rivals"], "0/1", only=("learned",))  # a second run has nothing left to do
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(rows)
    (tmp_path / "text.txt").write_text("Words of a textbook. " * 3000)
    mechanism.run(own, 12, tmp_path / "text.txt", "moves, dense")
    found = [json.loads(line) for line in (tmp_path / "mechanism.jsonl").read_text().splitlines()]
    moves = next(
        row for row in found if (row["steer"], row["measure"]) == ("moves, dense", "effect")
    )
    # Moves of queries act through attention patterns, and through nothing else.
    assert moves["frozen"] == pytest.approx(0.0, abs=1e-4)
    assert moves["patterns"] == pytest.approx(moves["whole"], rel=1e-3, abs=1e-4)
    assert {row["measure"] for row in found} == {"effect", "drift", "heads", "sources", "cost"}
    looked = next(row for row in found if row["measure"] == "sources")
    kinds = [value for value in looked.values() if isinstance(value, list)]
    (batch, _), _ = mechanism.answered(own, 12)
    names, groups = mechanism.token_kinds(own, batch)
    assert bool((groups.sum(-1)[batch.positions.index < batch.lengths[:, None]] == 1).all())
    topic = batch.tokens[0][groups[0, :, names.index("topic")] == 1]
    assert own.model.tokenizer.decode(topic).strip(" .") in [
        c.topic for c in own.cases("open, trained wording", "test", 12)
    ]
    assert [sum(side) for side in zip(*kinds, strict=True)] == pytest.approx([1.0, 1.0], abs=1e-3)
    if kind == "llama":
        figures.draw(tmp_path, tmp_path)
        assert len(list(tmp_path.glob("*.png"))) == 3
        lines = [" ".join(f"Part {i} of line {k} is long." * 6 for i in range(5)) for k in range(6)]
        (tmp_path / "lines.txt").write_text("\n".join(lines))
        utility.run(own, tmp_path / "lines.txt", 3)
        found = [json.loads(line) for line in (tmp_path / "utility.jsonl").read_text().splitlines()]
        assert found[0]["steer"] == "unsteered" and found[0]["passages"] > 1
        assert {row["steer"] for row in found} > {"moves, dense, remember", "moves, dense, create"}
        dense = own.dictionary("dense")
        right, wrong = (own.learned(f"wrong{x}", dense, wrong=x) for x in (0.0, 1.0))
        assert any(bool((right.means[name] != wrong.means[name]).any()) for name in dense)


@pytest.mark.filterwarnings("ignore::sae_query_steer.learning.learner.LearningWarning")
def test_choices_of_the_method_are_measured_one_at_a_time(tmp_path, monkeypatch):
    write_bytes(tmp_path / "model", "llama")
    monkeypatch.setattr(task.Forms, "fitted_judge", lambda _: verb_judge())
    monkeypatch.setattr(task, "MAX_NEW_TOKENS", 3)
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"Words of textbook {i}. " * 8 for i in range(40)))
    sizes = {"n_train": 8, "n_judge": 8, "n_study": 6, "n_answer": 3, "n_updates": 6}
    sizes |= {"training_tokens": 2048, "cache_gb": 0.1, "matmul_precision": "highest"}
    names = {"tasks": ["open, trained wording"], "texts": [str(other)]}
    own = task.Forms(Namespace(out=tmp_path, model=str(tmp_path / "model"), **sizes, **names))
    chosen = ('"k": 4', '"training_tokens": 10240', '"n_steps": 3, "step_size": 0.3', '"texts"')
    run.run(own, ["noise"], "0/1", only=('"wrong": 0.0', '"wrong": 0.3'))
    run.run(own, ["factors"], "0/1", only=chosen)
    run.run(own, ["mixtures"], "0/1", only=('"story": 1.0, "letter": 0.5', '"letter": 1.0'))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]

    def told(row):
        return row["kl_removed"], row[names["tasks"][0]]["change"]

    by_study = {name: [] for name in ("noise", "factors", "mixtures")}
    for row in rows:
        by_study[row["setting"]["study"]].append(row)
    assert [len(found) for found in by_study.values()] == [13 + 15, 4 * 3, 3 * 3]
    plain = {
        row["setting"].get("seed", 0): told(row)
        for row in by_study["noise"]
        if (row["setting"]["dictionary"], row["setting"]["wrong"]) == ("trained", 0.0)
    }
    for row in by_study["factors"]:  # each change is another result than none
        assert told(row) != plain[row["setting"].get("seed", 0)]
    assert len({told(row) for row in by_study["mixtures"]}) > 3  # weights matter
    dense = own.dictionary("dense")
    drawn = [own.learned(f"labels{n}", dense, wrong=0.3, label_seed=n).means for n in (0, 1)]
    assert any(bool((drawn[0][name] != drawn[1][name]).any()) for name in dense)
    k4 = own.saes(0, own.run, k=4)
    assert {sae.cfg.k for sae in k4.values()} == {4}
    (site,) = own.dictionary("sampled")
    rows_of = [own.dictionary(kind)[site].W_dec for kind in ("trained", "sampled")]
    torch.testing.assert_close(*(rows.norm(dim=-1) for rows in rows_of))
    assert float(torch.cosine_similarity(*rows_of, dim=-1).abs().mean()) < 0.9
    trained = {path.name for path in tmp_path.glob("saes-*")}
    assert any("texts" in name and "other" in name for name in trained)
