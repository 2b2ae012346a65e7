"""`dashboard`, `bundle`, `push` and `registry-entry`: what others can look at and load."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sae_query_steer.cli.options import (
    FLAT,
    Model,
    Output,
    Texts,
    index_list,
    load_saes,
    say,
    show,
)


@dataclass(frozen=True, kw_only=True)
class DashboardOptions:
    """What the pages show."""

    k: int = 10
    """Top texts of each latent."""

    context: int = 12
    """Tokens on either side of a top token."""

    n_attention: int | None = None
    """Top tokens of each latent whose attention is shown; 0 for none."""

    n_keys: int = 8
    """Matching keys of each latent; 0 for none."""

    n_tokens: int | None = None
    """Tokens to read; all if unset."""

    concat_sequences: bool = False
    """Join documents into full rows."""

    context_size: int | None = None
    """Tokens of a row; the model's context if unset, 128 if joined."""

    batch_size: int = 16
    """Rows of a forward pass."""

    prepend_bos: bool = True
    """Begin every row with BOS."""

    neuronpedia: bool = False
    """Also write SAEDashboard's batches of features."""


def dashboard(
    *,
    model: Model,
    texts: Texts,
    output: Output,
    pages: Annotated[DashboardOptions, FLAT],
    saes: Path,
    targets: Path | None = None,
    layers: str = "all",
    heads: str = "all",
) -> None:
    """Write a page for each site that shows its latents; open it in a browser, offline too.

    Args:
        model: the language model.
        texts: the texts.
        output: the folder of pages.
        pages: what they show.
        saes: Folder that `train` wrote.
        targets: Folder that `targets` wrote: also show the classes.
        layers: Layers, such as 1,2 or 8-20 or all.
        heads: Heads, such as 0,2 or 0-7 or all.
    """
    output.check("dashboards.json")
    chosen = {"layers": index_list(layers), "heads": index_list(heads)}
    texts.check()
    from sae_query_steer.dashboards.writing import write_dashboards
    from sae_query_steer.targets.centroids import CentroidTargets

    documents = texts.read()
    centroids = None if targets is None else CentroidTargets.load(targets)
    loaded = model.load()
    written = write_dashboards(
        loaded,
        load_saes(saes, loaded),
        documents,
        output.out,
        targets=centroids,
        overwrite=output.overwrite,
        **chosen,
        **asdict(pages),
    )
    for page in written.values():
        say(f"wrote {page} ({page.stat().st_size / 1e6:.1f} MB)")


def bundle(
    *,
    model: Model,
    output: Output,
    saes: Path,
    targets: Path | None = None,
    steerer: Path | None = None,
    evaluation: Path | None = None,
    model_name: str | None = None,
    license: str | None = None,
    note: str = "",
) -> None:
    """Write SAEs, centroids, steerer and scores to a folder that can be published.

    Args:
        model: the language model.
        output: the folder of the bundle.
        saes: Folder that `train` wrote.
        targets: Folder that `targets` wrote.
        steerer: Folder that `save_steerer` wrote.
        evaluation: CSV with a table of scores.
        model_name: The model's name on the hub.
        license: Licence, such as mit.
        note: A paragraph for the model card.
    """
    output.check("bundle.json")
    import pandas as pd

    from sae_query_steer.hub import save_bundle
    from sae_query_steer.steering import files
    from sae_query_steer.targets.centroids import CentroidTargets

    table = None if evaluation is None else pd.read_csv(evaluation)
    centroids = None if targets is None else CentroidTargets.load(targets)
    stored = None if steerer is None else files.load_steerer(steerer, follow_references=True)
    loaded = model.load()
    encoders = load_saes(saes, loaded)
    made = None
    if stored is not None:
        centroids = stored.targets if centroids is None else centroids
        made = files.steerer_from_settings(files.steerer_settings(stored), encoders, centroids)
    save_bundle(
        output.out,
        loaded,
        encoders,
        targets=centroids,
        steerer=made,
        evaluation=table,
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

    from sae_query_steer.hub import push_to_hub

    sent = push_to_hub(folder, repo_id, private=private, revision=revision, dry_run=dry_run)
    show(pd.DataFrame({"file": list(sent.files), "bytes": list(sent.files.values())}))
    what = "would send" if dry_run else "sent"
    say(f"{what} {len(sent.files)} files, {sent.n_bytes:,} bytes, to {repo_id}")
    if sent.url is not None:
        say(sent.url)


def registry_entry(
    folder: tyro.conf.Positional[Path],
    *,
    release: str,
    repo_id: str,
    neuronpedia: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
) -> None:
    """Write the block of a bundle for SAELens's pretrained_saes.yaml.

    Args:
        folder: Folder that `bundle` wrote.
        release: Name of the release in SAELens.
        repo_id: USER/REPOSITORY on the hub.
        neuronpedia: ID=NEURONPEDIA_ID of an SAE; may be repeated.
    """
    known = {}
    for pair in neuronpedia:
        name, equals, there = pair.partition("=")
        if not (name and equals and there):
            raise ValueError(f"--neuronpedia must be ID=NEURONPEDIA_ID, got {pair!r}")
        known[name] = there
    from sae_query_steer import hub

    entry = hub.registry_entry(folder, release=release, repo_id=repo_id, neuronpedia=known)
    say(entry.rstrip("\n"))
