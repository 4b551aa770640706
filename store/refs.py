"""Names of commits: branches, which move, and tags, which do not; and the ways to write a commit.

``math``            a ref
``3fa9c1``          the beginning of a commit's id, four digits or more, where only one has it
``math~2``          two steps along first parents (the previous commit of the ref, else the base)
``math^2``          the second parent
``math@{1}``        where the ref was one move ago
``math:lm_head.weight``  a tensor of it (only where a command says so)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mergepipe.store.canonical import brief, dump_canonical, load_strict
from mergepipe.store.catalog import Reading
from mergepipe.store.commits import Commit, decode_commit
from mergepipe.store.digest import DIGEST_BYTES, Digest
from mergepipe.store.errors import BadInputError, DamagedError, NotFoundError, UsageError, nearest

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*(/[A-Za-z0-9_][A-Za-z0-9._+-]*)*\Z")
_MAXIMUM_NAME: Final = 200
LOST: Final = b"lost"
_STEP = re.compile(r"(~|\^)(\d{0,9})|@\{(\d{1,9})\}")
_HEX_PREFIX = re.compile(r"[0-9a-f]{4,64}\Z")


@dataclass(frozen=True, slots=True)
class Ref:
    """A name and the commit that it stands for. ``kind``: branch or tag."""

    name: str
    commit: Digest
    kind: str


def check_ref_name(name: str) -> str:
    """The name itself where it is a good one.

    Raises:
        UsageError: it is empty, too long, or has characters that a ref may not have.
    """
    if name == "auto":
        raise UsageError("'auto' cannot be a ref's name: --base auto means something", hint="Choose another name.")
    if len(name) <= _MAXIMUM_NAME and _NAME.match(name) and ".." not in name and not name.endswith(".lock"):
        return name
    raise UsageError(
        f"{name[:80]!r} cannot be a ref's name",
        hint="Use letters, digits and . _ - + / (at most 200), each part beginning with a letter or digit.",
    )


def ref_name_from(text: str) -> str:
    """A good ref name made from a folder's or file's name."""
    cleaned = re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-.+") or "model"
    short = re.sub(r"\.{2,}", ".", cleaned)[:_MAXIMUM_NAME]
    name = re.sub(r"(\.lock)+\Z", "", short)
    return "model-auto" if name == "auto" else name


def ref_name_for(path: Path) -> str:
    """The ref that a checkpoint gets where none is named: its folder's name, or its file's without the suffix."""
    absolute = path.absolute()
    return ref_name_from(absolute.name if absolute.is_dir() else absolute.stem)


def encode_ref(ref: Ref) -> bytes:
    """A ref's catalog row."""
    return dump_canonical({"name": ref.name, "commit": ref.commit.hex(), "kind": ref.kind})


def decode_ref(data: bytes) -> Ref:
    """Inverse of :func:`encode_ref`; raises DamagedError."""
    try:
        value = load_strict(data, "a ref's row")
        return Ref(str(value["name"]), Digest.parse(value["commit"]), str(value["kind"]))
    except (BadInputError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"a ref's row in the catalog cannot be read ({brief(error)})") from error


def all_refs(view: Reading) -> list[Ref]:
    """All refs by name."""
    return [decode_ref(value) for _, value in view.items("refs")]


def find_ref(view: Reading, name: str) -> Ref | None:
    """The ref of that name."""
    data = view.get("refs", name.encode()) if len(name) <= _MAXIMUM_NAME and _NAME.match(name) else None
    return decode_ref(data) if data is not None else None


def require_ref(view: Reading, name: str) -> Ref:
    """The ref of exactly that name; raises NotFoundError that suggests the nearest."""
    found = find_ref(view, name)
    if found is None:
        hint = nearest(name, [ref.name for ref in all_refs(view)]) or "`mp ls` lists the refs."
        raise NotFoundError(f"there is no ref {name!r}", hint=hint)
    return found


