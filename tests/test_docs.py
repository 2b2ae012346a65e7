"""The documents: every public name is in the reference, and what they say of the package is so."""

import inspect
import re
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest
import yaml

import sae_query_steer as sqs
import sae_query_steer.compare
import sae_query_steer.sae
import sae_query_steer.toy

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = (
    sqs,
    sqs.sae,
    sqs.compare,
    sqs.toy,
)
PUBLIC = {
    id(getattr(module, name)): (f"{module.__name__}.{name}", getattr(module, name))
    for module in reversed(MODULES)
    for name in module.__all__
}


def documented(line: str) -> object:
    """What a line `::: a.b.c` of a page stands for; where a module has the name, the module."""
    path = line.removeprefix(":::").strip()
    owner, _, name = path.rpartition(".")
    file = ROOT.joinpath(*path.split("."))
    if file.is_dir() or file.with_suffix(".py").is_file():
        return import_module(path)
    return getattr(import_module(owner), name)


LINES = [
    (page.name, line, documented(line))
    for page in PAGES
    for line in page.read_text(encoding="utf-8").splitlines()
    if line.startswith(":::")
]


def test_every_public_name_is_in_the_reference_once():
    lines = [(page, line, id(value)) for page, line, value in LINES]
    found = [key for _, _, key in lines]
    missing = [f"::: {path}" for key, (path, _) in PUBLIC.items() if key not in found]
    pages = ", ".join(page.name for page in PAGES)
    assert not missing, f"add these lines, each to one page of docs/reference ({pages}): {missing}"
    twice = sorted({line for _, line, key in lines if key in PUBLIC and found.count(key) > 1})
    assert not twice, f"leave each of these lines on one page of docs/reference: {twice}"


def test_the_reference_names_no_module_where_a_function_of_the_same_name_is_meant():
    modules = [(page, line) for page, line, value in LINES if isinstance(value, ModuleType)]
    assert not modules, (
        f"{modules} are modules: MkDocs would show all that is in them; write ::: module.function"
    )


def test_every_page_of_the_reference_and_every_tutorial_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    for path in (*PAGES, *(ROOT / "tutorials").glob("*.ipynb"), *(ROOT / "docs").glob("*.md")):
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


def test_the_badges_say_what_pyproject_says():
    versions = {re.split(r"[><=]", line)[0]: line for line in PROJECT["dependencies"]}
    badges = re.findall(r"!\[([^\]]*)\]\(https://img\.shields\.io/badge/(\S+)-blue\)", README)

    def in_words(requirement: str) -> str:
        least, *below = re.findall(r"[><]=?([\d.]+)", requirement)
        return f"{least} or newer" + "".join(f", below {version}" for version in below)

    said = [alt for alt, _ in badges]
    assert said == [
        f"Python {in_words(PROJECT['requires-python'])}",
        f"TransformerLens {in_words(versions['transformer-lens'])}",
        f"SAELens {in_words(versions['sae-lens'])}",
        "types included",
        f"licence {PROJECT['license']}",
    ]
    assert [unquote(picture).replace("-", " ").lower() for _, picture in badges] == [
        alt.lower() for alt in said
    ]
    assert (Path(sqs.__file__).parent / "py.typed").is_file()
    assert "Typing :: Typed" in PROJECT["classifiers"]
    assert README.count("img.shields.io") == len(badges)


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
