"""Commits: who made which tree from what, when, and what it cost.

A commit is canonical JSON with exactly the fields of :class:`Commit`. Its id is the hash of those bytes under the
``commit`` context. Parents stand in the order previous, base, experts; ``ref~1`` follows the first.
"""

from __future__ import annotations

import getpass
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from mergepipe.store.canonical import brief, dump_canonical, load_strict
from mergepipe.store.digest import Digest, hash_record
from mergepipe.store.errors import BadInputError

ROLES: Final = ("previous", "base", "expert")
KINDS: Final = ("ingest", "merge")
_FIELDS: Final = {"author", "kind", "measured", "message", "parents", "plan", "time", "tool", "tree"}


@dataclass(frozen=True, slots=True)
class Parent:
    """A commit that this one was made from, its role, and the name it was asked for by."""

    commit: Digest
    role: str
    name: str = ""

    def as_json(self) -> dict[str, Any]:
        return {"commit": self.commit.hex(), "role": self.role, "name": self.name}


@dataclass(frozen=True, slots=True)
class Commit:
    """One state of one model. ``time`` is UTC, ISO 8601 with microseconds; ``measured`` holds counters."""

    tree: Digest
    parents: tuple[Parent, ...]
    kind: str
    message: str
    author: str
    time: str
    tool: str
    plan: Digest | None = None
    measured: dict[str, int | float] = field(default_factory=dict)

    def encode(self) -> bytes:
        """The commit's canonical bytes."""
        return dump_canonical(
            {
                "tree": self.tree.hex(),
                "parents": [parent.as_json() for parent in self.parents],
                "kind": self.kind,
                "message": self.message,
                "author": self.author,
                "time": self.time,
                "tool": self.tool,
                "plan": self.plan.hex() if self.plan else None,
                "measured": self.measured,
            }
        )

    @property
    def id(self) -> Digest:
        return hash_record("commit", self.encode())

    def parent(self, role: str) -> Parent | None:
        """The first parent in a role."""
        return next((parent for parent in self.parents if parent.role == role), None)


def decode_commit(data: bytes, what: str) -> Commit:
    """Read a commit's bytes strictly; raises BadInputError, whose message begins with ``what``."""
    value = load_strict(data, what)
    try:
        if set(value) != _FIELDS or value["kind"] not in KINDS or not isinstance(value["measured"], dict):
            raise ValueError("the fields are not those of a commit")
        parents = tuple(
            Parent(Digest.parse(p["commit"]), _one_of(p["role"], ROLES), str(p["name"])) for p in value["parents"]
        )
        return Commit(
            tree=Digest.parse(value["tree"]),
            parents=parents,
            kind=value["kind"],
            message=str(value["message"]),
            author=str(value["author"]),
            time=str(value["time"]),
            tool=str(value["tool"]),
            plan=Digest.parse(value["plan"]) if value["plan"] else None,
            measured=value["measured"],
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInputError(f"{what}: not a commit ({brief(error)})") from error


def timestamp_now() -> str:
    """Now, as commits write it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def default_author() -> str:
    """Who commits are by: ``MP_AUTHOR``, else the login name."""
    try:
        return os.environ.get("MP_AUTHOR") or getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


def _one_of(value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"{value!r} is none of {', '.join(known)}")
    return str(value)
