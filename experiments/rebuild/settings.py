"""What is compared: expressions in the vocabulary of the old code, which the adapters provide."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One comparison; its results are tensors, tables and texts."""

    name: str
    expression: str
    """Evaluated with the names of an adapter and those of `runner.Names`."""

    kind: str = "value"
    """"generate", "stream", "forward", "hooks", "cache" or "trace" run the model with the steerer
    that the expression gives; "value" keeps what the expression gives."""

    model: str = "tutor"
    backend: str = "bridge"
    use_cache: bool = True
    padded: bool = True
    """Three prompts of unequal length in one batch instead of one prompt."""


ARCHITECTURES = {
    "topk": "k=4",
    "batchtopk": "k=4",
    "standard": "l1_coefficient=0.3",
    "jumprelu": "l0_coefficient=0.2, jumprelu_bandwidth=0.3, decoder_init_norm=1.0",
    "gated": "l1_coefficient=0.3",
    "matryoshka": "k=4, matryoshka_widths=[8, 16, 32]",
    "kl_sparse": "",
}
SCOPES = (
    "EveryPosition()",
    "LastPromptToken()",
    "ResponseTokens()",
    "PromptTokens()",
    "LastPromptTokens(3)",
    "FirstResponseTokens(2)",
    "Window(2, 6)",
    "Window(5)",
    "WindowAroundPromptEnd(-3, 2)",
    "AtPositions([3, 7])",
    "AtPositions([[3], [5, 6], [2, 80]])",
    "RowMask(row_mask)",
    "AfterToken(marker)",
    "AfterToken([marker, marker + 1], inclusive=True)",
    "LastPromptToken() | FirstResponseTokens(3)",
    "PromptTokens() & Window(2, 9)",
    "~PromptTokens() | AtPositions([1])",
    "lambda positions: positions.index % 3 == 1",
)
OBJECTIVES = (
    "SquaredDistance()",
    "PrototypeLogLikelihood()",
    "PrototypeLogLikelihood(temperature=0.5)",
    "CentroidContrast()",
    "CosineSimilarity()",
    "GaussianLogLikelihood(floor=0.3)",
    "LinearProbe(probe(ARCH), bias=0.5)",
    "AutogradObjective(lambda z, goal: (z - goal.point).abs().sum(-1))",
)
CONTROLS = {
    "exponential decay": "scope=WIDE, schedule=ExponentialDecay(2)",
    "linear warm-up": "scope=WIDE, schedule=LinearWarmUp(3)",
    "schedule by function": "scope=WIDE, schedule=lambda age: 1 / (1 + age)",
    "active latents": "latents=ActiveLatents()",
    "top latents": "latents=TopLatents(4)",
    "given latents": "latents=GivenLatents({site: {0: [1, 5, 7], 2: [3]}})",
    "all latents but some": "latents=ExceptLatents({site: {0: [1, 5, 7], 2: [3]}})",
    "gate by posterior": "scope=WIDE, gate=PosteriorBelow(0.9)",
    "gate by latent": "scope=WIDE, gate=LatentAbove(3)",
    "gate by function and choice": (
        "scope=WIDE, gate=lambda z, goal: z.sum(-1) > z.sum(-1).mean(), latents=TopLatents(9)"
    ),
    "until a posterior": "n_steps=30, step_size=0.05, until=0.6",
    "trust radius": "trust_radius=0.7",
    "trust radius, distance": "objective=SquaredDistance(), trust_radius=0.5",
    "relative change": "max_relative_change=0.2",
    "norm kept": "keep_norm=True",
    "norm kept, relative change": "keep_norm=True, max_relative_change=0.3",
    "targets by row": "target=[a, b, c]",
    "steps and sizes by row": "target=[b, a, b], n_steps=[1, 5, 0], step_size=[0.5, 0.2, 1.0]",
    "mixture": "target={a: 1, b: 0.5}",
    "negative weight": "target={a: 1, c: -0.5}, step_size=0.1",
    "mixtures by row, distance": (
        "objective=SquaredDistance(), target=[{a: 1, b: 0.5}, b, {c: 2}], step_size=0.3"
    ),
    "distance, shrink above 1": "objective=SquaredDistance(), step_size=1.4, n_steps=3",
    "one layer": "layers=[first]",
    "heads in another order": "heads=[3, 0], layers=[second]",
    "heads by layer": "heads={first: [1], second: [2, 0]}",
    "no steps": "n_steps=0",
    "size zero": "step_size=0.0",
    "rotated site": "arch='topk-rotated', scope=WIDE",
}
BASELINES = {
    "mean difference": "mean_difference(sites, targets('dense'), target=a, strength=1.5)",
    "mean difference, wide": (
        "mean_difference(sites, targets('dense'), target=b, strength=0.7, scope=WIDE, heads=[1])"
    ),
    "random direction": "RandomDirectionSteerer(steer(target=[a, b, c]), seed=3)",
    "random direction, dense": "RandomDirectionSteerer(steer(arch='dense', scope=WIDE))",
    "decoder rows": "DecoderRowsSteerer(saes('topk'), targets('topk'), target=a, strength=2.0)",
    "decoder rows by row": (
        "DecoderRowsSteerer(saes('standard'), targets('standard'), target=[a, b, c],"
        " strength=[1.0, 0.5, 2.0], m=3, scope=WIDE)"
    ),
    "residual stream": "ResidualMeanDifference(residual, target=a, strength=1.0)",
    "residual stream by row": (
        "ResidualMeanDifference(residual, target=[a, b, c], strength=[1.0, 0.0, 2.0],"
        " layers=[second], scope=WIDE)"
    ),
    "partial": "PartialSteerer(steer(), latents=TopLatents(5))",
    "partial, all but some": (
        "PartialSteerer(steer(objective=SquaredDistance()),"
        " latents=ExceptLatents({site: {0: [1, 5], 1: [2]}}))"
    ),
    "SAEs attached": "attached(saes('topk'))",
    "SAEs attached to some heads": "attached(saes('jumprelu'), heads={first: [1], second: [0, 2]})",
    "SAEs attached with the error": "attached(saes('topk'), layers=[second], error_term=True)",
}
JOINED = {
    "joined, sparse and dense": "JoinedSteerers(steer(scope=WIDE), steer(arch='dense', target=b))",
    "joined, dense and sparse": "JoinedSteerers(steer(arch='dense', target=b), steer(scope=WIDE))",
    "joined, other layers": "JoinedSteerers(steer(layers=[second]), steer(layers=[first]))",
    "joined with a baseline": "JoinedSteerers(steer(), RandomDirectionSteerer(steer(target=b)))",
    "nested": "[steer(scope=WIDE), attached(saes('standard')), steer(arch='dense', target=b)]",
    "nested, residual stream inside": (
        "[steer(), ResidualMeanDifference(residual, target=b, strength=1.0)]"
    ),
}
VALUES = {
    "centroids": "centroid_values(targets(ARCH))",
    "centroids, response": "centroid_values(new_targets(ARCH, ResponseTokens()))",
    "centroids, window": "centroid_values(new_targets(ARCH, WindowAroundPromptEnd(-2, 1)))",
    "separability": "separability(model, saes(ARCH), examples)",
    "separability, response": "separability(model, saes(ARCH), examples, span=ResponseTokens())",
    "interchange": "interchange_effect(model, sites, examples, n_pairs=8)",
    "interchange, counterparts": (
        "interchange_effect(model, sites, examples, counterparts=examples[1:] + examples[:1],"
        " n_pairs=6, per_head=False)"
    ),
    "achieved": (
        "achieved_effect(model, saes(ARCH), targets(ARCH), examples, n_pairs=6, per_head=False)"
    ),
    "achieved, prototype": (
        "achieved_effect(model, saes(ARCH), targets(ARCH), examples, n_pairs=4, n_steps=10,"
        " objective=PrototypeLogLikelihood(), step_size=0.5)"
    ),
    "SAE scores": "evaluate_saes(model, saes(ARCH), rows[:8], heads=[0, 2])",
    "SAE scores, all heads": "evaluate_saes(model, saes(ARCH), rows[:8], per_head=False)",
    "residual means": "residual_values(residual)",
    "top tokens": "top_activating_texts(model, saes(ARCH), texts, site, 1, k=3, context=3)",
    "moved latents": "moved_by(steer(arch=ARCH, target=[a, b, a], scope=WIDE))",
    "attention change": "attention_change_by(steer(arch=ARCH, scope=WIDE))",
}
ONCE = {
    "verdicts": (
        "site_verdicts(interchange_effect(model, sites, examples, n_pairs=8, per_head=False))"
    ),
    "few-shot prompt": "few_shot_prompt(prompts[0], examples, target=a, k=2, seed=1)",
    "sweep": "sweep_tables()",
    "token rows": "token_rows(model, texts, context_size=24)",
    "tokenised examples": "token_values(examples)",
}


