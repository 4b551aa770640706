"""Names of commits, and every way to write one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mergepipe.store.catalog import Catalog, open_catalog, release_catalog
from mergepipe.store.commits import Commit, Parent
from mergepipe.store.digest import Digest
from mergepipe.store.errors import DamagedError, NotFoundError, UsageError
from mergepipe.store.publish import Changes, RefUpdate, publish
from mergepipe.store.refs import (
    Ref,
    all_refs,
    check_ref_name,
    decode_ref,
    encode_ref,
    find_ref,
    load_commit,
    ref_name_for,
    ref_name_from,
    require_ref,
    resolve,
)


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = open_catalog(tmp_path, create=True)
    yield opened
    release_catalog(opened)


class History:
    """Commits and refs made by hand, without objects."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.where: dict[str, Digest | None] = {}

    def commit(self, message: str, *parents: Digest) -> Digest:
        roles = ["previous", "base", "expert", "expert"]
        commit = Commit(
            tree=Digest(b"\7" * 32),
            parents=tuple(Parent(parent, role) for parent, role in zip(parents, roles, strict=False)),
            kind="ingest",
            message=message,
            author="me",
            time="2026-01-01T00:00:00.000000Z",
            tool="test",
        )
        publish(self.catalog, None, Changes(commits=[commit]))
        return commit.id

    def move(self, name: str, new: Digest | None, kind: str = "branch") -> None:
        publish(self.catalog, None, Changes(refs=[RefUpdate(name, self.where.get(name), new, kind)]))
        self.where[name] = new

    def resolve(self, text: str) -> Digest:
        with self.catalog.reading() as view:
            return resolve(view, text)


@pytest.fixture
def history(catalog: Catalog) -> History:
    return History(catalog)


class TestNames:
    @pytest.mark.parametrize(
        "name", ["a", "Qwen3-0.6B", "experts/math", "v1.0+cu12", "_x", "a/b/c", "0", "x" * 200, "a.lock.b"]
    )
    def test_good_ones(self, name: str) -> None:
        assert check_ref_name(name) == name

    @pytest.mark.parametrize(
        "name",
        ["", "/a", "a/", "a//b", "-a", ".a", "a/.b", "a..b", "a b", "a:b", "a~1", "a^", "a@{1}", "é", "a.lock",
         "x" * 201, "a\n", "a\0b", "..", "a\\b", "auto"],
    )  # fmt: skip
    def test_bad_ones(self, name: str) -> None:
        with pytest.raises(UsageError, match="cannot be a ref's name") as caught:
            check_ref_name(name)
        longest = "Use letters, digits and . _ - + / (at most 200), each part beginning with a letter or digit."
        assert caught.value.hint == ("Choose another name." if name == "auto" else longest)
        assert repr(name[:80]) in caught.value.message
        assert repr(name[:81]) not in caught.value.message or len(name) < 81

    @given(st.text(max_size=300))
    @example("auto")
    def test_every_folder_gives_a_good_one(self, text: str) -> None:
        assert check_ref_name(ref_name_from(text))

    @pytest.mark.parametrize(
        ("text", "name"),
        [
            ("Qwen3-0.6B", "Qwen3-0.6B"),
            ("my model (final)", "my-model-final"),
            ("a/b", "a-b"),
            ("...", "model"),
            ("模型", "model"),
            ("a..b", "a.b"),
            (".hidden", "hidden"),
            ("x.lock.lock", "x"),
            ("X-ray", "X-ray"),
            ("auto", "model-auto"),
        ],
    )
    def test_names_made_from_folders(self, text: str, name: str) -> None:
        assert ref_name_from(text) == name

    def test_a_file_gives_its_name_without_what_kind_it_is(self, tmp_path: Path) -> None:
        (tmp_path / "v1.5").mkdir()
        assert ref_name_for(tmp_path / "v1.5") == "v1.5"
        (tmp_path / "v1.5.safetensors").write_bytes(b"")
        assert ref_name_for(tmp_path / "v1.5.safetensors") == "v1.5"

    @given(st.text(max_size=20), st.binary(min_size=32, max_size=32), st.sampled_from(["branch", "tag"]))
    def test_rows_come_back(self, name: str, commit: bytes, kind: str) -> None:
        try:
            name.encode()
        except UnicodeEncodeError:
            return
        ref = Ref(name, Digest(commit), kind)
        assert decode_ref(encode_ref(ref)) == ref

    @pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"name":"a","commit":"x","kind":"branch"}', b"\xff"])
    def test_other_bytes_are_damage(self, data: bytes) -> None:
        with pytest.raises(DamagedError, match=r"^a ref's row in the catalog cannot be read \(.+\)$") as caught:
            decode_ref(data)
        assert "(None)" not in caught.value.message

    def test_which_is_said(self) -> None:
        with pytest.raises(DamagedError, match=r"\(a ref's row: not valid JSON"):
            decode_ref(b"{")


