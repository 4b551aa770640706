"""The one reader: it decodes, verifies and counts."""

from __future__ import annotations

import pickle
import threading
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest

from mergepipe.store import Digest, Store
from mergepipe.store.digest import hash_bytes, hash_record
from mergepipe.store.errors import DamagedError
from mergepipe.store.frame import Encoding, Header, Kind, pack_header
from mergepipe.store.objects import MAXIMUM_RECORD_BYTES, Role
from mergepipe.store.publish import Changes, publish
from mergepipe.store.staging import Staging
from support.stores import object_path, rewrite

GENERATOR = np.random.default_rng(0)
BASE = GENERATOR.integers(0, 4, 4096, np.uint8)
TUNED = (BASE.view(np.int16) + GENERATOR.integers(0, 2, 2048, np.int16)).view(np.uint8)
NOISE = GENERATOR.integers(0, 256, 4096, np.uint8)
RECORD = b'{"nodes":{}}' * 40


class Filled:
    """A store with one object of each encoding."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.base, self.tuned, self.noise = (hash_bytes(data.tobytes()) for data in (BASE, TUNED, NOISE))
        with Staging(store.layout, store.catalog) as staging:
            staging.add_block(Kind.BLOCK, self.base, BASE, 2)
            staging.add_block(Kind.BLOCK, self.tuned, TUNED, 2, (self.base, BASE))
            staging.add_block(Kind.BLOCK, self.noise, NOISE, 2)
            self.record = staging.add_record(Kind.NODE, RECORD)
            self.rows = dict(staging.rows)
            publish(store.catalog, staging, Changes())

    def block(self, digest: Digest, **options: object) -> np.ndarray:
        out = np.empty(4096, np.uint8)
        self.store.reader.read_block(digest, out, **options)  # type: ignore[arg-type]
        return out


@pytest.fixture
def filled(store: Store) -> Filled:
    return Filled(store)


@pytest.fixture
def hurt(hurt_store: Store) -> Filled:
    return Filled(hurt_store)


class TestReading:
    def test_every_encoding(self, filled: Filled) -> None:
        assert filled.rows[filled.base].encoding is Encoding.PLANES
        assert filled.rows[filled.tuned].encoding is Encoding.DELTA
        assert filled.rows[filled.noise].encoding is Encoding.RAW
        assert filled.rows[filled.record].encoding is Encoding.DEFLATE
        for digest, data in ((filled.base, BASE), (filled.tuned, TUNED), (filled.noise, NOISE)):
            assert np.array_equal(filled.block(digest), data)
            assert filled.store.reader.read_piece(digest, 4096) == data.tobytes()
        assert filled.store.reader.read_record(Kind.NODE, filled.record) == RECORD

    def test_threads_share_a_reader(self, filled: Filled) -> None:
        wrong: list[str] = []

        def read() -> None:
            for _ in range(30):
                for digest, data in ((filled.base, BASE), (filled.tuned, TUNED), (filled.noise, NOISE)):
                    if not np.array_equal(filled.block(digest), data):
                        wrong.append(digest.short)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert filled.store.reader.counters.objects[Role.OTHER] >= 4 * 30 * 3

    def test_a_reader_goes_to_another_process_without_its_counters(self, filled: Filled) -> None:
        filled.block(filled.base)
        reader = pickle.loads(pickle.dumps(filled.store.reader))
        assert reader.counters.stored == dict.fromkeys(Role, 0)
        out = np.empty(4096, np.uint8)
        reader.read_block(filled.tuned, out)
        assert np.array_equal(out, TUNED)


class TestCounting:
    def test_files_are_counted_as_they_lie_on_disk(self, filled: Filled) -> None:
        counters = filled.store.reader.counters
        filled.block(filled.noise, role=Role.EXPERT)
        assert counters.stored[Role.EXPERT] == object_path(filled.store, filled.noise).stat().st_size
        assert counters.decoded[Role.EXPERT] == 4096
        assert counters.objects == {Role.BASE: 0, Role.EXPERT: 1, Role.OTHER: 0}

    def test_a_delta_costs_two_objects(self, filled: Filled) -> None:
        counters = filled.store.reader.counters
        filled.block(filled.tuned, role=Role.EXPERT)
        sizes = [object_path(filled.store, digest).stat().st_size for digest in (filled.base, filled.tuned)]
        assert counters.stored[Role.EXPERT] == sum(sizes)
        assert counters.objects[Role.EXPERT] == 2

    def test_and_one_where_its_base_is_at_hand(self, filled: Filled) -> None:
        counters = filled.store.reader.counters
        assert np.array_equal(filled.block(filled.tuned, role=Role.EXPERT, base=(filled.base, BASE)), TUNED)
        assert counters.stored[Role.EXPERT] == object_path(filled.store, filled.tuned).stat().st_size
        assert np.array_equal(filled.block(filled.tuned, base=(filled.noise, NOISE)), TUNED)

    def test_looking_at_a_header_or_ahead_is_not_counted(self, filled: Filled) -> None:
        header = filled.store.reader.read_header(filled.tuned)
        assert (header.kind, header.encoding, header.base) == (Kind.BLOCK, Encoding.DELTA, filled.base)
        for digest in (filled.tuned, Digest(bytes(32))):
            filled.store.reader.prefetch(digest)
        assert filled.store.reader.counters.stored == dict.fromkeys(Role, 0)


def crafted(
    kind: Kind, encoding: Encoding, raw: int, payload: bytes, width: int = 1, base: Digest | None = None
) -> bytes:
    """An object's file with a right check, whatever is in it."""
    return pack_header(Header(kind, encoding, width, raw, len(payload), base), [payload]) + payload


