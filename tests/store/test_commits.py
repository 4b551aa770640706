"""Commits: canonical, read strictly, their ids their content."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.store.commits import KINDS, ROLES, Commit, Parent, decode_commit, default_author, timestamp_now
from mergepipe.store.digest import Digest
from mergepipe.store.errors import BadInputError

digests = st.binary(min_size=32, max_size=32).map(Digest)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
commits = st.builds(
    Commit,
    tree=digests,
    parents=st.lists(st.builds(Parent, commit=digests, role=st.sampled_from(ROLES), name=text), max_size=4).map(tuple),
    kind=st.sampled_from(KINDS),
    message=text,
    author=text,
    time=text,
    tool=text,
    plan=st.none() | digests,
    measured=st.dictionaries(text, st.integers() | st.floats(allow_nan=False, allow_infinity=False), max_size=4),
)
GOOD = Commit(Digest(b"\1" * 32), (Parent(Digest(b"\2" * 32), "base", "b"),), "ingest", "m", "a", "t", "x")


@given(commits)
def test_they_come_back(commit: Commit) -> None:
    data = commit.encode()
    again = decode_commit(data, "x")
    assert again == commit
    assert again.encode() == data
    assert again.id == commit.id


@given(commits, commits)
def test_ids_are_those_of_the_content(one: Commit, other: Commit) -> None:
    assert (one.id == other.id) == (one.encode() == other.encode())


def test_the_first_parent_in_a_role_is_found() -> None:
    first, second = Parent(Digest(b"\3" * 32), "expert", "e1"), Parent(Digest(b"\4" * 32), "expert", "e2")
    commit = replace(GOOD, parents=(*GOOD.parents, first, second))
    assert commit.parent("expert") == first
    assert commit.parent("base") == GOOD.parents[0]
    assert commit.parent("previous") is None


def changed(**fields: Any) -> bytes:
    value = json.loads(GOOD.encode())
    for name, content in fields.items():
        if content is ...:
            del value[name]
        else:
            value[name] = content
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"3",
        changed(tree="x"),
        changed(tree=None),
        changed(tree=...),
        changed(extra=1),
        changed(kind="guess"),
        changed(parents=[{"commit": "0" * 64, "role": "uncle", "name": ""}]),
        changed(parents=[{"commit": "0" * 64, "role": "base"}]),
        changed(parents=[["0" * 64]]),
        changed(parents=3),
        changed(plan="x"),
        changed(measured=[]),
    ],
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BadInputError, match="commit 123"):
        decode_commit(data, "commit 123")


def test_times_are_in_utc_and_sort_as_text() -> None:
    one, other = timestamp_now(), timestamp_now()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", one)
    assert one <= other


def test_whom_the_system_does_not_know_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MP_AUTHOR", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    assert default_author() == "unknown"


def test_the_author_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MP_AUTHOR", "Ada")
    assert default_author() == "Ada"
    monkeypatch.delenv("MP_AUTHOR")
    assert default_author()