class TestResolving:
    def test_a_ref_and_its_ancestors(self, history: History) -> None:
        base = history.commit("base")
        first = history.commit("first", base)
        second = history.commit("second", first, base)
        history.move("m", second)
        expected = {
            "m": second,
            "m~": first,
            "m~1": first,
            "m~2": base,
            "m~0": second,
            "m^": first,
            "m^1": first,
            "m^2": base,
            "m^0": second,
            "m~1^1": base,
            "m^^": base,
            "m^2~0": base,
            second.hex(): second,
            second.short: second,
            f"{first.hex()[:10]}~": base,
        }
        assert {text: history.resolve(text) for text in expected} == expected

    def test_where_a_ref_was(self, history: History) -> None:
        commits = [history.commit(f"number {i}") for i in range(12)]
        child = history.commit("child", commits[5])
        for commit in commits:
            history.move("m", commit)
        history.move("m", child)
        assert history.resolve("m@{0}") == child
        assert history.resolve("m@{0}~1") == commits[5]
        for ago in range(1, 13):
            assert history.resolve(f"m@{{{ago}}}") == commits[-ago]
        with pytest.raises(NotFoundError, match="moved only 13 times"):
            history.resolve("m@{13}")

    def test_a_ref_that_was_removed_has_gaps(self, history: History) -> None:
        first, second = history.commit("1"), history.commit("2")
        history.move("m", first)
        history.move("m", None)
        history.move("m", second)
        assert history.resolve("m@{2}") == first
        with pytest.raises(NotFoundError):
            history.resolve("m@{1}")

    def test_logs_of_names_that_begin_alike_are_apart(self, history: History) -> None:
        first, second = history.commit("1"), history.commit("2")
        for name in ("m", "m2", "m/x", "m+"):
            history.move(name, first)
        history.move("m2", second)
        with pytest.raises(NotFoundError):
            history.resolve("m@{1}")
        assert history.resolve("m2@{1}") == first

    def test_a_ref_comes_before_an_id(self, history: History) -> None:
        one, other = history.commit("1"), history.commit("2")
        history.move(one.hex()[:6], other)
        assert history.resolve(one.hex()[:6]) == other
        assert history.resolve(one.hex()[:7]) == one

    def test_a_prefix_that_several_commits_have(self, history: History) -> None:
        twins = [Digest(bytes.fromhex("abcd") + bytes([last]) * 30) for last in (1, 2)]
        history.catalog.write(lambda view: [view.put("commits", digest, b"{}") for digest in twins])
        with pytest.raises(UsageError, match="begins several commits") as caught:
            history.resolve("abcd")
        assert all(twin.short in caught.value.message for twin in twins)
        assert history.resolve("abcd01") == twins[0]
        assert history.resolve("abcd020") == twins[1]

    @pytest.mark.parametrize("text", ["m~x", "m^-1", "m@{x}", "m@{}", "m~1@{0}", "m~~~x", "m@{1", "m~" + "1" * 5000])
    def test_what_cannot_be_understood(self, history: History, text: str) -> None:
        history.move("m", history.commit("1", history.commit("0", history.commit("-1"))))
        with pytest.raises((UsageError, NotFoundError)):
            history.resolve(text)

    @pytest.mark.parametrize(
        ("text", "message", "hint"),
        [
            ("m~x", "'m~x' cannot be understood", "Write REF, REF~2, REF^2 or REF@{1}."),
            ("m~1@{0}", "'m~1@{0}': @{n} follows the ref's name", "Write REF@{1}~2."),
            ("m~9", "'m~9': commit ID has no parent", "`mp log --graph` shows them."),
            ("m^9", "'m^9': commit ID has 1 parents", "`mp log --graph` shows them."),
            ("zzz", "there is no ref or commit 'zzz'", "`mp branch` lists the refs."),
        ],
    )
    def test_what_it_says(self, history: History, text: str, message: str, hint: str) -> None:
        history.move("m", history.commit("1", history.commit("0")))
        with pytest.raises((UsageError, NotFoundError)) as caught:
            history.resolve(text)
        assert re.sub("[0-9a-f]{12}", "ID", caught.value.message) == message
        assert caught.value.hint == hint

    def test_very_many_with_one_prefix(self, history: History) -> None:
        """Some of them are named."""
        many = [Digest(bytes.fromhex("abcd") + bytes([last]) * 30) for last in range(9)]
        history.catalog.write(lambda view: [view.put("commits", digest, b"{}") for digest in many])
        with pytest.raises(UsageError) as caught:
            history.resolve("abcd")
        assert caught.value.message == "'abcd' begins several commits: " + ", ".join(each.short for each in many[:5])
        assert caught.value.hint == "Write more digits."

    def test_nothing_at_all(self, history: History) -> None:
        with pytest.raises(NotFoundError) as caught:
            history.resolve("m")
        assert caught.value.hint == "The store is empty: `mp ingest`."

    def test_the_longest_name(self, history: History) -> None:
        commit = history.commit("1")
        history.move("x" * 200, commit)
        assert history.resolve("x" * 200) == commit

    @given(st.text(max_size=12))
    def test_any_text_is_a_commit_or_a_clear_error(self, tmp_path: Path, text: str) -> None:
        catalog = open_catalog(tmp_path, create=True)
        try:
            with catalog.reading() as view, pytest.raises((UsageError, NotFoundError)):
                resolve(view, text)
        finally:
            release_catalog(catalog)

    def test_strange_names_are_not_found(self, history: History) -> None:
        for text in ("", "m\udcff", "𝄞" * 200, "a" * 5000, "ABCDEF12", "abc", "é" * 200):
            with pytest.raises(NotFoundError):
                history.resolve(text)

    def test_too_far_back_says_what_the_commit_has(self, history: History) -> None:
        base = history.commit("base")
        history.move("m", history.commit("1", base, base))
        with pytest.raises(NotFoundError, match="has 2 parents") as caught:
            history.resolve("m^3")
        assert caught.value.hint == "`mp log --graph` shows them."
        with pytest.raises(NotFoundError, match="has no parent"):
            history.resolve("m~2")
        with pytest.raises(NotFoundError, match="moved only 1 times") as caught:
            history.resolve("m@{1}")
        assert caught.value.hint == "`mp log REF --reflog`"

    def test_a_row_of_the_log_that_cannot_be_read_is_damage(self, history: History) -> None:
        history.move("m", history.commit("1"))
        key = next(iter(catalog_rows_of(history, "reflog")))
        for row, reason in ((b"{", "a reflog row: not valid JSON"), (b'{"new":"x"}', "x")):
            history.catalog.write(lambda view, row=row: view.put("reflog", key, row))  # type: ignore[misc]
            with pytest.raises(DamagedError, match=f"log of ref 'm' cannot be read .*{reason}"):
                history.resolve("m@{0}")

    def test_the_nearest_is_suggested(self, history: History) -> None:
        with pytest.raises(NotFoundError) as caught:
            history.resolve("math")
        assert "mp ingest" in (caught.value.hint or "")
        for name in ("experts/math", "base"):
            history.move(name, history.commit(name))
        for find in (history.resolve, lambda name: require_in(history, name)):
            with pytest.raises(NotFoundError) as caught:
                find("experts/mth")
            assert caught.value.hint == "Did you mean 'experts/math'?"
        with pytest.raises(NotFoundError, match="there is no ref 'zzz'") as caught:
            require_in(history, "zzz")
        assert caught.value.hint == "`mp ls` lists the refs."


def catalog_rows_of(history: History, database: str) -> dict[bytes, bytes]:
    with history.catalog.reading() as view:
        return dict(view.items(database))


def require_in(history: History, name: str) -> Ref:
    with history.catalog.reading() as view:
        return require_ref(view, name)


def test_refs_are_found_by_their_exact_names(history: History) -> None:
    commit = history.commit("1")
    history.move("b", commit)
    history.move("a/x", commit, "tag")
    with history.catalog.reading() as view:
        assert all_refs(view) == [Ref("a/x", commit, "tag"), Ref("b", commit, "branch")]
        assert find_ref(view, "b") == require_ref(view, "b") == Ref("b", commit, "branch")
        assert find_ref(view, "a") is None
        assert find_ref(view, "b~0") is None


def test_a_commits_row_that_cannot_be_read_is_damage(history: History) -> None:
    digest = history.commit("1")
    with history.catalog.reading() as view:
        assert load_commit(view, digest).message == "1"
    history.catalog.write(lambda view: view.put("commits", digest, b'{"tree":1}'))
    with history.catalog.reading() as view, pytest.raises(DamagedError, match=digest.short) as caught:
        load_commit(view, digest)
    assert caught.value.hint == "`mp verify` lists what is damaged."
