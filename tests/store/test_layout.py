"""A store's directory: made whole, recognised by its settings, found from below."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergepipe.store.digest import Digest
from mergepipe.store.errors import BadInputError, ConflictError, EnvironmentalError, NotFoundError, UsageError
from mergepipe.store.layout import create_layout, find_store, read_layout

GOOD = {"format": 1, "block_bytes": 4096, "catalog": "catalog"}


def test_what_is_made_is_read(tmp_path: Path) -> None:
    made = create_layout(tmp_path / "a" / ".mp", block_bytes=8192)
    assert read_layout(tmp_path / "a" / ".mp") == made
    assert made.block_bytes == 8192
    assert sorted(path.name for path in made.root.iterdir()) == ["catalog", "objects", "store.json", "tmp"]
    assert sorted(path.name for path in made.objects.iterdir()) == [f"{fan:02x}" for fan in range(256)]
    settings = json.loads((made.root / "store.json").read_text())
    assert settings == {"format": 1, "block_bytes": 8192, "catalog": "catalog"}


def test_the_catalog_may_lie_elsewhere(tmp_path: Path) -> None:
    made = create_layout(tmp_path / "shared", catalog=tmp_path / "local" / "catalog")
    assert made.catalog == tmp_path / "local" / "catalog"
    assert made.catalog.is_dir()
    assert not (tmp_path / "shared" / "catalog").exists()
    assert read_layout(tmp_path / "shared") == made


def test_a_store_can_be_moved_as_a_whole(tmp_path: Path) -> None:
    create_layout(tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    assert read_layout(tmp_path / "after").catalog == tmp_path / "after" / "catalog"


def test_paths_do_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = create_layout(Path("s"))
    assert made.root == tmp_path / "s"
    assert read_layout(Path("s")).root.is_absolute()


def test_an_object_lies_under_its_id(tmp_path: Path) -> None:
    digest = Digest(bytes(range(32)))
    path = create_layout(tmp_path / "s").object_path(digest)
    assert path == str(tmp_path / "s" / "objects" / "00" / digest.hex()[2:])


def test_a_second_store_in_one_place_is_refused(tmp_path: Path) -> None:
    create_layout(tmp_path / "s")
    with pytest.raises(ConflictError, match="store in"):
        create_layout(tmp_path / "s")


def test_a_half_made_store_is_none_and_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "s" / "objects" / "00").mkdir(parents=True)
    with pytest.raises(NotFoundError):
        read_layout(tmp_path / "s")
    assert read_layout(create_layout(tmp_path / "s").root)


@pytest.mark.parametrize("size", [0, -4096, 1, 4095, 4097, 6000, 128 << 20])
def test_block_sizes_are_powers_of_two_in_range(tmp_path: Path, size: int) -> None:
    with pytest.raises(UsageError, match="block size") as caught:
        create_layout(tmp_path / "s", block_bytes=size)
    assert caught.value.hint
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "settings",
    [
        "",
        "[]",
        "{}",
        {**GOOD, "format": "1"},
        {**GOOD, "format": True},
        {**GOOD, "format": 0},
        {**GOOD, "block_bytes": None},
        {**GOOD, "block_bytes": 0},
        {**GOOD, "block_bytes": -4096},
        {**GOOD, "block_bytes": 5000},
        {**GOOD, "block_bytes": 4096.0},
        {**GOOD, "catalog": None},
    ],
)
def test_settings_of_a_stranger_are_checked(tmp_path: Path, settings: Any) -> None:
    (tmp_path / "store.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
    with pytest.raises(BadInputError, match=r"store\.json"):
        read_layout(tmp_path)


def test_a_later_format_says_so(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text(json.dumps({**GOOD, "format": 2, "something": "new"}))
    with pytest.raises(BadInputError, match="newer than this mp") as caught:
        read_layout(tmp_path)
    assert "Upgrade" in (caught.value.hint or "")


def test_settings_that_cannot_be_read_say_so(tmp_path: Path) -> None:
    (tmp_path / "store.json").mkdir()
    with pytest.raises(EnvironmentalError, match=r"store\.json"):
        read_layout(tmp_path)


class TestFinding:
    def test_upwards_from_below(self, tmp_path: Path) -> None:
        create_layout(tmp_path / ".mp")
        below = tmp_path / "a" / "b"
        below.mkdir(parents=True)
        assert find_store(below) == tmp_path / ".mp"
        create_layout(tmp_path / "a" / ".mp")
        assert find_store(below) == tmp_path / "a" / ".mp"

    def test_a_folder_of_that_name_is_not_enough(self, tmp_path: Path) -> None:
        create_layout(tmp_path / ".mp")
        (tmp_path / "a" / ".mp").mkdir(parents=True)
        assert find_store(tmp_path / "a") == tmp_path / ".mp"

    def test_the_environment_comes_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        create_layout(tmp_path / ".mp")
        monkeypatch.setenv("MP_STORE", "/elsewhere")
        assert find_store(tmp_path) == Path("/elsewhere")
