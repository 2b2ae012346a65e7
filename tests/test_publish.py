"""Bundles: what is saved comes back, belongs together, and is refused where it does not."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
import yaml
from command_line import invoke
from hostile_kinds import sign
from huggingface_hub import ModelCard
from sae_lens import SAE
from safetensors.torch import save_file
from wheel_check import WORDS

import sae_query_steer as sqs
from sae_query_steer.config import KLSparse
from sae_query_steer.hub.layout import head_folders, read_index
from sae_query_steer.steering.files import steerer_settings
from sae_query_steer.targets.centroids import Learned

HOOKS = ["blocks.0.attn.hook_q", "blocks.2.attn.hook_q"]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "verbose": False}


@pytest.fixture(scope="module")
def steerer(saes, targets):
    return sqs.LatentGradientSteerer(
        saes,
        targets,
        target="create",
        objective=sqs.PrototypeLogLikelihood(temperature=0.5),
        n_steps=6,
        step_size=0.7,
        scope=sqs.LastPromptToken() | sqs.scopes.FirstResponseTokens(3),
        layers=[2],
    )


@pytest.fixture(scope="module")
def scores():
    return pd.DataFrame({"layer": [0, 2], "target_rate": [0.25, float("nan")], "note": ["a|b", ""]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_models, steerer, scores):
    folder = tmp_path_factory.mktemp("publish") / "bundle"
    sqs.hub.save_bundle(
        folder,
        tiny_models["bridge"],
        steerer.saes,
        steerer=steerer,
        evaluation=scores,
        model_name="alice/tiny-llama",
        license="mit",
        note="Made of random words.",
    )
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the bundle to damage."""
    shutil.copytree(folder, tmp_path / "bundle")
    return tmp_path / "bundle"


def change_index(copy, **changes):
    index = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps(index | changes))


def test_everything_comes_back_as_it_was(folder, model, saes, targets, steerer, scores):
    bundle = sqs.hub.load_bundle(folder, model=model)
    for name, sae in saes.items():
        for key, value in sae.state_dict().items():
            assert torch.equal(bundle.saes[name].state_dict()[key], value)
        assert torch.equal(bundle.targets.means[name], targets.means[name])
        assert torch.equal(bundle.targets.variances[name], targets.variances[name])
    pd.testing.assert_frame_equal(bundle.saes.metrics, saes.metrics)
    assert steerer_settings(bundle.steerer) == steerer_settings(steerer)
    assert bundle.evaluation["target_rate"].isna().tolist() == [False, True]
    assert bundle.evaluation["note"].tolist() == scores["note"].tolist()
    with steerer.apply(model):
        said = model.generate(["w1 w20 w3"], **GREEDY)
    with bundle.steerer.apply(model):
        assert model.generate(["w1 w20 w3"], **GREEDY) == said
    bundle.check(model)
    assert bundle.model.name == "alice/tiny-llama"


def test_plain_saelens_reads_every_head(folder, saes):
    heads = head_folders(read_index(folder).files)
    assert list(heads) == [f"{name}.{head}" for name in HOOKS for head in range(4)]
    queries = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(1))
    for name, path in heads.items():
        hook, head = name.rsplit(".", 1)
        plain = SAE.load_from_disk(folder / path)
        assert type(plain).__module__.startswith("sae_lens.")
        assert plain.cfg.metadata.model_name == "alice/tiny-llama"
        ours = saes[hook].encode(queries)[:, int(head)]
        torch.testing.assert_close(plain.encode(queries[:, int(head)]), ours)


