"""`dashboard`, `bundle`, `push` and `registry-entry`: what others can look at and load."""

from dataclasses import replace
from pathlib import Path

import tyro

import sae_query_steer as sqs
from sae_query_steer.cli.options import ModelWithSAEs, Output, Texts, index_list, say, show


def dashboard(
    *,
    model: ModelWithSAEs,
    texts: Texts,
    output: Output,
    targets: Path | None = None,
    layers: str = "all",
    heads: str = "all",
    k: int = 10,
    n_tokens: int | None = None,
    context_size: int | None = None,
    batch_size: int = 16,
    neuronpedia: bool = False,
) -> None:
    """Write a page for each site that shows its latents; open it in a browser, offline too.

    Args:
        model: the language model and its SAEs.
        texts: the texts.
        output: the folder of pages.
        targets: Folder that `targets` wrote: also show the classes.
        layers: Layers, such as 1,2 or 8-20 or all.
        heads: Heads, such as 0,2 or 0-7 or all.
        k: Top texts of each latent.
        n_tokens: Tokens to read; all if unset.
        context_size: Tokens of a row; the model's context if unset.
        batch_size: Rows of a forward pass.
        neuronpedia: Also write SAEDashboard's batches of features.
    """
    output.check("dashboards.json")
    chosen = {"layers": index_list(layers), "heads": index_list(heads)}
    reading = {"n_tokens": n_tokens, "context_size": context_size, "batch_size": batch_size}
    from sae_query_steer.dashboards.writing import write_dashboards

    centroids = None if targets is None else sqs.CentroidTargets.load(targets)
    written = write_dashboards(
        *model.load_both(),
        texts.read(),
        output.out,
        targets=centroids,
        k=k,
        neuronpedia=neuronpedia,
        overwrite=output.overwrite,
        **chosen,
        **reading,
    )
    for page in written.values():
        say(f"wrote {page} ({page.stat().st_size / 1e6:.1f} MB)")


def bundle(
    *,
    model: ModelWithSAEs,
    output: Output,
    targets: Path | None = None,
    steerer: Path | None = None,
    evaluation: Path | None = None,
    model_name: str | None = None,
    license: str | None = None,
    note: str = "",
) -> None:
    """Write SAEs, centroids, steerer and scores to a folder that can be published.

    Args:
        model: the language model and its SAEs.
        output: the folder of the bundle.
        targets: Folder that `targets` wrote.
        steerer: Folder that `save_steerer` wrote.
        evaluation: CSV with a table of scores, such as classes.csv of a comparison.
        model_name: The model's name on the hub.
        license: Licence, such as mit.
        note: A paragraph for the model card.
    """
    output.check("bundle.json")
    from sae_query_steer.storage.csv_files import read_csv_text

    made, centroids = None, None if targets is None else sqs.CentroidTargets.load(targets)
    if steerer is not None:
        made = sqs.steering.load_steerer(steerer, follow_references=True)
    loaded, saes = model.load_both()
    if isinstance(made, sqs.LatentGradientSteerer):
        made = replace(made, saes=saes, targets=centroids or made.targets)
    elif made is not None:
        made = replace(made, saes=saes)
    sqs.hub.save_bundle(
        output.out,
        loaded,
        saes,
        targets=centroids,
        steerer=made,
        evaluation=None if evaluation is None else read_csv_text(evaluation),
        model_name=model_name,
        license=license,
        note=note,
        overwrite=output.overwrite,
    )
    say(f"wrote {output.out}: read its README.md, then push it")


def push(
    folder: tyro.conf.Positional[Path],
    repo_id: tyro.conf.Positional[str],
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
) -> None:
    """Upload a bundle to Hugging Face's hub, in one commit.

    Args:
        folder: Folder that `bundle` wrote.
        repo_id: USER/REPOSITORY on the hub.
        private: Make the repository private; an existing one must be.
        revision: Branch to commit to.
        dry_run: Check everything, and show what would be sent.
    """
    import pandas as pd

    sent = sqs.hub.push_to_hub(folder, repo_id, private=private, revision=revision, dry_run=dry_run)
    show(pd.DataFrame({"file": list(sent.files), "bytes": list(sent.files.values())}))
    what = "would send" if dry_run else "sent"
    say(f"{what} {len(sent.files)} files, {sent.n_bytes:,} bytes, to {sent.url or repo_id}")


def registry_entry(
    folder: tyro.conf.Positional[Path],
    *,
    release: str,
    repo_id: str,
    neuronpedia: dict[str, str] | None = None,
) -> None:
    """Write the block of a bundle for SAELens's pretrained_saes.yaml.

    Args:
        folder: Folder that `bundle` wrote.
        release: Name of the release in SAELens.
        repo_id: USER/REPOSITORY on the hub.
        neuronpedia: Pairs of the ID of an SAE and its ID on Neuronpedia.
    """
    known = neuronpedia or {}
    entry = sqs.hub.registry_entry(folder, release=release, repo_id=repo_id, neuronpedia=known)
    say(entry.rstrip("\n"))
