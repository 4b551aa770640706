"""Canonical JSON: one byte string for one value, so that its hash is an id.

UTF-8, keys sorted, no spaces, no NaN or infinities, no escapes beyond those that JSON requires. Reading is strict: a
duplicate key, trailing text, half of a character or absurd nesting is an error.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

from mergepipe.store.errors import BadInputError

_LONGEST_SHOWN: Final = 500


def dump_canonical(value: Any) -> bytes:
    """The canonical bytes of a JSON value; raises ValueError for NaN, infinities and lone surrogates."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def as_text(value: str) -> str:
    """The text itself, or with ``?`` for what is no character: arguments and file names can have such bytes."""
    return value.encode("utf-8", "replace").decode("utf-8")


def brief(value: object) -> str:
    """A value in a message: as text, and not for ever. A stranger's names and numbers have any length."""
    text = str(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def load_strict(data: bytes, what: str) -> Any:
    """Parse JSON from a stranger.

    Raises:
        BadInputError: not JSON, not UTF-8, a duplicate key, a NaN, a number like 1e999, half of a character, or nested
            too deeply; the message begins with ``what``.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(items)
        if len(value) != len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise BadInputError(f"{what}: the key {brief(repr(twice))} stands twice")
        return value

    def refuse(token: str) -> Any:
        raise BadInputError(f"{what}: {token} is not JSON")

    def finite(token: str) -> float:
        value = float(token)
        if math.isinf(value):
            raise BadInputError(f"{what}: {token[:40]} is more than a number can be")
        return value

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=refuse, parse_float=finite)
        if b"\\u" in data:  # an escape can write half a character, which no UTF-8 can
            dump_canonical(value)
        return value
    except UnicodeEncodeError as error:
        raise BadInputError(f"{what}: has half of a character (\\u{ord(error.object[error.start]):04x})") from error
    except UnicodeDecodeError as error:
        raise BadInputError(f"{what}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise BadInputError(f"{what}: nested too deeply") from error
    except ValueError as error:
        raise BadInputError(f"{what}: not valid JSON ({error})") from error
