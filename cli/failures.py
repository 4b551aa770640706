"""How a command that failed says so: a line on stderr, a hint, an exit code; never a traceback for what is expected.

With ``--json`` the error is one JSON object on stderr, and stdout stays empty:
``{"error": KIND, "message": TEXT, "hint": TEXT or null}``.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Final

from mergepipe.cli.terminal import note, paint
from mergepipe.store.errors import MergePipeError, UsageError
from mergepipe.store.filesystem import explain_os_error

INTERRUPTED: Final = 130
_NO_READER: Final = 141


def report(error: BaseException, *, as_json: bool) -> int:
    """Tell the user about an error that ended the command; returns the exit code."""
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has gone (`mp log | head`): not worth a word, also not when Python closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _NO_READER
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        _show({"error": "interrupted", "message": "stopped; the store is as it was", "hint": None}, as_json)
        return INTERRUPTED
    known = _as_known(error)
    if known is not None:
        _show(known.as_json(), as_json)
        return known.exit_code
    import traceback

    traceback.print_exception(error)
    hint = "This is a mistake in mp itself. Please report it with the lines above."
    _show({"error": "internal", "message": f"{type(error).__name__}: {error}", "hint": hint}, as_json)
    return 1


def _as_known(error: BaseException) -> MergePipeError | None:
    if isinstance(error, MergePipeError):
        return error
    if isinstance(error, OSError):
        return explain_os_error(error, "running the command")
    if isinstance(error, MemoryError):
        return _OutOfMemoryError("there is not enough memory for this", hint="Close other programs, and run it again.")
    describe = getattr(error, "format_message", None)  # the command line's parser raises these
    if describe is None:
        return None
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "mp"
    return UsageError(_tidy(str(describe())), hint=f"`{path} --help` shows how it is used.")


class _OutOfMemoryError(MergePipeError):
    kind = "environment"
    exit_code = 8


def _tidy(text: str) -> str:
    text = " ".join(text.split()).rstrip(".")
    return text[:1].lower() + text[1:]


def _show(value: dict[str, object], as_json: bool) -> None:
    try:
        if as_json:
            note(json.dumps(value))
            return
        note(f"{paint('error:', 'red', sys.stderr)} {value['message']}")
        if value["hint"]:
            note(f"{paint('hint:', 'cyan', sys.stderr)} {value['hint']}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
