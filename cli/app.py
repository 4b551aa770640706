"""``mp``: where the process starts, and where every way to end it is decided.

Exit codes: 0, or that of the error (see :mod:`mergepipe.store.errors`); 2 for a command line that cannot be
understood; 130 after Ctrl-C, 143 after SIGTERM, 141 where nobody reads the output any more. The commands are listed in
:mod:`mergepipe.cli.commands`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

# Worker threads do the parallel work; libraries that start threads of their own beneath them only get in their way.
for _variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ.setdefault(_variable, "1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    from mergepipe.cli.failures import report

    words = list(sys.argv[1:] if arguments is None else arguments)
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _run(words or ["--help"])
    except BaseException as error:
        return report(error, as_json="--json" in words)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run(words: list[str]) -> int:
    import typer

    from mergepipe.cli.commands import build

    group = build()
    if "_MP_COMPLETE" in os.environ:
        group.main(args=words, prog_name="mp")
        return 0
    try:
        with group.make_context("mp", words) as context:
            group.invoke(context)
        sys.stdout.flush()
    except typer.Exit as stop:
        sys.stdout.flush()
        return stop.exit_code
    return 0


def _terminate(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
