"""The documents: menu, docstrings, citation and versions."""

import ast
import inspect
import operator
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import sae_query_steer as sqs
from sae_query_steer import integrations

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SPACES = (sqs, sqs.sae, sqs.compare, sqs.toy, sqs.scopes, sqs.steering, sqs.baselines, sqs.hub)
PUBLIC = {
    id(getattr(space, name)): (f"{space.__name__}.{name}", getattr(space, name))
    for space in (*SPACES, sqs.diagnostics, integrations)
    for name in space.__all__
}


def test_every_tutorial_and_every_document_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    for path in (*(ROOT / "tutorials").glob("*.ipynb"), *(ROOT / "docs").glob("*.md")):
        folder = "" if path.parent.name == "docs" else f"{path.parent.name}/"
        assert f" {folder}{path.name}\n" in menu, f"add {folder}{path.name} to mkdocs.yml"


def docstrings(value: object) -> list[str]:
    members = vars(value).values() if inspect.isclass(value) else ()
    functions = [m for m in (value, *members) if inspect.isroutine(m) or inspect.isclass(m)]
    functions += [m.fget for m in members if isinstance(m, property) and m.fget is not None]
    return [inspect.cleandoc(f.__doc__) for f in functions if f.__doc__]


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"<[A-Za-z/!]", "a browser takes it for a tag: put the formula into backticks"),
        (r"(?m)^(Returns|Yields):\n +[^:\n]+:( |$)", "what is before the colon is shown as a type"),
    ],
)
def test_the_docstrings_are_shown_as_they_are_written(pattern, why):
    for path, value in PUBLIC.values():
        for text in docstrings(value):
            plain = re.sub(r"`[^`]*`|\n\n( {4}.*(\n|$))+", "`", text)  # without code
            found = re.search(pattern, plain)
            assert not found, f"{path}: {found and found.group()!r}: {why}"


def test_the_citation_file_is_whole_and_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    papers = [entry["identifiers"][0]["value"] for entry in citation["references"]]
    assert papers == ["arXiv:2502.18644", "arXiv:2605.23040"]
    for entry in citation["references"]:
        assert f"title = {{{entry['title']}}}" in README
        names = [f"{a['family-names']}, {a['given-names']}" for a in entry["authors"]]
        assert f"author = {{{' and '.join(names)}}}" in README
        assert f"year = {{{entry['year']}}}" in README


def test_the_changelog_begins_with_this_version_and_the_date_of_the_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## (\S+) \((\S+)\)$", changelog, re.M)
    assert releases[0] == (PROJECT["version"], str(citation["date-released"]))


def test_the_lines_for_those_who_come_from_another_library_run():
    text = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/coming_from.md", "exec"), names)


def test_every_name_of_the_package_in_the_documents_exists():
    n_names = 0
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```python\n(.*?)```", file.read_text(encoding="utf-8"), re.S):
            for node in ast.walk(ast.parse(block)):
                line = ast.unparse(node) if isinstance(node, ast.ImportFrom | ast.Attribute) else ""
                if re.match(r"from sae_query_steer\b", line):
                    exec(line, {})
                elif re.fullmatch(r"(sqs|sae_query_steer)[.\w]+", line):
                    operator.attrgetter(line.partition(".")[2])(sqs)
                else:
                    continue
                n_names += 1
    assert n_names > 50


@pytest.mark.parametrize(
    ("index", "library", "written"),
    [
        (0, "plotly", "curves.html"),
        (1, "json", "metrics.jsonl"),
        pytest.param(2, "wandb", "wandb/offline-run-*/run-*.wandb", marks=pytest.mark.slow),
        (3, "tensorboard", "runs/saes/events.*"),
    ],
)
@pytest.mark.filterwarnings("ignore::sae_query_steer.learning.learner.LearningWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the trackers
def test_the_examples_of_tracking_run(index, library, written, tiny_models, tmp_path, monkeypatch):
    pytest.importorskip(library, reason=f"{library} is not installed")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "saes.md").read_text(encoding="utf-8").split("## Tracking")[1]
    block = re.findall(r"```python\n(.*?)```", text, re.S)[index]
    model, texts = tiny_models["bridge"], [f"w{i} w{i + 1} w7" for i in range(40)]
    sae = sqs.sae.TopK(d_sae_per_head=8, k=2)
    small = {"training_tokens": 1600, "train_batch_size_tokens": 8, "metric_tokens": 0}
    names = {"sqs": sqs, "model": model, "texts": texts, "sites": sqs.query_sites(model, [1])}
    names["config"] = sqs.TrainingConfig(sae=sae, **small)
    if index == 0:
        sqs.train_query_saes(*list(names.values())[1:], out="saes")
        Path("saes").rename("saes.unfinished")
    if index == 1:
        labels = {"prompt": "w1 w2", "response": " w3 w4"}
        examples = [sqs.LabelledExample(**labels, label="ab"[i % 2]) for i in range(16)]
        names["examples"] = sqs.tokenize_examples(model, examples)
        dense = sqs.sae.identity_encoders(names["sites"])
        settings = {"objective": sqs.objectives.FixedMove(), "n_steps": 1, "step_size": 1.0}
        start = sqs.learning.no_moves(model, dense, ["a", "b"])
        recipe = sqs.LatentGradientSteerer(dense, start, target="a", **settings)
        names["learner"] = sqs.TargetLearner(model, recipe, n_updates=2)
    exec(compile(block, "docs/saes.md", "exec"), names)
    if library == "wandb":  # its own process fills the file; this ends it
        names["wandb"].teardown()
    (file,) = tmp_path.glob(written)
    assert file.stat().st_size > 200