def load_commit(view: Reading, digest: Digest) -> Commit:
    """A commit by its id; raises NotFoundError, or DamagedError where the catalog's copy of it cannot be read."""
    data = view.get("commits", digest)
    if data is None:
        raise NotFoundError(
            f"there is no commit {digest.short} in this store",
            hint="`mp log` shows those that there are. One that nothing needed any more went with `mp gc`.",
        )
    try:
        commit = decode_commit(data, f"commit {digest.short}")
        if commit.id != digest:
            raise BadInputError(f"the catalog's copy of commit {digest.short} is not that commit")
        return commit
    except BadInputError as error:
        raise DamagedError(error.message, hint="`mp verify` lists what is damaged.") from error


def known_lost(view: Reading) -> set[Digest]:
    """Commits of the history that a recovery did not find: others were made from them, and nothing can be said of them.

    One that came back since is among them still.
    """
    row = view.get("meta", LOST) or b""
    return {Digest(row[start : start + DIGEST_BYTES]) for start in range(0, len(row) - DIGEST_BYTES + 1, DIGEST_BYTES)}


def resolve(view: Reading, text: str) -> Digest:
    """The commit that ``text`` names, in any of the ways above.

    Raises:
        NotFoundError: nothing has that name; the hint has the nearest ones.
        UsageError: an id prefix that several commits share.
    """
    match = re.search(r"[~^]|@\{", text)
    start, steps = (text[: match.start()], text[match.start() :]) if match else (text, "")
    commit = _start(view, start)
    position = 0
    while position < len(steps):
        step = _STEP.match(steps, position)
        if step is None:
            raise UsageError(f"{text!r} cannot be understood", hint="Write REF, REF~2, REF^2 or REF@{1}.")
        sign, count, ago = step.groups()
        if ago is not None:
            if position:
                raise UsageError(f"{text!r}: @{{n}} follows the ref's name", hint="Write REF@{1}~2.")
            commit = _earlier(view, start, int(ago))
        elif sign == "~":
            for _ in range(int(count or 1)):
                commit = _parent(view, commit, 1, text)
        else:
            commit = _parent(view, commit, int(count or 1), text)
        position = step.end()
    return commit


def _start(view: Reading, name: str) -> Digest:
    ref = find_ref(view, name)
    if ref is not None:
        return ref.commit
    if _HEX_PREFIX.match(name):
        found = list(_with_prefix(view, name))
        if len(found) == 1:
            return found[0]
        if found:
            ids = ", ".join(digest.short for digest in found[:5])
            raise UsageError(f"{name!r} begins several commits: {ids}", hint="Write more digits.")
    known = [ref.name for ref in all_refs(view)]
    hint = nearest(name, known) or ("`mp branch` lists the refs." if known else "The store is empty: `mp ingest`.")
    raise NotFoundError(f"there is no ref or commit {name!r}", hint=hint)


def _with_prefix(view: Reading, prefix: str) -> Iterator[Digest]:
    whole = bytes.fromhex(prefix[: len(prefix) // 2 * 2])
    for key, _ in view.items("commits", whole):
        if key.hex().startswith(prefix):
            yield Digest(key)


def _parent(view: Reading, commit: Digest, number: int, text: str) -> Digest:
    parents = load_commit(view, commit).parents
    if number == 0:
        return commit
    if number > len(parents):
        have = "no parent" if not parents else f"{len(parents)} parents"
        raise NotFoundError(f"{text!r}: commit {commit.short} has {have}", hint="`mp log --graph` shows them.")
    return parents[number - 1].commit


def _earlier(view: Reading, name: str, moves: int) -> Digest:
    rows = view.items("reflog", name.encode() + b"\0", reverse=True)
    past = [_moved_to(name, value) for _, value in rows]
    there = past[moves] if moves < len(past) else None
    if there is None:
        raise NotFoundError(f"{name}@{{{moves}}}: the ref moved only {len(past)} times", hint="`mp log REF --reflog`")
    return there


def _moved_to(name: str, row: bytes) -> Digest | None:
    """Where a row of a ref's log says that it went, None where it was removed; raises DamagedError."""
    try:
        new = load_strict(row, "a reflog row")["new"]
        return None if new is None else Digest.parse(new)
    except (BadInputError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"a row of the log of ref {name!r} cannot be read ({brief(error)})") from error