class TestHostileObjects:
    """A stranger's store: frames are whole, and lie."""

    def check(self, hurt: Filled, digest: Digest, data: bytes, read: Callable[[], object]) -> str:
        rewrite(object_path(hurt.store, digest), data)
        with pytest.raises(DamagedError) as caught:
            read()
        assert digest.short in caught.value.message
        assert caught.value.hint
        return caught.value.message

    @pytest.mark.parametrize(
        ("encoding", "payload"),
        [
            (Encoding.RAW, bytes(10)),
            (Encoding.RAW, bytes(4096)),
            (Encoding.PLANES, b""),
            (Encoding.PLANES, bytes(4104)),
            (Encoding.DEFLATE, bytes(10)),
            (Encoding.DELTA, bytes(100)),
        ],
    )
    def test_blocks(self, hurt: Filled, encoding: Encoding, payload: bytes) -> None:
        base = hurt.base if encoding is Encoding.DELTA else None
        data = crafted(Kind.BLOCK, encoding, 4096, payload, base=base)
        self.check(hurt, hurt.noise, data, lambda: hurt.block(hurt.noise))
        self.check(hurt, hurt.noise, data, lambda: hurt.store.reader.verify(hurt.noise))

    def test_a_block_of_another_size(self, hurt: Filled) -> None:
        data = crafted(Kind.BLOCK, Encoding.RAW, 10, bytes(10))
        assert "10 bytes where 4096" in self.check(hurt, hurt.noise, data, lambda: hurt.block(hurt.noise))

    def test_a_block_that_claims_to_be_huge(self, hurt: Filled) -> None:
        data = crafted(Kind.BLOCK, Encoding.RAW, 1 << 50, b"")
        self.check(hurt, hurt.noise, data, lambda: hurt.store.reader.verify(hurt.noise))

    def test_a_delta_to_a_delta(self, hurt: Filled) -> None:
        payload = bytes(16) + bytes(4096)
        data = crafted(Kind.BLOCK, Encoding.DELTA, 4096, payload, 2, hurt.tuned)
        message = self.check(hurt, hurt.noise, data, lambda: hurt.block(hurt.noise))
        assert "is a delta itself" in message

    def test_a_delta_to_itself(self, hurt: Filled) -> None:
        data = crafted(Kind.BLOCK, Encoding.DELTA, 4096, bytes(4112), 2, hurt.noise)
        self.check(hurt, hurt.noise, data, lambda: hurt.block(hurt.noise))

    def test_a_delta_to_a_base_of_another_size(self, hurt: Filled) -> None:
        rewrite(object_path(hurt.store, hurt.base), crafted(Kind.BLOCK, Encoding.RAW, 8, bytes(8)))
        with pytest.raises(DamagedError, match=hurt.base.short):
            hurt.block(hurt.tuned)

    def test_a_record_of_another_kind(self, hurt: Filled) -> None:
        data = crafted(Kind.COMMIT, Encoding.RAW, len(RECORD), RECORD)
        message = self.check(hurt, hurt.record, data, lambda: hurt.store.reader.read_record(Kind.NODE, hurt.record))
        assert "is no node" in message

    def test_a_block_is_no_record(self, hurt: Filled) -> None:
        with pytest.raises(DamagedError, match="is no commit"):
            hurt.store.reader.read_record(Kind.COMMIT, hurt.noise)

    @pytest.mark.parametrize("raw", [0, 5, len(RECORD) - 1, len(RECORD) + 1, MAXIMUM_RECORD_BYTES + 1, 1 << 60])
    def test_a_record_of_another_size(self, hurt: Filled, raw: int) -> None:
        data = crafted(Kind.NODE, Encoding.DEFLATE, raw, zlib.compress(RECORD))
        self.check(hurt, hurt.record, data, lambda: hurt.store.reader.read_record(Kind.NODE, hurt.record))

    def test_a_bomb_is_not_decoded_beyond_what_it_declares(self, hurt: Filled) -> None:
        data = crafted(Kind.NODE, Encoding.DEFLATE, 100, zlib.compress(bytes(100 << 20)))
        tracemalloc.start()
        try:
            self.check(hurt, hurt.record, data, lambda: hurt.store.reader.read_record(Kind.NODE, hurt.record))
            assert tracemalloc.get_traced_memory()[1] < 10 << 20
        finally:
            tracemalloc.stop()

    def test_a_file_longer_than_any_object_is_not_read(self, hurt: Filled) -> None:
        path = object_path(hurt.store, hurt.noise)
        rewrite(path, b"")
        with path.open("r+b") as file:
            file.truncate(1 << 42)  # sparse
        with pytest.raises(DamagedError, match="more than an object can have"):
            hurt.block(hurt.noise)

    def test_another_stores_object_under_this_id(self, hurt: Filled) -> None:
        other = np.arange(4096, dtype=np.uint16).view(np.uint8)[:4096]
        data = crafted(Kind.BLOCK, Encoding.RAW, 4096, other.tobytes())
        message = self.check(hurt, hurt.noise, data, lambda: hurt.block(hurt.noise))
        assert "does not have the content that its id names" in message

    def test_a_folder_in_the_place_of_an_object(self, hurt: Filled) -> None:
        path = object_path(hurt.store, hurt.noise)
        path.unlink()
        path.mkdir()
        with pytest.raises(DamagedError, match="cannot be read"):
            hurt.block(hurt.noise)

    def test_ids_are_of_their_kind(self, hurt: Filled) -> None:
        """A node's bytes under the id that they would have as a commit."""
        digest = hash_record("commit", RECORD)
        rewrite(object_path(hurt.store, digest), crafted(Kind.NODE, Encoding.RAW, len(RECORD), RECORD))
        for kind in (Kind.NODE, Kind.COMMIT):
            with pytest.raises(DamagedError):
                hurt.store.reader.read_record(kind, digest)
