"""Imports between the folders of the package go one way, from the top layer down."""

import ast
from pathlib import Path

import pytest

import sae_query_steer

PACKAGE = "sae_query_steer"
FOLDER = Path(sae_query_steer.__file__).parent
LAYERS = (
    {"cli"},
    {"integrations"},
    {"compare", "dashboards", "hub"},
    {"baselines", "diagnostics", "plots", "toy"},
    {"learning"},
    {"steering"},
    {"targets", "training"},
    {"models", "sae"},
    {"config", "data", "descent"},
    {"scopes", "sites"},
    {"arguments", "bloom", "progress", "storage"},
)
"""From top to bottom. A folder or root module imports from lower layers and from itself only."""

NO_BACKEND = {"arguments", "data", "descent", "bloom", "progress", "scopes", "sites", "storage"}
"""These import neither TransformerLens nor SAELens."""


def imports(path: Path) -> set[str]:
    """Full names of what a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            if node.module == PACKAGE:
                names |= {f"{PACKAGE}.{alias.name}" for alias in node.names}
            else:
                names.add(str(node.module))
    return names


def part(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


FILES = [path for path in sorted(FOLDER.rglob("*.py")) if path != FOLDER / "__init__.py"]


def part_of(path: Path) -> str:
    return path.relative_to(FOLDER).parts[0].removesuffix(".py")


@pytest.mark.parametrize("name", sorted({part_of(path) for path in FILES}))
def test_a_part_of_the_package_imports_only_from_lower_layers(name):
    layer = next(i for i, parts in enumerate(LAYERS) if name in parts)
    allowed = {name}.union(*LAYERS[layer + 1 :])
    for path in FILES:
        if part_of(path) == name:
            used = {part(i) for i in imports(path) if i.split(".")[0] == PACKAGE}
            front = {""} if name == "cli" else set()  # the command line uses the public names
            assert used <= allowed | front, path


@pytest.mark.parametrize("name", sorted(NO_BACKEND))
def test_the_mathematics_and_the_data_import_no_backend(name):
    for path in FILES:
        if part_of(path) == name:
            roots = {i.split(".")[0] for i in imports(path)}
            assert not roots & {"transformer_lens", "sae_lens"}, path


@pytest.mark.parametrize("stub", sorted(FOLDER.rglob("__init__.pyi")), ids=lambda p: p.parent.name)
def test_no_name_loaded_on_demand_is_that_of_a_module_beside_it(stub):
    """Importing the module would set the attribute of the package to the module."""
    lines = [line for line in ast.parse(stub.read_text()).body if isinstance(line, ast.ImportFrom)]
    names = {alias.name for line in lines if line.module for alias in line.names}
    assert not names & {path.stem for path in stub.parent.iterdir()}
