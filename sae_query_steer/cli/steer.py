"""`targets`, `sites` and `steer`: what follows `train`."""

from pathlib import Path

from sae_query_steer.arguments import check_number
from sae_query_steer.cli.options import (
    Examples,
    Model,
    Optional,
    Output,
    Span_,
    Steering,
    Tokens,
    load_saes,
    say,
    show,
)

_ACHIEVED = ("class_effect", "class_effect_se", "moved", "moved_control")

_SHOWN = (
    *("layer", "head", "class_effect", "class_effect_se", "moved", "moved_control"),
    *("achieved_effect", "achieved_moved", "accuracy_latents", "accuracy_query"),
    *("accuracy_position", "accuracy_token", "chance", "verdict"),
)
"""Columns that `sites` shows; the file has all."""


def targets(*, model: Model, examples: Examples, tokens: Span_, output: Output, saes: Path) -> None:
    """Compute the centroid of each class of labelled texts in the latents.

    Args:
        model: the language model.
        examples: the examples.
        tokens: how they are tokenised.
        output: the folder of centroids.
        saes: Folder that `train` wrote.
    """
    output.check("centroids.json")
    examples.check()
    import pandas as pd

    from sae_query_steer.targets.builder import CentroidTargetBuilder

    labelled = examples.read()
    loaded = model.load()
    builder = CentroidTargetBuilder(loaded, load_saes(saes, loaded))
    found = builder.fit(tokens.tokenize(loaded, labelled))
    found.save(output.out, overwrite=output.overwrite)
    show(pd.DataFrame({"class": map(str, found.classes), "tokens": found.counts.tolist()}))
    say(f"wrote {output.out}")


def sites(
    *,
    model: Model,
    examples: Examples,
    tokens: Span_,
    output: Optional,
    saes: Path,
    targets: Path | None = None,
    n_pairs: int = 64,
    per_head: bool = True,
    seed: int = 0,
) -> None:
    """Measure which sites can be steered: interchange effect, separability, and a verdict.

    Args:
        model: the language model.
        examples: the examples.
        tokens: how they are tokenised.
        output: the folder of the table as CSV.
        saes: Folder that `train` wrote.
        targets: Folder that `targets` wrote: also steer each site to its centroids.
        n_pairs: Pairs for the interchange effect.
        per_head: Also measure every head alone.
        seed: Random seed.
    """
    output.check("sites.csv")
    examples.check()
    import pandas as pd

    from sae_query_steer.descent.objectives import SquaredDistance
    from sae_query_steer.diagnostics.class_separability import separability
    from sae_query_steer.diagnostics.interchange import achieved_effect, interchange_effect
    from sae_query_steer.diagnostics.verdicts import closing_sentence, site_verdicts
    from sae_query_steer.sites import query_sites
    from sae_query_steer.steering.latent_descent import LatentGradientSteerer
    from sae_query_steer.storage.folders import new_folder
    from sae_query_steer.targets.centroids import CentroidTargets

    centroids = None if targets is None else CentroidTargets.load(targets)
    labelled = examples.read()
    loaded = model.load()
    encoders = load_saes(saes, loaded)
    tokenized = tokens.tokenize(loaded, labelled)
    patched = {"n_pairs": n_pairs, "per_head": per_head, "seed": seed}
    apart = separability(loaded, encoders, tokenized, seed=seed)
    chosen = query_sites(loaded, [int(layer) for layer in apart["layer"].unique()])
    moved = interchange_effect(loaded, chosen, tokenized, **patched)
    table = moved.merge(apart, on=["layer", "head"], how="left")
    if centroids is not None:
        steerer = LatentGradientSteerer(
            encoders,
            centroids,
            target=centroids.classes[0],
            objective=SquaredDistance(),
            n_steps=1,
            step_size=1.0,
        )
        steered = achieved_effect(loaded, steerer, tokenized, **patched)
        names = {name: f"achieved_{name.removeprefix('class_')}" for name in _ACHIEVED}
        achieved = pd.DataFrame(steered[["layer", "head", *_ACHIEVED]]).rename(columns=names)
        table = table.merge(achieved, on=["layer", "head"])
    table = site_verdicts(table)
    show(pd.DataFrame(table[[name for name in _SHOWN if name in table.columns]]))
    say(closing_sentence(table))
    if output.out is not None:
        with new_folder(output.out, overwrite=output.overwrite, holding="sites.csv") as new:
            table.to_csv(new / "sites.csv", index=False)
        say(f"wrote {output.out}")


def steer(
    *,
    model: Model,
    steering: Steering,
    tokens: Tokens,
    output: Optional,
    saes: Path,
    targets: Path,
    prompt: str,
    max_new_tokens: int = 40,
) -> None:
    """Continue a prompt greedily, without and with steering, and show the trace.

    Args:
        model: the language model.
        steering: how to steer.
        tokens: how the prompt is tokenised.
        output: the folder of texts (JSON) and trace (CSV).
        saes: Folder that `train` wrote.
        targets: Folder that `targets` wrote.
        prompt: The prompt.
        max_new_tokens: Tokens to generate.
    """
    output.check("texts.json")
    if not prompt.strip():
        raise ValueError("--prompt must not be blank")
    check_number("--max-new-tokens", max_new_tokens, whole=True, least=1)
    from sae_query_steer.data.examples import LabelledExample
    from sae_query_steer.data.tokenized import tokenize_example
    from sae_query_steer.models.loading import end_tokens
    from sae_query_steer.storage.folders import new_folder
    from sae_query_steer.storage.records import write_json

    loaded = model.load()
    steerer = steering.steerer(load_saes(saes, loaded), targets)
    given = tokenize_example(
        loaded,
        LabelledExample(prompt=prompt, label="none"),
        prepend_bos=tokens.prepend_bos,
        chat_template=tokens.chat_template,
    ).tokens

    def generate() -> str:
        found = loaded.generate(
            given[None].to(loaded.cfg.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end_tokens(loaded) or None,
            verbose=False,
        )
        return str(loaded.tokenizer.decode(found[0], skip_special_tokens=True))

    plain = generate()
    with steerer.apply(loaded, record=True) as trace:
        steered = generate()
    table = trace.to_dataframe()
    say(f"unsteered: {plain}\n\nsteered towards {steering.target}: {steered}\n")
    if steered == plain:
        say("The text is unchanged.\n")
    if len(table) == 0:
        say("No token was steered: none of the tokens that were read is in the scope.")
    else:
        show(trace.summary())
    if output.out is not None:
        with new_folder(output.out, overwrite=output.overwrite, holding="texts.json") as new:
            table.to_csv(new / "trace.csv", index=False)
            texts = {"prompt": prompt, "unsteered": plain, "steered": steered}
            write_json(new / "texts.json", texts)
        say(f"wrote {output.out}")