def training(architecture: str, options: str, **more: str) -> str:
    """Return the expression that trains an architecture for 50 steps."""
    how = "".join(f", {name}={value}" for name, value in more.items())
    return f"trained('{architecture}', dict({options}){how})"


def every_setting() -> Iterator[Setting]:
    """Yield all settings; models, backends and caching alternate so that all occur everywhere."""
    made = 0

    def place() -> dict:
        nonlocal made
        made += 1
        return {
            "model": ("tutor", "stories")[made % 2],
            "backend": ("bridge", "hooked")[made // 2 % 2],
            "use_cache": made // 4 % 3 != 0,
        }

    for model in ("tutor", "stories"):
        for backend in ("bridge", "hooked"):
            where = {"model": model, "backend": backend}
            for cache in (True, False):
                for padded in (True, False):
                    how = {"use_cache": cache, "padded": padded}
                    tag = f"{model}, {backend}, cache {cache}, padded {padded}"
                    grid = f"grid: sparse, {tag}"
                    yield Setting(
                        name=grid, kind="generate", expression="steer(scope=WIDE)", **where, **how
                    )
            tag = f"{model}, {backend}"
            dense = "steer(arch='dense', scope=WIDE)"
            yield Setting(name=f"grid: dense, {tag}", kind="generate", expression=dense, **where)
            yield Setting(name=f"grid: unsteered, {tag}", kind="generate", expression="[]", **where)
            for kind in ("forward", "hooks", "cache", "stream", "trace"):
                name = f"grid: {kind}, {tag}"
                yield Setting(name=name, kind=kind, expression="steer(scope=WIDE)", **where)
    for scope in SCOPES:
        for arch in ("topk", "dense"):
            yield Setting(
                name=f"scope: {scope}, {arch}",
                kind="generate",
                expression=f"steer(arch='{arch}', scope={scope})",
                **place(),
            )
    for objective in OBJECTIVES:
        for arch in ("topk", "dense", "standard"):
            given = objective.replace("ARCH", f"'{arch}'")
            yield Setting(
                name=f"objective: {objective}, {arch}",
                kind="generate",
                expression=f"steer(arch='{arch}', objective={given}, n_steps=5, step_size=0.1)",
                **place(),
            )
    for arch in ARCHITECTURES:
        for model in ("tutor", "stories"):
            yield Setting(
                name=f"architecture: {arch}, {model}",
                kind="generate",
                expression=f"steer(arch='{arch}', scope=WIDE)",
                **{**place(), "model": model},
            )
    for name, changes in CONTROLS.items():
        yield Setting(
            name=f"control: {name}", kind="generate", expression=f"steer({changes})", **place()
        )
    for part in (BASELINES, JOINED):
        for name, expression in part.items():
            yield Setting(name=f"steer: {name}", kind="generate", expression=expression, **place())
    for name in ("random direction", "decoder rows", "residual stream", "partial"):
        yield Setting(name=f"trace: {name}", kind="trace", expression=BASELINES[name], **place())
    for name, expression in VALUES.items():
        for arch in ("topk", "dense") if "ARCH" in expression else ("",):
            for model in ("tutor", "stories"):
                yield Setting(
                    name=f"value: {name}, {arch}, {model}",
                    expression=expression.replace("ARCH", f"'{arch}'"),
                    **{**place(), "model": model},
                )
    for name, expression in ONCE.items():
        yield Setting(name=f"value: {name}", expression=expression)
    for arch, options in ARCHITECTURES.items():
        yield Setting(name=f"training: {arch}", model="stories", expression=training(arch, options))
    more = {
        "scaled, warm-up": {"lr_warm_up_steps": "10", "lr_decay_steps": "10"},
        "whole documents": {"concat_sequences": "False", "data": "texts"},
        "autocast": {"autocast": "True", "autocast_lm": "True"},
    }
    for name, how in more.items():
        options = "k=4"
        if name.startswith("scaled"):
            options += ", normalize_activations='expected_average_only_in'"
        yield Setting(
            name=f"training: {name}", model="stories", expression=training("topk", options, **how)
        )
    yield Setting(name="training: tutor", expression=training("topk", "k=4"))
