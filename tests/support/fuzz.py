"""Fuzzing: mutators of bytes, JSON and text, and a runner that holds each kind of input to one property.

The property: an input is read right, or refused with an error of :mod:`mergepipe.store.errors` that says something.
Never another exception, a crash, a hang, or memory out of proportion. What "right" is, each target says
(:mod:`support.fuzz_stores`, :mod:`support.fuzz_catalogs`, :mod:`support.fuzz_files`).

A run is a process of its own, so that a crash is seen and memory can be limited. Each case has its own random numbers,
made from kind, seed and number. To see one again::

    PYTHONPATH=tests python -m support.fuzz ZOO KIND SEED NUMBER --one
"""

from __future__ import annotations

import copy
import faulthandler
import json
import random
import resource
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from mergepipe.store.errors import MergePipeError
from support.hostile import at

SECONDS_A_CASE = 20
ROOM_BYTES = 1 << 30  # address space that may be written to, beyond what is in use when a run begins
GROWTH_BYTES = 400 << 20  # memory that was really used, likewise: inputs have at most some 100 KB
MOST_FAILURES = 5

INTEGERS = [0, 1, 2, 127, 128, 255, 256, 4095, 4096, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32]
INTEGERS += [2**40, 2**48, 2**53, 2**56, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
TEXTS = [
    "", "a", "..", "../x", "/etc/passwd", "a/../../b", "a\\b", "C:x", "\0", "a\0b", "\x1b[2J", "\u00fc", "\ufeff",
    "\u202ex", "\U0001d518" * 9, "\u00e9", "e\u0301", "F32", "BF16", "F4", "0" * 64, "f" * 64, "x" * 5000, "9" * 5000,
    "1e999", "nan", "\u0663", "-1", "0-3", "~", "*", "__metadata__", "__class__", "model.safetensors", "a.b.c",
    "." * 200, "%s%n", "${HOME}",
]  # fmt: skip
_DEEP = [400, 900, 950, 980, 3000]  # around Python's own limit, and beyond


def odd_value(dice: random.Random) -> Any:
    """A JSON value that nobody expects; it may be one that only JSON text can say."""
    match dice.randrange(9):
        case 0:
            return dice.choice(TEXTS)
        case 1:
            return dice.choice(INTEGERS) * dice.choice([1, 1, -1])
        case 2:
            return dice.choice([10**400, -(10**300), 1e308, 5e-324, -0.0, 0.5, float("nan"), float("inf")])
        case 3:
            return dice.choice([None, True, False, [], {}, [[]], {"": None}])
        case 4:
            return [dice.choice(INTEGERS) for _ in range(dice.choice([1, 2, 3, 70, 1000]))]
        case 5:
            value: Any = 1
            for _ in range(dice.choice([3, 3, 60])):
                value = [value] if dice.random() < 0.5 else {"a": value}
            return value
        case 6:
            return {dice.choice(TEXTS): dice.choice(INTEGERS) for _ in range(dice.choice([1, 3, 30]))}
        case 7:
            return [dice.choice(TEXTS) for _ in range(dice.choice([1, 3, 30]))]
    return dice.randbytes(dice.randrange(40)).decode("latin-1")


def _places(value: Any) -> list[tuple[str | int, ...]]:
    """Where there is something in a JSON value."""
    found: list[tuple[str | int, ...]] = []
    waiting: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while waiting:
        path, here = waiting.pop()
        inner = here.items() if isinstance(here, dict) else enumerate(here) if isinstance(here, list) else ()
        for key, item in inner:
            found.append((*path, key))
            if len(path) < 100:
                waiting.append(((*path, key), item))
    return found


def mutate_value(dice: random.Random, value: Any) -> Any:
    """A JSON value with one to three changes: replaced, removed, added, copied, exchanged, nudged."""
    value = copy.deepcopy(value)
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        places = _places(value)
        if not places:
            return odd_value(dice)
        path = dice.choice(places)
        holder, key = at(value, path[:-1]), path[-1]
        match dice.randrange(10):
            case 0 | 1:
                holder[key] = odd_value(dice)
            case 2:
                del holder[key]
            case 3:
                holder[key] = copy.deepcopy(at(value, dice.choice(places)))
            case 4:
                other = dice.choice(places)
                there, its = at(value, other[:-1]), other[-1]
                holder[key], there[its] = copy.deepcopy(there[its]), copy.deepcopy(holder[key])
            case 5 if isinstance(holder, dict):
                holder[dice.choice(TEXTS)] = holder.pop(key)
            case 6 if isinstance(holder, list):
                holder.insert(int(key), copy.deepcopy(holder[int(key)]))
            case 7 | 8 | 9 if type(holder[key]) in (int, float):
                holder[key] += dice.choice([1, -1, 2**32]) if type(holder[key]) is int else 0.5
            case 7 | 8 | 9 if isinstance(holder[key], str) and holder[key]:
                text = holder[key]
                place = dice.randrange(len(text))
                holder[key] = text[:place] + dice.choice(["", "0", "a", "/", ".", text]) + text[place + 1 :]
            case _:
                (holder.append if isinstance(holder, list) else lambda new, into=holder: into.update({"x": new}))(
                    odd_value(dice)
                )
    return value


def json_text(dice: random.Random, value: Any) -> bytes:
    """The JSON text of a value, sometimes with harm that only text can have."""
    data = json.dumps(value, ensure_ascii=dice.random() < 0.5, indent=dice.choice([None, None, 1])).encode(
        "utf-8", "surrogatepass"
    )
    match dice.randrange(60):
        case 0:
            return mutate_bytes(dice, [data])
        case 1:  # a key twice
            return data.replace(b"{", b'{"a": 1, "a": 2, ', 1)
        case 2:
            opening, closing = dice.choice([(b"[", b"]"), (b'{"a":', b"}")])
            depth = dice.choice(_DEEP)
            return opening * depth + data + closing * depth
        case 3:
            place = dice.randrange(len(data) + 1)
            return data[:place] + dice.choice([b"\\ud800", b"\xff\xfe", b"1e999", b"NaN", b"9" * 5000]) + data[place:]
        case 4:
            return data + dice.choice([b" ", b"\n{}", b"\0", b"}", data])
        case 5 if b'"a"' in data:
            depth = dice.choice(_DEEP)
            return data.replace(b'"a"', b"[" * depth + b"]" * depth, 1)
    return data


def mutate_json(dice: random.Random, value: Any) -> bytes:
    return json_text(dice, mutate_value(dice, value))


def mutate_bytes(dice: random.Random, corpus: Sequence[bytes]) -> bytes:
    """One of the inputs with one to four changes: bits, bytes, numbers, pieces cut, doubled, or taken from another."""
    data = bytearray(dice.choice(corpus))
    for _ in range(dice.choice([1, 1, 1, 2, 4])):
        if not data:
            return dice.randbytes(dice.randrange(200))
        # Formats have their numbers at their beginning, or at their end.
        size = len(data)
        near = [dice.randrange(size), dice.randrange(min(size, 128)), size - 1 - dice.randrange(min(size, 64))]
        place, length = dice.choice(near), dice.choice([1, 2, 4, 8, 16, 100, size // 2])
        match dice.randrange(10):
            case 0 | 1:
                data[place] ^= 1 << dice.randrange(8)
            case 2:
                data[place] = dice.choice([0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)])
            case 3:
                del data[place:]
            case 4:
                data[place:place] = data[place : place + length]
            case 5:
                other = dice.choice(corpus)
                data[place:] = other[dice.randrange(len(other) + 1) :] if other else b""
            case 6:
                width = dice.choice([1, 2, 4, 8])
                number = dice.choice(INTEGERS) & ((1 << 8 * width) - 1)
                data[place : place + width] = number.to_bytes(width, dice.choice(["little", "little", "big"]))
            case 7:
                del data[place : place + length]
            case 8:
                data[place : place + length] = bytes(min(length, size - place))
            case 9:
                data[place:place] = dice.randbytes(length if length <= 100 else 8)
    return bytes(data)


_BITS = ["&a ", "*a", "<<: *a", "[", "]", "{", "}", ": ", "- ", "\n", "\t", "!!int ", "null", ".nan", "1e999", "'", '"']
_BITS += [
    "!!python/object/apply:os.system ['x']",
    "%YAML 9.9\n",
    "---\n",
    "...\n",
    "? ",
    "|\n",
    ">-\n",
    "#",
    *TEXTS[:24],
]


def mutate_text(dice: random.Random, corpus: Sequence[str]) -> str:
    """A text of lines with some of them dropped, doubled, moved, or changed."""
    text = dice.choice(corpus)
    for _ in range(dice.randint(1, 4)):
        lines = text.split("\n")
        here, there = dice.randrange(len(lines)), dice.randrange(len(lines))
        match dice.randrange(8):
            case 0:
                del lines[here]
            case 1:
                lines.insert(here, lines[there])
            case 2:
                lines[here] = " " * dice.randint(0, 6) + lines[here].lstrip()
            case 3:
                lines[here], lines[there] = lines[there], lines[here]
            case 4:
                other = dice.choice(corpus).split("\n")
                lines[here:] = other[dice.randrange(len(other)) :]
            case 5:
                key, colon, _ = lines[here].partition(":")
                lines[here] = f"{key}{colon} {json.dumps(odd_value(dice))}"
            case _:
                place = dice.randint(0, len(lines[here]))
                rest = lines[here][place + dice.randint(0, 3) :]
                lines[here] = lines[here][:place] + dice.choice(_BITS) * dice.choice([1, 1, 1, 90]) + rest
        text = "\n".join(lines) or "a"
    return text


class Target(Protocol):
    """One kind of input."""

    def mutate(self, dice: random.Random) -> bytes:
        """An input that was valid once."""

    def check(self, data: bytes) -> str | None:
        """Read it. Raises a MergePipeError, or anything at all where the property does not hold.

        Returns None where it was read right, else the name of an outcome.
        """


class TooSlow(BaseException):  # nobody may catch it
    """A case took longer than any may."""


def _too_slow(*_: object) -> None:
    raise TooSlow(f"more than {SECONDS_A_CASE} seconds")


def dice_of(kind: str, seed: int, number: int) -> random.Random:
    return random.Random(f"{kind}/{seed}/{number}")


def outcome_of(target: Target, data: bytes) -> str:
    """What became of an input: ``right``, or the error's kind; raises where the property does not hold."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS_A_CASE)
    try:
        return target.check(data) or "right"
    except MergePipeError as error:
        assert error.message, "an error that says nothing"
        assert 2 <= error.exit_code <= 8, f"exit code {error.exit_code}"
        assert len(error.message) < 20_000, "an error that nobody can read"
        return error.kind
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def run(target: Target, kind: str, seed: int, count: int, save: Path) -> dict[str, Any]:
    """Run so many cases: counts of outcomes, and the first failures, whose inputs are saved."""
    signal.signal(signal.SIGALRM, _too_slow)
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    for number in range(-3, 0):  # once the right way: whatever is loaded and allocated once is so now
        outcome_of(target, target.mutate(dice_of(kind, seed, number)))
    before = _peak_bytes()
    _limit_memory()
    for number in range(count):
        data = target.mutate(dice_of(kind, seed, number))
        (save / f"{kind}.last").write_text(str(number))
        try:
            outcomes[outcome_of(target, data)] += 1
        except (Exception, TooSlow):
            (save / f"{kind}-{seed}-{number}").write_bytes(data)
            failures.append(f"{kind} {seed} {number}: {data[:200]!r}\n{traceback.format_exc(limit=-6)}")
            if len(failures) >= MOST_FAILURES:
                break
    grown = _peak_bytes() - before
    if grown > GROWTH_BYTES:
        failures.append(f"{kind}: memory grew by {grown >> 20} MiB")
    return {"kind": kind, "outcomes": outcomes, "failures": failures, "grown_bytes": grown}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _limit_memory() -> None:
    status = Path("/proc/self/status").read_text()
    used = int(status.split("VmData:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + ROOM_BYTES, resource.RLIM_INFINITY))


def targets() -> dict[str, Callable[[Path, Path], Target]]:
    """All kinds of input: each makes its target from a zoo of valid ones, and a folder to work in."""
    from support import fuzz_catalogs, fuzz_files, fuzz_stores

    return {**fuzz_stores.TARGETS, **fuzz_catalogs.TARGETS, **fuzz_files.TARGETS}


def main(words: Sequence[str]) -> None:
    zoo, kind, seed, number, *options = words
    faulthandler.enable()
    work = Path(options[0]) if options and options != ["--one"] else Path(zoo) / "work" / kind
    work.mkdir(parents=True, exist_ok=True)
    target = targets()[kind](Path(zoo), work)
    if options == ["--one"]:
        signal.signal(signal.SIGALRM, _too_slow)
        data = target.mutate(dice_of(kind, int(seed), int(number)))
        print(data[:2000])
        print(outcome_of(target, data))
    else:
        print(json.dumps(run(target, kind, int(seed), int(number), work)))


if __name__ == "__main__":
    main(sys.argv[1:])