def test_the_card_is_a_model_card_that_says_how_to_load_it(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "saelens"
    assert {"saelens", "sparse-autoencoder"} <= set(card.data.tags)
    assert card.data.base_model == "alice/tiny-llama"
    assert card.data.license == "mit"
    assert "Made of random words." in card.text
    assert 'SAE.from_pretrained("USER/REPOSITORY", "heads/blocks.0.attn.hook_q.0")' in card.text
    assert "| 2 | 3 | 3.000 |" in card.text  # a row of the metrics
    assert "| 0 | 0.250 | a\\|b |" in card.text
    assert "create 16" in card.text


def test_the_card_shows_success_by_class_with_n_interval_and_judge(tiny_models, saes, tmp_path):
    method = {"objective": None, "centroids": None, "span": None, "scope": None, "layers": "2"}
    method = {"task": "open", "method": "descent", "heads": "all"} | method
    successes = [("create", True), ("create", True), ("create", False), ("apply", False)]
    texts = [method | {"prompt": "p", "target": t, "success": s} for t, s in successes]
    found = sqs.compare.Comparison(
        rows=pd.DataFrame([method]),
        curves=pd.DataFrame(),
        texts=pd.DataFrame(texts),
        judge={"accuracy": 0.9, "n": 50.0, "chance": 0.5},
    )
    table = sqs.compare.success_by_class(found)
    assert table["low"].round(3).tolist() == [0.208, 0.0]  # Wilson, 2 of 3 and 0 of 1
    sqs.hub.save_bundle(tmp_path / "b", tiny_models["bridge"], saes, evaluation=table)
    card = (tmp_path / "b" / "README.md").read_text()
    assert "Success by target class on n prompts, with its 95 % interval (Wilson)" in card
    judge = r"accuracy 0.90 \[0.79, 0.96\], n = 50, chance 0.50"
    assert f"| open | descent | create | 3 | 0.667 | 0.208 | 0.939 | {judge} |" in card
    assert f"| open | descent | apply | 1 | 0.000 | 0.000 | 0.793 | {judge} |" in card


def test_saes_alone_make_a_bundle(tiny_models, saes, tmp_path):
    sqs.hub.save_bundle(tmp_path / "b", tiny_models["hooked"], saes)
    bundle = sqs.hub.load_bundle(tmp_path / "b", model=tiny_models["bridge"])
    assert (bundle.targets, bundle.steerer, bundle.evaluation) == (None,) * 3


def test_saes_that_saelens_does_not_know_are_saved_as_a_whole(tiny_models, tmp_path):
    model = tiny_models["bridge"]
    rows = torch.randint(4, 52, (16, 16), generator=torch.Generator().manual_seed(5))
    saes = sqs.train_query_saes(
        model,
        rows,
        sqs.query_sites(model, [1]),
        sqs.TrainingConfig(
            sae=KLSparse(d_sae_per_head=8),
            training_tokens=1024,
            train_batch_size_tokens=128,
            metric_tokens=0,
        ),
    )
    sqs.hub.save_bundle(tmp_path / "b", model, saes)
    assert list(sqs.hub.load_bundle(tmp_path / "b").saes) == ["blocks.1.attn.hook_q"]
    assert "no architecture for one head" in (tmp_path / "b" / "README.md").read_text()
    with pytest.raises(ValueError, match="holds no SAE of a single head"):
        sqs.hub.registry_entry(tmp_path / "b", release="r", repo_id="a/b")


def test_another_model_is_refused_with_both_sides_shown(folder, tiny_models, saes):
    model = tiny_models["bridge"]
    weight = model.blocks[0].attn.q.original_component.weight
    with torch.no_grad():
        weight.mul_(1.5)
    try:
        with pytest.raises(ValueError, match="another model than the bundle's") as caught:
            sqs.hub.load_bundle(folder, model=model)
    finally:
        with torch.no_grad():
            weight.div_(1.5)
    said = str(caught.value)
    assert re.search(r"in the bundle: name='alice/tiny-llama' n_layers=3 n_heads=4 d_head=8", said)
    assert re.search(r"here: +name=\S*tiny-llama' n_layers=3", said)
    assert re.search(
        r"at blocks.0.attn.hook_q the activations differ from the fingerprint by 0.5 \(relative\)",
        said,
    )
    sqs.hub.load_bundle(folder, model=model)


def test_a_model_of_another_shape_is_refused_with_both_sides_shown(folder):
    with pytest.raises(ValueError, match=r"n_layers=3 [^\n]*\n  here: [^\n]*n_layers=4"):
        sqs.hub.load_bundle(folder, model=sqs.load_tutor())


def test_what_does_not_belong_together_is_refused_before_anything_is_written(
    tmp_path, tiny_models, saes, targets, steerer, examples
):
    model, out = tiny_models["bridge"], tmp_path / "b"
    few = sqs.QuerySAEs({HOOKS[0]: saes[HOOKS[0]]})
    other = sqs.CentroidTargetBuilder(model, saes).fit(
        sqs.tokenize_examples(model, examples, span=sqs.scopes.PromptTokens())
    )
    own = dataclasses.replace(steerer, gate=None, scope=lambda at: at.absolute >= 0)
    for refused, changes in (
        ("the steerer's SAEs are at", {"saes": few, "steerer": steerer}),
        ("the steerer has other centroids", {"steerer": steerer, "targets": other}),
        ("can't be saved", {"steerer": own}),
    ):
        with pytest.raises(ValueError, match=refused):
            sqs.hub.save_bundle(out, model, **{"saes": saes, **changes})
    with pytest.raises(ValueError, match="3 layers|4 layers|heads of"):
        sqs.hub.save_bundle(out, sqs.load_tutor(), saes)
    assert list(tmp_path.iterdir()) == []


def test_plain_mappings_and_training_saes_are_refused(tmp_path, tiny_models, saes, untyped):
    with pytest.raises(TypeError, match="saes must be QuerySAEs, got dict"):
        sqs.hub.save_bundle(tmp_path / "b", tiny_models["bridge"], dict(saes))
    training = sqs.sae.QueryHeadTopKTrainingSAE(
        sqs.sae.QueryHeadTopKTrainingSAEConfig(n_heads=4, d_head=8, d_sae_per_head=16, k=3)
    )
    with pytest.raises(TypeError, match=r"still in training: give to_inference\(sae\)"):
        sqs.hub.save_bundle(
            tmp_path / "b", tiny_models["bridge"], sqs.QuerySAEs({HOOKS[0]: training})
        )


def test_a_steerer_of_another_kind_is_refused(tmp_path, tiny_models, saes, untyped):
    steerer = sqs.steering.JoinedSteerers(
        sqs.steering.AttentionSteerer(saes, sqs.steering.LookAt("w1"))
    )
    wanted = "steerer must be LatentGradientSteerer or AttentionSteerer, got JoinedSteerers"
    with pytest.raises(TypeError, match=wanted):
        sqs.hub.save_bundle(tmp_path / "b", tiny_models["bridge"], saes, steerer=steerer)
    assert list(tmp_path.iterdir()) == []


FRESH = """
import sys
import sae_query_steer as sqs

model = sqs.load_model(sys.argv[1], device="cpu")
for folder in sys.argv[2:]:
    bundle = sqs.from_pretrained(folder, model=model)
    with bundle.steerer.apply(model):
        print(model.generate(["w1 w20 w3"], max_new_tokens=8, do_sample=False, verbose=False))
"""


@pytest.mark.slow
def test_learned_and_attention_targets_steer_alike_in_a_fresh_process(
    tmp_path, tiny_models, tiny_folder, saes, targets
):
    model = tiny_models["bridge"]
    moves = sqs.learning.no_moves(model, saes, ["create", "remember"])
    for mean in moves.means.values():
        mean += torch.randn(mean.shape, generator=torch.Generator().manual_seed(2))
    history, unsteered = ({"step": 0.0, "label": "create"},), {"create": 2.0, "remember": 1.0}
    steered = unsteered | {"create": 1.5}
    learned = Learned(kind="moves", unsteered=unsteered, steered=steered, history=history)
    learned = dataclasses.replace(moves, learned=learned, span="LastPromptToken()")
    settings = {"objective": sqs.objectives.FixedMove(), "n_steps": 1, "step_size": 1.0}
    steerers = {
        "learned": sqs.LatentGradientSteerer(saes, learned, target="create", **settings),
        "attention": sqs.steering.AttentionSteerer(saes, sqs.steering.LookAt("w20"), n_steps=4),
        "beside": sqs.steering.AttentionSteerer(saes, sqs.steering.LookAt("w1"), layers=[2]),
    }
    said = []
    for name, steerer in steerers.items():
        given = {"targets": targets} if name == "beside" else {}
        sqs.hub.save_bundle(tmp_path / name, model, saes, steerer=steerer, **given)
        bundle = sqs.hub.load_bundle(tmp_path / name, model=model)
        assert type(bundle.steerer) is type(steerer)
        assert steerer_settings(bundle.steerer) == steerer_settings(steerer)
        with steerer.apply(model):
            said.append(str(model.generate(["w1 w20 w3"], **GREEDY | {"max_new_tokens": 8})))
    assert sqs.hub.load_bundle(tmp_path / "attention").targets is None
    found = sqs.hub.load_bundle(tmp_path / "learned").targets
    assert found.are_moves and found.learned == learned.learned
    card = (tmp_path / "learned" / "README.md").read_text()
    assert "Moves of latents, learned through the model; scope LastPromptToken()" in card
    assert "Held-out loss removed: create 25%, remember 0%." in card
    folders = [tiny_folder, *(tmp_path / name for name in steerers)]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *map(str, folders)], capture_output=True, text=True
    )
    assert done.stdout.splitlines() == said, done.stderr[-2000:]


