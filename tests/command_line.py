"""Run a command in this process, as the entry point does, and keep what it writes."""

import io
import os
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from sae_query_steer.cli.main import run


@dataclass(frozen=True)
class Done:
    """What a command wrote, and how it ended."""

    output: str
    exception: BaseException | None

    @property
    def exit_code(self) -> int:
        return 0 if self.exception is None else 2


def invoke(arguments: Sequence[object], *, catch: bool = True) -> Done:
    """Return what a command did; an option that the parser refuses is a ValueError."""
    written = io.StringIO()
    error: BaseException | None = None
    with (
        redirect_stdout(written),
        redirect_stderr(written),
        patch.dict(os.environ, COLUMNS="400"),
    ):
        try:
            run([str(argument) for argument in arguments])
        except SystemExit as end:
            if end.code:
                error = ValueError(" ".join(written.getvalue().replace("│", " ").split()))
        except (Exception, KeyboardInterrupt) as found:
            if not catch:
                raise
            error = found
    return Done(written.getvalue(), error)
