"""Bundles on Hugging Face's hub: `push_to_hub` and `from_pretrained`."""

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    DryRunFileInfo,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    DryRunError,
    EntryNotFoundError,
    LocalEntryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from sae_query_steer.hub.bundle import Bundle, load_bundle
from sae_query_steer.hub.card import REPOSITORY
from sae_query_steer.hub.layout import BUNDLE, CARD, check_bundle_files, read_index
from sae_query_steer.storage.folders import inside, size_of
from sae_query_steer.storage.records import MAX_JSON


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What `push_to_hub` sent, or would send."""

    repo_id: str
    """The repository."""

    files: Mapping[str, int]
    """Size of each file in bytes, by its path in the repository."""

    url: str | None
    """Address of the commit; None of a dry run, which sends nothing."""

    @property
    def n_bytes(self) -> int:
        """Size of all files together."""
        return sum(self.files.values())


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Upload a bundle of query-head SAEs",
    dry_run: bool = False,
) -> Upload:
    """Upload a bundle in one commit: every file of its list, its list and its card.

    The bundle is read and checked first. What an earlier bundle in the repository lists and this
    one lacks is deleted in the same commit; other files there are left alone. (SAELens's own
    `upload_saes_to_huggingface` sends configs, weights and sparsity alone.)

    Args:
        folder: the bundle, of `save_bundle`.
        repo_id: "user/repository"; it is made if it is not there.
        private: make it private. If it is there already, it must be.
        revision: branch to commit to, made if it is not there; None means main.
        token: access token; None takes the one that `hf auth login` keeps.
        message: message of the commit.
        dry_run: check everything, and say what would be sent, without any network.

    Raises:
        FileExistsError: the repository holds other files than a card, and no bundle.
        FileNotFoundError: a file of the bundle is missing.
        ValueError: the folder is no sound bundle, `repo_id` is no name of a repository, or the
            repository is public and `private` is True.

    Source: our choice.
    """
    validate_repo_id(repo_id)
    folder = Path(folder)
    load_bundle(folder)
    files = read_index(folder).files
    check_bundle_files(folder, files)
    card = inside(folder, CARD)
    sizes = {name: listed.bytes for name, listed in files.items()}
    sizes |= {name: size_of(inside(folder, name)) for name in (BUNDLE, CARD)}
    if sizes[CARD] > MAX_JSON:
        raise ValueError(f"{card} must have at most {MAX_JSON} bytes, got {sizes[CARD]}")
    if dry_run:
        return Upload(repo_id=repo_id, files=sizes, url=None)
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise ValueError(
            f"{repo_id} exists and is public: nothing was sent; make it private on the hub, or "
            "give another repository"
        )
    there = set(api.list_repo_files(repo_id))
    if BUNDLE not in there and (others := sorted(there - {CARD, ".gitattributes"})):
        raise FileExistsError(
            f"{repo_id} holds {len(others)} other files, such as {others[0]}, and no bundle: "
            "nothing was sent; give a repository of its own"
        )
    if revision is not None:  # a new branch begins as main
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = set(api.list_repo_files(repo_id, revision=revision))
    gone: set[str] = set()
    if BUNDLE in there:
        earlier = api.hf_hub_download(repo_id, BUNDLE, revision=revision)
        gone = there & (read_index(Path(earlier).parent).files.keys() - sizes.keys())
    text = card.read_text(encoding="utf-8").replace(REPOSITORY, repo_id)
    operations = [
        *(CommitOperationDelete(path_in_repo=name) for name in sorted(gone)),
        *(CommitOperationAdd(name, str(folder / name)) for name in (*files, BUNDLE)),
        CommitOperationAdd(CARD, text.encode()),
    ]
    commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    return Upload(repo_id=repo_id, files=sizes, url=commit.commit_url)


def from_pretrained(
    repo_id: str | Path,
    *,
    model: Any = None,
    revision: str | None = None,
    device: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Bundle:
    """Return a bundle from the hub, from its cache on this machine, or from a folder.

    The list of files comes first; what is not on it is not fetched, and neither are the files of
    single heads, which are for plain SAELens. Without a network (`HF_HUB_OFFLINE=1`) the cache
    serves.

    Args:
        repo_id: "user/repository", or the folder of a bundle.
        model: a model to check against the fingerprint.
        revision: branch, tag or commit; None means main.
        device: where to put the SAEs; None means where the model is, or the CPU without one.
        token: access token of a private repository.
        cache_dir: cache of the hub; None means Hugging Face's.

    Raises:
        FileNotFoundError: no such folder, a file is missing in it, or the repository is no bundle.
        RepositoryNotFoundError: the hub has no such repository, or not for this token.
        ValueError: what `load_bundle` refuses; a file on the hub is larger than listed; a revision
            of a folder.
    """
    name = str(repo_id)
    if Path(repo_id).is_dir():
        if revision is not None:
            raise ValueError(
                f"{name} is a folder here, which has no revision {revision!r}: leave revision out, "
                "or run where there is no such folder to mean the hub's repository"
            )
        if not (Path(repo_id) / BUNDLE).is_file():
            raise FileNotFoundError(f"the folder {name} is no bundle: it has no {BUNDLE}")
        return load_bundle(repo_id, model=model, device=device)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(
            f"no folder {name}, and no name on the hub either: those are user/repository"
        )
    where = {"revision": revision, "token": token, "cache_dir": cache_dir}
    try:
        planned = hf_hub_download(name, BUNDLE, dry_run=True, **where)
    except LocalEntryNotFoundError:  # without a network, and not in the cache: it says so
        raise
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{name} on the hub is no bundle: it has no {BUNDLE}") from error
    _check_sizes(name, [planned], {BUNDLE: MAX_JSON})
    index = Path(hf_hub_download(name, BUNDLE, **{**where, "revision": planned.commit_hash}))
    wanted = {name: listed.bytes for name, listed in read_index(index.parent).shared.items()}
    commit = {**where, "revision": planned.commit_hash, "allow_patterns": [BUNDLE, *wanted]}
    with suppress(DryRunError):  # without a network: nothing will be fetched
        _check_sizes(name, snapshot_download(name, dry_run=True, **commit), wanted)
    folder = snapshot_download(name, **commit)
    return load_bundle(folder, model=model, device=device)


def _check_sizes(
    repo_id: str, planned: Iterable[DryRunFileInfo], listed: Mapping[str, int]
) -> None:
    """Raise, before anything is fetched, if a file is larger than it may be."""
    for file in planned:
        if file.file_size is not None and file.file_size > listed.get(file.filename, MAX_JSON):
            raise ValueError(
                f"{file.filename} of {repo_id} has {file.file_size} bytes, more than the "
                f"{listed.get(file.filename, MAX_JSON)} that are listed or allowed: nothing "
                "was fetched; ask the repository's owner to save the bundle again"
            )