def test_a_bundle_is_not_replaced_unless_asked(folder, tiny_models, saes):
    with pytest.raises(FileExistsError, match="give another folder, or overwrite=True"):
        sqs.hub.save_bundle(folder, tiny_models["bridge"], saes)


def test_a_changed_file_is_refused(copy):
    path = copy / "centroids" / "centroids.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"centroids.safetensors .*SHA-256 \w+, got \w{64}: fetch"):
        sqs.hub.load_bundle(copy)
    path.write_bytes(bytes(content[:-7]))
    with pytest.raises(ValueError, match=r"must have \d+ bytes, got \d+: fetch"):
        sqs.hub.load_bundle(copy)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="lacks centroids/centroids.safetensors"):
        sqs.hub.load_bundle(copy)


def test_other_saes_of_the_same_shape_are_refused_even_if_the_list_is_made_to_fit(copy):
    one, two = (copy / "layers" / name / "sae_weights.safetensors" for name in HOOKS)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    sign(copy)
    with pytest.raises(ValueError, match="another SAE: at blocks.0.attn.hook_q its recon"):
        sqs.hub.load_bundle(copy)


def test_heads_may_be_missing_where_only_layers_are_read(copy):
    shutil.rmtree(copy / "heads")
    assert list(sqs.hub.load_bundle(copy).saes) == HOOKS
    with pytest.raises(FileNotFoundError, match="lacks heads/"):
        sqs.hub.push_to_hub(copy, "alice/bundle", dry_run=True)


