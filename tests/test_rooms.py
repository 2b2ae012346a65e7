"""A file of the package imports only from files above it; the mathematics knows no host."""

import ast
from functools import cache
from pathlib import Path

import pytest

import sae_query_steer

PACKAGE = "sae_query_steer"
FOLDER = Path(sae_query_steer.__file__).parent

# "" is the package itself, which imports everything but the command line.
ORDER = (
    *(
        "bloom",
        "scopes",
        "scopes.contradictions",
        "columns",
        "scopes.positions",
        "scopes.named",
        "scopes.marked",
        "scopes.prompt_lengths",
        "safe_reading",
        "storage",
        "markdown",
        "fingerprint",
        "centroids",
        "descent",
        "descent.goals",
        "descent.objectives",
        "descent.fast",
        "descent.loop",
        "descent.places",
        "descent.strength",
        "descent.latent_choice",
    ),
    *("metrics", "data", "readers", "sites"),
    *(
        "hosts",
        "hosts.models",
        "hosts.attention_parts",
        "hosts.shapes",
        "hosts.block_arguments",
        "hosts.wrapped",
        "hosts.tracking",
        "hosts.scaling",
        "hosts.saelens",
    ),
    *(
        "sae.core",
        "sae.inference",
        "sae.penalty",
        "sae.standard",
        "sae.fused_topk",
        "sae.topk",
        "sae.jumprelu",
        "sae.batchtopk",
        "sae.gated",
        "sae.matryoshka",
        "sae.kl_sparse",
        "sae",
        "sae.reading",
        "sae.collection",
        "sae.encoders",
    ),
    *(
        "sae.heads",
        "token_rows",
        "capture",
        "training",
        "training.stream",
        "training.reconstruction",
        "training.checkpoints",
        "training.resources",
    ),
    *(
        "training.plan",
        "training.estimate",
        "training.train",
        "training.distributed",
        "targets",
        "checks",
        "checks.separability",
    ),
    *(
        "checks.interchange_pairs",
        "checks.next_tokens",
        "checks.query_patches",
        "checks.interchange",
        "checks.site_verdicts",
    ),
    *(
        "steering",
        "steering.attention_trace",
        "steering.trace_html",
        "steering.trace",
        "steering.latent_moves",
        "steering.intervention",
        "steering.attach",
    ),
    *(
        "steering.joined",
        "steering.steerer",
        "checks.achieved",
        "steering.files",
        "baselines",
        "baselines.simple",
        "baselines.decoder_rows",
        "plots",
    ),
    *(
        "latents",
        "latents.partial",
        "latents.moved",
        "latents.attention",
        "latents.top_tokens",
        "latents.texts",
    ),
    *("dashboards", "dashboards.key_matches", "dashboards.statistics"),
    *("dashboards.attention_effect", "dashboards.class_shares", "dashboards.site_data"),
    *("dashboards.page", "dashboards.neuronpedia", "dashboards.writing"),
    *("baselines.residual_stream", "baselines.residual"),
    *("publish.files", "publish.layout", "publish.identity", "publish.card", "publish.bundle"),
    *("publish.saving", "publish.hub", "publish.registry", "publish"),
    *(
        "evaluation.cases",
        "evaluation.scores",
        "evaluation.comparison",
        "evaluation.descents",
        "evaluation.pages",
    ),
    *("evaluation.sampling", "evaluation.generation"),
    *("evaluation.rowwise", "evaluation.query_patch", "evaluation.latent_ablation"),
    *("evaluation.replacement", "evaluation.saes"),
    *("evaluation.axbench", "evaluation.judges"),
    *("evaluation.classifier_judge", "evaluation.endpoint", "evaluation.sweep_log"),
    *("evaluation.text_scorer", "evaluation.sweep", "evaluation.added_methods"),
    *("evaluation.sweep_figures", "evaluation.sweep_report", "evaluation"),
    *("tasks", "tasks.splits", "tasks.word_tokens", "tasks.row_batches", "tasks.tiny_llama"),
    *("tasks.gridworld.grid", "tasks.gridworld.words", "tasks.gridworld.corpus"),
    *("tasks.gridworld.judge", "tasks.gridworld.tokenizer", "tasks.gridworld.batches"),
    *("tasks.gridworld.training", "tasks.gridworld.cases", "tasks.gridworld"),
    *("tasks.tutor.words", "tasks.tutor.corpus", "tasks.tutor.tokenizer"),
    *("tasks.tutor.batches", "tasks.tutor.judges", "tasks.tutor.obedience"),
    *("tasks.tutor.training", "tasks.tutor.pretrained", "tasks.tutor.settings"),
    *("tasks.tutor.cases", "tasks.tutor.preparation", "tasks.tutor.methods"),
    *("tasks.tutor.results", "tasks.tutor.demo", "tasks.tutor.report"),
    "tasks.tutor",
    *(
        "",
        "commands",
        "commands.options",
        "commands.dry_run",
        "commands.train",
        "commands.chain",
        "commands.dashboard",
        "commands.sweep",
        "commands.publish",
        "commands.tutor",
        "cli",
        "__main__",
    ),
)
WITHOUT_HOSTS = ORDER[: ORDER.index("sites") + 1]
HOSTS = {"transformer_lens", "sae_lens"}


def module_name(path: Path) -> str:
    return (
        ".".join(path.relative_to(FOLDER).with_suffix("").parts).removesuffix("__init__").strip(".")
    )


MODULES = {module_name(path): path for path in FOLDER.rglob("*.py")}


@cache
def imported(module: str) -> frozenset[str]:
    """Full names of all modules that a module of the package imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module or PACKAGE} has a relative import; write it in full"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = {name for name in full if name.removeprefix(f"{PACKAGE}.") in MODULES}
            names |= submodules if submodules == full else submodules | {node.module}
    return frozenset(names)


def imported_rooms(module: str) -> set[str]:
    """Names, within the package, of the modules of the package that a module imports."""
    inside = {name for name in imported(module) if name.split(".")[0] == PACKAGE}
    return {name.removeprefix(PACKAGE).removeprefix(".") for name in inside}


def with_all_below(module: str) -> set[str]:
    """The module and every module of the package that it leads to."""
    seen, open_ = set(), [module]
    while open_:
        if (name := open_.pop()) not in seen:
            seen.add(name)
            open_ += imported_rooms(name)
    return seen


def test_every_file_has_its_place_in_the_order():
    assert sorted(MODULES) == sorted(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_a_file_imports_only_from_files_above_it(module):
    assert imported_rooms(module) <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize("module", WITHOUT_HOSTS)
def test_the_mathematics_and_the_data_lead_to_no_host(module):
    for name in with_all_below(module):
        assert not {outer.split(".")[0] for outer in imported(name)} & HOSTS
