"""``mp``: where the process starts, and where every way to end it is decided.

Exit codes: 0, or that of the error (see :mod:`mergepipe.store.errors`); 2 for a command line that cannot be
understood; 130 after Ctrl-C, 143 after SIGTERM, 141 where nobody reads the output any more. The commands are listed in
:mod:`mergepipe.cli.commands`.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType

# Worker threads do the parallel work; libraries that start threads of their own beneath them only get in their way.
for _variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ.setdefault(_variable, "1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _listen_for_signals()
    _open_closed_streams()
    try:
        return _run(words or ["--help"])
    except BaseException as error:
        from mergepipe.cli.failures import report

        return report(error, as_json="--json" in words)
    finally:
        if arguments is None:  # the process ends: what is left need not be searched for garbage, twice, on the way out
            gc.freeze()


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


def _open_closed_streams() -> None:
    """Whoever started us may have closed stdout or stderr (``mp ls >&-``); Python then has None there."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115  # stays open as long as the process


class _Interrupt:
    """The first Ctrl-C stops the command, which then cleans up undisturbed; the third ends it at once."""

    def __init__(self) -> None:
        self._presses = 0

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self._presses += 1
        if self._presses == 1:
            raise KeyboardInterrupt
        if self._presses > 2:
            os._exit(128 + number)


def _terminate(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _listen_for_signals() -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody wants it ignored, as nohup does
        signal.signal(signal.SIGINT, _Interrupt())
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


if __name__ == "__main__":
    sys.exit(main())