def test_what_is_read_must_be_on_the_list(copy):
    files = json.loads((copy / "bundle.json").read_text())["files"]
    for name in ("layers/query_saes.json", f"layers/{HOOKS[1]}/cfg.json"):
        change_index(copy, files={n: entry for n, entry in files.items() if n != name})
        with pytest.raises(ValueError, match=f"lists no {re.escape(name)}: save the bundle again"):
            sqs.hub.load_bundle(copy)
    change_index(copy, files={n: e for n, e in files.items() if n != "centroids/centroids.json"})
    with pytest.raises(ValueError, match=r"lists no centroids/centroids\.json"):
        sqs.hub.load_bundle(copy)


def test_a_card_that_leads_elsewhere_is_not_sent(copy, tmp_path):
    (tmp_path / "private.txt").write_text("a secret")
    (copy / "README.md").unlink()
    with pytest.raises(FileNotFoundError, match="no file .*README.md"):
        sqs.hub.push_to_hub(copy, "alice/bundle", dry_run=True)
    (copy / "README.md").symlink_to(tmp_path / "private.txt")
    with pytest.raises(ValueError, match="README.md is a link to"):
        sqs.hub.push_to_hub(copy, "alice/bundle", dry_run=True)


def test_tables_that_would_not_come_back_are_refused_before_anything_is_written(
    tmp_path, tiny_models, saes
):
    model = tiny_models["bridge"]
    for table, said in (
        (pd.DataFrame({"a": []}), "must have rows, .* got 0 rows"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "different names of columns"),
        (pd.DataFrame({"a": [[1]]}), r"0\.a\S*: .*, got \[1\]"),
        (pd.DataFrame({"when": [pd.Timestamp("2026-01-01")]}), r"0\.when\S*: .*, got Timestamp"),
    ):
        with pytest.raises(ValueError, match=said):
            sqs.hub.save_bundle(tmp_path / "b", model, saes, evaluation=table)
    assert list(tmp_path.iterdir()) == []
    table = pd.DataFrame({"rate": [0.5]}, index=pd.Index(["SAE"], name="method"))
    sqs.hub.save_bundle(tmp_path / "b", model, saes, evaluation=table)
    found = sqs.hub.load_bundle(tmp_path / "b").evaluation
    assert found.to_dict("records") == [{"method": "SAE", "rate": 0.5}]


def test_a_model_of_a_local_folder_is_no_base_model(tmp_path, tiny_models, saes, monkeypatch):
    model = tiny_models["hooked"]
    monkeypatch.setattr(model.cfg, "model_name", "../models/tiny")
    sqs.hub.save_bundle(tmp_path / "b", model, saes)
    card = ModelCard.load(tmp_path / "b" / "README.md")
    assert card.data.base_model is None
    assert "attention queries of tiny" in card.text


def test_every_heads_folder_tells_its_hook(folder):
    for name, path in head_folders(read_index(folder).files).items():
        metadata = json.loads((folder / path / "cfg.json").read_text())["metadata"]
        assert f"{metadata['hook_name']}.{metadata['hook_head_index']}" == name


