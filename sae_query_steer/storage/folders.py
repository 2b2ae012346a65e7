"""Folders: written atomically, and read without following names or links out of them."""

import re
import shutil
import stat
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PureWindowsPath

from filelock import FileLock, Timeout


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Keep other processes and threads from writing a folder or file during the block.

    The lock is `.<name>.lock` beside the path. The system releases it when a process is killed. A
    thread that holds it may take it again.

    Raises:
        BlockingIOError: another process or thread holds the lock.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.parent.resolve() / f".{path.name}.lock"
    lock = FileLock(file, timeout=0, is_singleton=True)
    again = lock.is_locked
    try:
        lock.acquire()
    except Timeout as error:
        raise BlockingIOError(
            f"{path} is being written by another process: wait until that has ended, or give "
            "another folder"
        ) from error
    try:
        yield
    finally:
        if not again:
            with suppress(OSError):  # Windows removes no open file; there filelock does it
                file.unlink()
        lock.release()


def lock_for(owner: object, path: str | Path) -> None:
    """Keep a folder or file `locked` for as long as an object lives.

    Raises:
        BlockingIOError: see `locked`.
    """
    held = ExitStack()
    held.enter_context(locked(path))
    weakref.finalize(owner, held.close)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the file written there replaces `path` at the end.

    After an exception the temporary file is removed and `path` is unchanged.
    """
    aside = path.with_name(f".{path.name}.new")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path, *, overwrite: bool = False, holding: str) -> Iterator[Path]:
    """Yield an empty temporary folder that is renamed to `path` once the block succeeds.

    After an exception the temporary folder is removed and `path` is unchanged. `path` is `locked`
    during the block.

    Args:
        path: the folder to make.
        overwrite: replace an existing folder of the same kind.
        holding: name of a file that identifies folders of this kind.

    Raises:
        BlockingIOError: see `locked`.
        FileExistsError: see `check_replaceable`.
    """
    path = Path(path)
    with locked(path):
        written = written_aside(path)
        aside, old = written.parent, written.with_name("old")
        # What a process left that was killed here: the old folder, if it was between the renames.
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(aside, ignore_errors=True)
        check_replaceable(path, overwrite=overwrite, holding=holding)
        written.mkdir(parents=True)
        try:
            yield written
            check_replaceable(path, overwrite=overwrite, holding=holding)
            if path.exists():
                path.rename(old)
            written.rename(path)
        finally:
            if old.exists() and not path.exists():
                old.rename(path)
            shutil.rmtree(aside, ignore_errors=True)


def written_aside(path: Path) -> Path:
    """Return the temporary folder of `new_folder`, in which other processes can write as well."""
    return path.with_name(f".{path.name}.new") / "new"


def check_replaceable(path: Path, *, overwrite: bool, holding: str) -> None:
    """Raise if `new_folder` may not make or replace a folder.

    Raises:
        FileExistsError: `path` is a link, exists and `overwrite` is False, or is neither empty nor
            a folder with the file `holding`.
    """
    if path.is_symlink():
        raise FileExistsError(f"{path} is a link: give the folder it points to, or another")
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists: give another folder, or overwrite=True")
    if not path.is_dir() or (any(path.iterdir()) and not (path / holding).is_file()):
        raise FileExistsError(
            f"{path} is not replaced: it has no {holding}, so something else wrote it; give "
            "another folder"
        )


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file by its name relative to a folder, if it stays in the folder.

    In a snapshot of Hugging Face's cache, whose files are links to blobs beside it, it may also lie
    elsewhere in the repository's cache folder.

    Args:
        folder: where the name starts.
        name: relative path with forward slashes; the file need not exist.

    Raises:
        ValueError: the name is not a plain relative path, or a link points out of the folder.
    """
    parts = name.split("/") if isinstance(name, str) else [""]
    windows = PureWindowsPath("/".join(parts))
    if {"", ".", ".."} & set(parts) or "\\" in name or windows.drive or not name.isprintable():
        raise ValueError(
            f"{folder} refers to {name!r:.80}: names must be relative paths in the folder, without "
            "'..' and without a leading '/'"
        )
    path = folder / name
    try:
        root = _root_of(folder).resolve()
        real = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long
        raise ValueError(f"{path} can't be read: {error}") from error
    if not real.is_relative_to(root):
        raise ValueError(
            f"{path} is a link to {real}, outside of {root}: links out of a folder are not "
            "followed; if you trust that file, replace the link by a copy (cp -L)"
        )
    return path


def check_holds(folder: Path, name: str, kind: str) -> None:
    """Raise FileNotFoundError unless a folder holds the file that folders of a kind have."""
    if not (folder / name).exists():
        here = "there is no such folder, check the path"
        if folder.is_dir():
            here = f"it holds {sorted(file.name for file in folder.iterdir())[:5]}"
        raise FileNotFoundError(f"no file {folder / name}: {folder} must be {kind}; {here}")


def check_model_folder(name: str) -> None:
    """Raise unless there is a model's config: in a folder, in the cache, or on the hub.

    Raises:
        FileNotFoundError: the message names the path.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    path = Path(name)
    if path.is_dir():
        return check_holds(path, "config.json", "a Hugging Face model folder")
    if path.exists() or path.is_absolute() or name.startswith((".", "~")):
        raise FileNotFoundError(f"no model folder {name}: check the path")
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=10)  # once: transformers asks six times in 24 s
    except Exception as error:  # of whatever HTTP library huggingface_hub uses
        cause = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"no model folder {name!r}, and no model of this name on the hub or in its cache "
            f"({cause}): check the path"
        ) from error


def _root_of(folder: Path) -> Path:
    here = folder.resolve()
    for snapshot in (here, *here.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and re.match(
            "(models|datasets|spaces)--", repository.name
        ):
            return repository
    return folder


def size_of(path: Path) -> int:
    """Return the size of a regular file in bytes, without opening it (a pipe would block).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a pipe, a device or a socket, or its status can't be read.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"no file {path}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if stat.S_ISDIR(found.st_mode):
        raise FileNotFoundError(f"no file {path}")
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is a pipe, a device or a socket: only regular files are read")
    return found.st_size
