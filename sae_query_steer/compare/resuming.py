"""Write a comparison to a folder; a run that was stopped continues from its log."""

import shutil
from collections.abc import Callable
from pathlib import Path

from sae_query_steer.compare.comparison import Comparison
from sae_query_steer.compare.report import RESULTS, write_comparison
from sae_query_steer.storage.folders import check_replaceable


def compare_into(
    out: str | Path,
    compare: Callable[[Path], Comparison],
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Comparison:
    """Run a comparison and write it to a folder.

    Until it is done, its log is in `<out>.unfinished`.

    Args:
        out: the folder; see `write_comparison`.
        compare: the comparison, from the path of its log.
        resume: continue a run of the same settings that was stopped.
        overwrite: replace a comparison that is there.

    Raises:
        FileExistsError: the folder exists and `overwrite` is False, or is something else; or a
            stopped run is there and `resume` is False. Both before anything runs.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists: give another folder, or --overwrite")
    check_replaceable(out, overwrite=overwrite, holding=RESULTS)
    unfinished = out.with_name(f"{out.name}.unfinished")
    if unfinished.exists() and not resume:
        raise FileExistsError(
            f"{unfinished} holds a run that was stopped: continue it with --resume, or delete it"
        )
    found = compare(unfinished / "log.jsonl")
    write_comparison(found, out, overwrite=overwrite)
    shutil.rmtree(unfinished)
    return found