@pytest.mark.parametrize(
    "name",
    ["../x.json", "/etc/x.json", "a/../../x.json", "a\\x.json", "x.pkl", ".x.json", "a/b/c/d.json"],
)
def test_names_that_lead_elsewhere_are_refused(copy, name):
    files = json.loads((copy / "bundle.json").read_text())["files"]
    change_index(copy, files=files | {name: {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(ValueError, match=r"bundle.json is damaged .*String should match pattern"):
        sqs.hub.load_bundle(copy)


def test_a_link_out_of_the_bundle_is_refused(copy, tmp_path):
    path = copy / "steerer.json"
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match=r"steerer.json is a link to .*elsewhere.json, outside of"):
        sqs.hub.load_bundle(copy)


def test_lists_in_another_form_are_refused(copy):
    for files in (None, {}, [], {"a.json": 3}, {"a.json": {"bytes": -1, "sha256": "0"}}):
        change_index(copy, files=files)
        with pytest.raises(ValueError, match=r"bundle.json is damaged .*: files"):
            sqs.hub.load_bundle(copy)
    change_index(copy, files={"a.json": {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(ValueError, match=r"lists no fingerprint\.safetensors"):
        sqs.hub.load_bundle(copy)
    change_index(copy, model=7)
    with pytest.raises(ValueError, match=r"bundle.json is damaged .*: model: .*, got 7"):
        sqs.hub.load_bundle(copy)
    change_index(copy, format="sae_query_steer.bundle/2")
    with pytest.raises(ValueError, match="got 'sae_query_steer.bundle/2'"):
        sqs.hub.load_bundle(copy)


def test_the_registry_block_names_every_head_with_its_metrics(folder, saes):
    text = sqs.hub.registry_entry(
        folder,
        release="tiny-llama-queries",
        repo_id="alice/bundle",
        neuronpedia={"blocks.2.attn.hook_q.3": "tiny-llama/2-att-q-3"},
    )
    block = yaml.safe_load(text)["tiny-llama-queries"]
    assert (block["repo_id"], block["model"]) == ("alice/bundle", "alice/tiny-llama")
    assert len(block["saes"]) == 8
    last = block["saes"][-1]
    row = saes.metrics.set_index(["layer", "head"]).loc[(2, 3)]
    assert last == {
        "id": "blocks.2.attn.hook_q.3",
        "path": "heads/blocks.2.attn.hook_q.3",
        "l0": round(float(row["l0"]), 4),
        "variance_explained": round(float(row["explained_variance"]), 4),
        "neuronpedia": "tiny-llama/2-att-q-3",
    }
    assert "neuronpedia" not in block["saes"][0]
    with pytest.raises(ValueError, match="must have ids of the bundle's SAEs, .* got 'x'"):
        sqs.hub.registry_entry(folder, release="r", repo_id="a/b", neuronpedia={"x": "y"})
    with pytest.raises(ValueError, match="Repo id"):
        sqs.hub.registry_entry(folder, release="r", repo_id="not a repo!")
    with pytest.raises(ValueError, match="release must be the name of the release, got ' '"):
        sqs.hub.registry_entry(folder, release=" ", repo_id="a/b")


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(folder):
    upload = sqs.hub.push_to_hub(folder, "alice/bundle", dry_run=True)
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(upload.files) == there
    assert upload.url is None
    assert upload.n_bytes == sum(upload.files.values()) > 50_000
    with pytest.raises(ValueError, match="Repo id"):
        sqs.hub.push_to_hub(folder, "not a name/at all/", dry_run=True)


def test_a_folder_stands_for_a_repository(folder, tiny_models, tmp_path):
    assert list(sqs.from_pretrained(folder, model=tiny_models["bridge"]).saes) == HOOKS
    with pytest.raises(FileNotFoundError, match="no folder .*those are user/repository"):
        sqs.from_pretrained(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="no folder bundel, and no name on the hub either"):
        sqs.from_pretrained("bundel")
    with pytest.raises(FileNotFoundError, match="is no bundle: it has no bundle.json"):
        sqs.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a folder here, which has no revision 'v2'"):
        sqs.from_pretrained(folder, revision="v2")


def test_the_commands(tmp_path, tiny_folder, saes, targets, steerer):
    saes.save(tmp_path / "saes")
    targets.save(tmp_path / "targets")
    sqs.steering.save_steerer(steerer, tmp_path / "steerer", saes="../saes", targets="../targets")
    pd.DataFrame({"a": [1]}).to_csv(tmp_path / "scores.csv", index=False)
    arguments = [
        *("bundle", "--model", tiny_folder, "--device", "cpu", "--saes", tmp_path / "saes"),
        *("--steerer", tmp_path / "steerer", "--evaluation", tmp_path / "scores.csv"),
        *("--license", "mit", "--out", tmp_path / "bundle"),
    ]
    run = invoke(arguments, catch=False)
    assert "read its README.md" in run.output
    bundle = sqs.hub.load_bundle(tmp_path / "bundle")
    assert steerer_settings(bundle.steerer) == steerer_settings(steerer)
    assert bundle.evaluation["a"].tolist() == [1]
    pushed = invoke(["push", tmp_path / "bundle", "alice/b", "--dry-run"], catch=False)
    assert re.search(r"would send \d+ files, [\d,]+ bytes, to alice/b", pushed.output)
    entry = ["registry-entry", str(tmp_path / "bundle"), "--release", "r", "--repo-id", "alice/b"]
    printed = invoke([*entry, "--neuronpedia", "blocks.0.attn.hook_q.1", "x"], catch=False)
    assert yaml.safe_load(printed.output)["r"]["saes"][1]["neuronpedia"] == "x"


def test_words_of_the_tiny_model_are_not_in_the_bundle(folder):
    text = "".join(p.read_text() for p in folder.rglob("*.json"))
    assert not any(f'"{word} ' in text for word in WORDS)


PLAIN = """
import sys
from pathlib import Path

sys.modules["sae_query_steer"] = None  # importing it raises
from safetensors.torch import load_file
from sae_lens import SAE

bundle, file = map(Path, sys.argv[1:])
given, worst = load_file(file), []
for path in sorted((bundle / "heads").iterdir()):
    sae = SAE.load_from_disk(path)
    hook, head = sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_head_index
    queries, ours = (given[f"{part}.{hook}"][:, head] for part in ("queries", "decoded"))
    worst.append(float((sae(queries) - ours).norm() / ours.norm()))
assert len(worst) == 9 and max(worst) < 1e-5, worst
print("read by SAELens alone")
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*heads explain less variance:UserWarning")
@pytest.mark.filterwarnings("ignore::sae_query_steer.learning.learner.LearningWarning")
def test_saelens_alone_reads_the_saes_of_a_learned_steer_of_smollm2(tmp_path):
    try:
        model = sqs.load_smollm2()
    except (FileNotFoundError, ImportError) as error:
        pytest.skip(str(error))
    answers = {"create": " Invent a new kind of ", "remember": " Name the parts of a "}
    things = ["boat", "clock", "garden", "bridge", "kite", "drum", "lamp", "stove"]
    labelled = [
        sqs.LabelledExample(prompt=f"About the {thing}:", response=f"{text}{thing}.", label=k)
        for thing in things
        for k, text in answers.items()
    ]
    config = sqs.TrainingConfig(
        sae=sqs.sae.TopK(d_sae_per_head=32, k=4),
        training_tokens=2048,
        train_batch_size_tokens=64,
        context_size=16,
        metric_tokens=128,
        lr=3e-3,
    )
    texts = [example.prompt + example.response for example in labelled]
    saes = sqs.train_query_saes(model, texts, sqs.query_sites(model, [12]), config)
    moves = sqs.learning.no_moves(model, saes, list(answers))
    settings = {"objective": sqs.objectives.FixedMove(), "n_steps": 1, "step_size": 1.0}
    recipe = sqs.LatentGradientSteerer(saes, moves, target="create", **settings)
    learner = sqs.TargetLearner(model, recipe, n_updates=2, every=1, batch_size=8)
    learned = learner.fit(sqs.tokenize_examples(model, labelled))
    steerer = dataclasses.replace(recipe, targets=learned)
    sqs.hub.save_bundle(tmp_path / "bundle", model, saes, steerer=steerer)
    bundle = sqs.from_pretrained(tmp_path / "bundle", model=model)
    assert bundle.steerer.targets.are_moves
    _, cache = model.run_with_cache(texts[0], names_filter=list(saes))
    tensors = {}
    for name, sae in saes.items():
        tensors[f"queries.{name}"] = cache[name][0].contiguous()
        tensors[f"decoded.{name}"] = sae(cache[name][0]).detach().contiguous()
    save_file(tensors, tmp_path / "queries.safetensors")
    arguments = [sys.executable, "-c", PLAIN, tmp_path / "bundle", tmp_path / "queries.safetensors"]
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True)
    assert done.stdout == "read by SAELens alone\n", done.stderr[-2000:]
