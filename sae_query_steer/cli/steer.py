"""`targets`, `sites` and `steer`: what follows `train`."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import sae_query_steer as sqs
from sae_query_steer.arguments import check_number
from sae_query_steer.cli.options import (
    FLAT,
    Examples,
    Model,
    ModelWithSAEs,
    Optional,
    Output,
    SpanName,
    class_named,
    index_list,
    say,
    show,
    span_of,
)
from sae_query_steer.sites import ALL_HEADS
from sae_query_steer.storage.folders import check_holds

ObjectiveName = Literal[
    "prototype-log-likelihood",
    "squared-distance",
    "centroid-contrast",
    "cosine-similarity",
    "gaussian-log-likelihood",
    "fixed-move",
]

_ACHIEVED = ("class_effect", "class_effect_se", "moved", "moved_control")

_SHOWN = (
    *("layer", "head", "verdict", *_ACHIEVED, "reach", "reach_control"),
    *("achieved_effect", "achieved_moved"),
    *("accuracy_latents", "accuracy_query", "accuracy_position", "accuracy_token", "chance"),
)
"""Columns that `sites` shows, the verdict first; the file has all."""


def targets(*, model: ModelWithSAEs, examples: Examples, output: Output) -> None:
    """Compute the centroid of each class of labelled texts in the latents.

    Args:
        model: the language model and its SAEs.
        examples: the examples.
        output: the folder of centroids.
    """
    output.check("centroids.json")
    import pandas as pd

    labelled = examples.read()
    loaded, saes = model.load_both()
    found = sqs.CentroidTargetBuilder(loaded, saes).fit(examples.tokenized(loaded, labelled))
    found.save(output.out, overwrite=output.overwrite)
    show(pd.DataFrame({"class": map(str, found.classes), "tokens": found.counts.tolist()}))
    say(f"wrote {output.out}")


def sites(
    *,
    model: ModelWithSAEs,
    examples: Examples,
    output: Optional,
    targets: Path | None = None,
    counterparts: Path | None = None,
    n_pairs: int = 64,
    per_head: bool = False,
    seed: int = 0,
) -> None:
    """Measure which sites can be steered: interchange effect, separability, reach, and a verdict.

    Several processes share the layers:
    torchrun --nproc-per-node N --no-python sae-query-steer sites ...

    Args:
        model: the language model and its SAEs.
        examples: the examples.
        output: the folder of the table as CSV.
        targets: Folder that `targets` wrote: also steer each site to its centroids.
        counterparts: File like the one of the examples, row by row, in which each prompt is made
            for another class: its queries are patched in, and a change of queries that leads there
            is learned at each site (reach), which takes longer than all else.
        n_pairs: Pairs for the interchange effect.
        per_head: Also measure and show every head alone.
        seed: Random seed.
    """
    output.check("sites.csv")
    import pandas as pd

    from sae_query_steer.diagnostics.verdicts import closing_sentence
    from sae_query_steer.models.launch import launched
    from sae_query_steer.storage.csv_files import csv_text

    files = [examples]
    if counterparts is not None:
        if examples.long == "drop":
            raise ValueError(
                "--long must not be drop with --counterparts: other rows of the two files may be "
                "too long; use cut-start, cut-end or refuse"
            )
        files.append(replace(examples, csv=counterparts))
    labelled = [file.read() for file in files]
    if len({tuple(example.place for example in rows) for rows in labelled}) > 1:
        raise ValueError(
            f"--counterparts must have a row for each of the {len(labelled[0])} examples, in the "
            f"same place of the file, got {len(labelled[1])}"
        )
    centroids = None if targets is None else sqs.CentroidTargets.load(targets)
    with launched() as ranks:
        loaded, saes = model.load_both()
        read = zip(files, labelled, strict=True)
        tokenized, *others = [file.tokenized(loaded, rows) for file, rows in read]
        settings: dict[str, Any] = {"n_pairs": n_pairs, "per_head": per_head, "seed": seed}
        if others:
            settings["counterparts"] = others[0]
        share = None
        if own := {name: saes[name] for name in ranks.own(list(saes))}:
            share = _sites_table(loaded, own, tokenized, centroids, settings)
        shares = [one for one in ranks.gathered(share) if one is not None]
        table = pd.concat(shares).sort_values("layer", kind="stable", ignore_index=True)
        table = sqs.diagnostics.site_verdicts(table)
    say(f"\n{closing_sentence(table)}\n")
    of_layer = table["head"] == ALL_HEADS
    show(table[of_layer].filter(_SHOWN).drop(columns="head"))
    if per_head:
        say("")
        show(table[~of_layer].filter(_SHOWN))
    if ranks.rank == 0:
        output.write({"sites.csv": csv_text(table)})


def _sites_table(
    model: Any,
    saes: "dict[str, sqs.QueryHeadSAE]",
    tokenized: Any,
    centroids: "sqs.CentroidTargets | None",
    settings: dict[str, Any],
) -> Any:
    """Return all measures of the sites of some SAEs, with a row for each site and head."""
    apart = sqs.diagnostics.separability(model, saes, tokenized, seed=settings["seed"])
    chosen = sqs.query_sites(model, [int(layer) for layer in apart["layer"].unique()])
    moved = sqs.diagnostics.interchange_effect(model, chosen, tokenized, **settings)
    table = moved.merge(apart, on=["layer", "head"], how="left")
    if centroids is not None:
        one_step = {"objective": sqs.SquaredDistance(), "n_steps": 1, "step_size": 1.0}
        steerer = sqs.LatentGradientSteerer(
            saes, centroids, target=centroids.classes[0], **one_step
        )
        achieved = sqs.diagnostics.achieved_effect(model, steerer, tokenized, **settings)
        names = {name: f"achieved_{name.removeprefix('class_')}" for name in _ACHIEVED}
        achieved = achieved[["layer", "head", *_ACHIEVED]].rename(columns=names)
        table = table.merge(achieved, on=["layer", "head"])
    if "counterparts" in settings:
        learning = {name: value for name, value in settings.items() if name != "n_pairs"}
        reached = sqs.diagnostics.reach(model, chosen, tokenized, **learning, control=True)
        table = table.merge(reached, on=["layer", "head"])
    return table


@dataclass(frozen=True, kw_only=True)
class DescentOptions:
    """A descent to centroids."""

    saes: Path | None = None
    """Folder that `train` wrote."""

    targets: Path | None = None
    """Folder that `targets` wrote."""

    objective: ObjectiveName = "prototype-log-likelihood"
    """What descent lowers; fixed-move for learned moves."""

    n_steps: int = 20
    """Gradient steps at each token."""

    step_size: float = 1.0
    """Size of a step."""

    scope: SpanName = "last-prompt-token"
    """Tokens at which queries are changed."""

    layers: str = "all"
    """Layers, such as 1,2 or 8-20 or all."""

    def __post_init__(self) -> None:
        if self.saes is not None:
            check_holds(self.saes, "query_saes.json", "a folder that train wrote")
        index_list(self.layers)
        check_number("--n-steps", self.n_steps, whole=True, least=0)
        check_number("--step-size", self.step_size, least=0)

    def over(self, saes: Any, targets: Any, target: str) -> "sqs.LatentGradientSteerer":
        """Return the steerer over some SAEs and centroids."""
        return sqs.LatentGradientSteerer(
            saes,
            targets,
            target=target,
            objective=class_named(self.objective, sqs.objectives)(),
            n_steps=self.n_steps,
            step_size=self.step_size,
            scope=span_of(self.scope),
            layers=index_list(self.layers),
        )


def steer(
    *,
    model: Model,
    output: Optional,
    descent: Annotated[DescentOptions, FLAT],
    target: str,
    prompt: str,
    steerer: Path | None = None,
    max_new_tokens: int = 40,
) -> None:
    """Continue a prompt greedily, without and with steering, and show the trace.

    The prompt is put into the chat template if the texts of the targets were.

    Args:
        model: the language model.
        output: the folder of texts (JSON) and trace (CSV).
        descent: SAEs, centroids and settings of a descent.
        target: Class to steer towards.
        prompt: The prompt.
        steerer: Folder of a steerer, such as `trial` wrote, instead of --saes, --targets and their
            settings.
        max_new_tokens: Tokens to generate.
    """
    output.check("texts.json")
    check_number("--max-new-tokens", max_new_tokens, whole=True, least=1)
    if steerer is not None and descent != DescentOptions():
        raise ValueError("--steerer has its own settings: leave out --saes, --targets and theirs")
    if steerer is not None:
        saved = sqs.steering.load_steerer(steerer, follow_references=True)
        if not isinstance(saved, sqs.LatentGradientSteerer):
            raise ValueError(f"{steerer} holds an AttentionSteerer, which has no classes")
        made = replace(saved, target=target)
    elif descent.saes is None or descent.targets is None:
        raise ValueError("--saes and --targets must be given, or --steerer")
    else:
        saes, centroids = (
            sqs.QuerySAEs.load(descent.saes),
            sqs.CentroidTargets.load(descent.targets),
        )
        made = descent.over(saes, centroids, target)
    loaded = model.load()
    made = made.to(str(loaded.cfg.device))
    settings = {"max_new_tokens": max_new_tokens, "chat_template": made.targets.chat_template}
    plain = sqs.compare.continuations(loaded, [prompt], **settings).texts[0]
    with made.apply(loaded, record=True) as trace:
        steered = sqs.compare.continuations(loaded, [prompt], **settings).texts[0]
    say(f"unsteered: {plain}\n\nsteered towards {target}: {steered}\n")
    table = trace.to_dataframe()
    if len(table) == 0:
        say("No token was steered: none of the tokens that were read is in the scope.")
    else:
        show(trace.summary())
    from sae_query_steer.storage.csv_files import csv_text

    texts = {"prompt": prompt, "unsteered": plain, "steered": steered}
    output.write({"texts.json": json.dumps(texts, indent=2), "trace.csv": csv_text(table)})
