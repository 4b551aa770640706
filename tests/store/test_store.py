"""The door to everything else: making, opening and closing stores."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

import mergepipe.store
from mergepipe.store import Digest, Store, filesystem
from mergepipe.store import store as store_module
from mergepipe.store.errors import ConflictError, DamagedError, EnvironmentalError, MergePipeError, NotFoundError
from mergepipe.store.staging import Staging
from support.checkpoints import random_tensor, write_checkpoint
from support.processes import run_python
from support.stores import assert_clean, state_of

TENSORS = {"w": random_tensor("BF16", (50, 50))}


class TestOpening:
    def test_by_its_directory_or_the_folder_that_has_it(self, make_store: Callable[..., Store], tmp_path: Path) -> None:
        made = make_store(tmp_path / "models" / ".mp")
        for path in (tmp_path / "models" / ".mp", tmp_path / "models", str(tmp_path / "models")):
            with Store.open(path) as store:
                assert store.layout == made.layout

    def test_the_nearest_upwards(
        self, make_store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = make_store(tmp_path / ".mp")
        (tmp_path / "a" / "b").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "a" / "b")
        with Store.open() as store:
            assert store.layout == made.layout

    @pytest.mark.parametrize("named", ["models/.mp", "models"])
    def test_by_the_environment(
        self, make_store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
    ) -> None:
        made = make_store(tmp_path / "models" / ".mp")
        monkeypatch.setenv("MP_STORE", str(tmp_path / named))
        with Store.open() as store:
            assert store.layout == made.layout

    def test_where_there_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for path in (None, tmp_path, tmp_path / "missing"):
            with pytest.raises(NotFoundError, match="no store") as caught:
                Store.open(path)
            assert "mp init" in (caught.value.hint or "")

    def test_the_working_directory_may_change_afterwards(
        self, make_store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checkpoint = write_checkpoint(tmp_path / "m", TENSORS)
        monkeypatch.chdir(tmp_path)
        store = make_store(Path("here"))
        store.ingest([checkpoint])
        monkeypatch.chdir("/")
        assert store.snapshot("m").read_tensor("w").tobytes() == TENSORS["w"].data
        store.ingest([checkpoint], ref="again")

    def test_several_times_at_once(self, store: Store, tmp_path: Path) -> None:
        with Store.open(store.layout.root) as again:
            again.ingest([write_checkpoint(tmp_path / "m", TENSORS)])
            assert store.resolve("m") == again.resolve("m")
        assert store.snapshot("m").commit.kind == "ingest"

    def test_a_catalog_that_is_lost_is_no_empty_store(self, make_store: Callable[..., Store], tmp_path: Path) -> None:
        store = make_store(tmp_path / "s", damaged=True)
        store.ingest([write_checkpoint(tmp_path / "m", TENSORS)])
        store.close()
        shutil.rmtree(store.layout.catalog)
        with pytest.raises(DamagedError, match="is lost"):
            Store.open(tmp_path / "s")


class TestNames:
    def test_everything_that_resolves_is_a_snapshot(self, store: Store, tmp_path: Path) -> None:
        (first,) = store.ingest([write_checkpoint(tmp_path / "m", TENSORS)])
        (second,) = store.ingest([write_checkpoint(tmp_path / "m", {"w": random_tensor("BF16", (50, 50), 1)})])
        for text, digest in {"m": second.commit, "m~1": first.commit, "m@{1}": first.commit}.items():
            assert store.resolve(text) == store.snapshot(text).commit_id == digest
        assert store.commit(second.commit).parent("previous").commit == first.commit  # type: ignore[union-attr]

    def test_what_is_not_there(self, store: Store) -> None:
        with pytest.raises(NotFoundError):
            store.snapshot("nothing")
        with pytest.raises(NotFoundError):
            store.commit(Digest(bytes(32)))


class TestSurroundings:
    def test_a_network_filesystem_is_refused_and_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mounts = f"/dev/sda1 / ext4 rw 0 0\nserver:/x {tmp_path}/shared nfs4 rw 0 0\n"
        (tmp_path / "shared").mkdir()
        original = filesystem.filesystem_type
        monkeypatch.setattr(filesystem, "filesystem_type", lambda path, _=None: original(path, mounts))
        with pytest.raises(EnvironmentalError, match="nfs4") as caught:
            Store.create(tmp_path / "shared" / ".mp")
        assert caught.value.exit_code == 8
        assert "--catalog" in (caught.value.hint or "")
        assert list((tmp_path / "shared").iterdir()) == []
        with Store.create(tmp_path / "shared" / ".mp", catalog=tmp_path / "local", block_bytes=4096) as store:
            store.ingest([write_checkpoint(tmp_path / "m", TENSORS)])
            assert_clean(store)
        with Store.open(tmp_path / "shared") as store:
            assert store.snapshot("m").read_tensor("w").tobytes() == TENSORS["w"].data

    def test_a_second_store_in_one_place(self, store: Store) -> None:
        with pytest.raises(ConflictError):
            Store.create(store.layout.root)

    def test_a_store_on_a_read_only_filesystem_can_be_read(
        self, make_store: Callable[..., Store], tmp_path: Path, read_only: Callable[[Path], None]
    ) -> None:
        checkpoint = write_checkpoint(tmp_path / "m", TENSORS)
        store = make_store(tmp_path / "s")
        store.ingest([checkpoint])
        before = state_of(store)
        store.close()
        read_only(tmp_path / "s")
        output = run_python(
            """
            import sys
            from mergepipe.store import Store, MergePipeError
            with Store.open(sys.argv[1]) as store:
                assert store.catalog.read_only
                print(store.snapshot("m").read_tensor("w").tobytes().hex())
                store.snapshot("m").export(sys.argv[3])
                try:
                    store.ingest([sys.argv[2]], ref="other")
                except MergePipeError as error:
                    print(error.kind)
                    print(error.message)
            """,
            tmp_path / "s",
            checkpoint,
            tmp_path / "out",
        )
        data, kind, message = output.splitlines()
        assert bytes.fromhex(data) == TENSORS["w"].data
        assert kind == "environment"
        assert "permission" in message or "read-only" in message
        assert (tmp_path / "out" / "model.safetensors").exists()
        with Store.open(tmp_path / "s") as again:
            assert state_of(again) == before


@pytest.fixture
def read_only() -> object:
    """Makes a folder read-only for everybody, by mounting it so; gives it back when the test ends."""
    mounted: list[Path] = []

    def make(folder: Path) -> None:
        bind = ["mount", "--bind", str(folder), str(folder)]
        again = ["mount", "-o", "remount,ro,bind", str(folder)]
        if os.geteuid() != 0 or subprocess.run(bind, capture_output=True, check=False).returncode:
            if os.geteuid() == 0:
                pytest.skip("root may write everywhere, and may not mount")
            for path in [folder, *folder.rglob("*")]:
                path.chmod(path.stat().st_mode & ~0o222)
            return
        mounted.append(folder)
        subprocess.run(again, capture_output=True, check=True)

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_the_package_says_what_it_is() -> None:
    assert set(mergepipe.store.__all__) == {"VERSION", "Digest", "MergePipeError", "Snapshot", "Store"}


class TestDiscarding:
    def test_an_empty_one_goes(self, tmp_path: Path) -> None:
        store = Store.create(tmp_path / "s")
        assert store.discard_if_empty()
        assert not (tmp_path / "s").exists()

    @pytest.mark.parametrize("what", ["a model", "a writer"])
    def test_one_that_is_used_stays(self, store: Store, tmp_path: Path, what: str) -> None:
        with ExitStack() as work:
            if what == "a model":
                store.ingest([write_checkpoint(tmp_path / "m", TENSORS)])
            else:
                work.enter_context(Staging(store.layout, store.catalog))
            before = state_of(store)
            assert not store.discard_if_empty()
            assert state_of(store) == before
        with Store.open(store.layout.root) as again:
            assert state_of(again) == before


class TestMaking:
    def test_one_that_died_before_its_settings_is_no_store(self, tmp_path: Path) -> None:
        """The catalog is there before them, so that no store is ever without."""
        run_python(
            """
            import os, sys
            from mergepipe.store import Store, store
            store.declare_layout = lambda layout: os._exit(9)
            Store.create(sys.argv[1])
            """,
            tmp_path / "s", expect=9,
        )  # fmt: skip
        assert (tmp_path / "s" / "catalog" / "data.mdb").exists()
        with pytest.raises(NotFoundError):
            Store.open(tmp_path / "s")
        Store.create(tmp_path / "s").close()
        with Store.open(tmp_path / "s") as store:
            assert_clean(store)

    def test_what_was_in_a_catalogs_folder_stays_there(self, tmp_path: Path) -> None:
        """It may be another store's, and damaged."""
        (tmp_path / "catalog").mkdir()
        (tmp_path / "catalog" / "data.mdb").write_bytes(b"what was there")
        with pytest.raises(MergePipeError):
            Store.create(tmp_path / "s", catalog=tmp_path / "catalog")
        assert (tmp_path / "catalog" / "data.mdb").read_bytes() == b"what was there"
        with pytest.raises(NotFoundError):
            Store.open(tmp_path / "s")

    @pytest.mark.parametrize("call", ["prepare_layout", "open_catalog", "declare_layout"])
    def test_one_that_could_not_be_made_can_be_made_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            if call == "open_catalog":
                (tmp_path / "s" / "catalog" / "data.mdb").write_bytes(b"half")
                raise EnvironmentalError("the disk is full")
            raise OSError(28, "full")

        with monkeypatch.context() as patched:
            patched.setattr(store_module, call, fail)
            with pytest.raises(EnvironmentalError, match="the disk is full"):
                Store.create(tmp_path / "s")
        Store.create(tmp_path / "s").close()
        Store.open(tmp_path / "s").close()
