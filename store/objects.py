"""Reading objects: the one place that turns an id into bytes, verifies them, and counts what it read.

Every byte that MergePipe reads from ``objects/`` passes :class:`ObjectReader`. It decodes, checks the result
against the id, and adds the file's size to the counters of a role, so that a budget is held to what was measured.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from mergepipe.store.chunking import MAXIMUM_BLOCK_BYTES
from mergepipe.store.digest import Digest, hash_bytes, hash_record
from mergepipe.store.errors import DamagedError
from mergepipe.store.filesystem import will_need
from mergepipe.store.frame import HEADER_BYTES, Encoding, Header, Kind, check_matches, unpack_header
from mergepipe.store.layout import Layout

if TYPE_CHECKING:
    from mergepipe.store.codecs import Bytes

_RECORDS = {Kind.NODE: "node", Kind.COMMIT: "commit", Kind.PLAN: "plan"}
MAXIMUM_RECORD_BYTES = 1 << 30
_UNFOLDED_BYTES = 4 << 20
_UNFOLDED_SHARE = 64


class Role(StrEnum):
    """For what an object is read."""

    BASE = "base"
    EXPERT = "expert"
    OTHER = "other"


@dataclass
class ReadCounters:
    """Bytes and objects read, by role. ``stored`` counts files as they lie on disk, ``decoded`` what they hold."""

    stored: dict[Role, int] = field(default_factory=lambda: dict.fromkeys(Role, 0))
    decoded: dict[Role, int] = field(default_factory=lambda: dict.fromkeys(Role, 0))
    objects: dict[Role, int] = field(default_factory=lambda: dict.fromkeys(Role, 0))
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, role: Role, stored: int, decoded: int) -> None:
        with self._lock:
            self.stored[role] += stored
            self.decoded[role] += decoded
            self.objects[role] += 1


def may_unfold(raw_bytes: int, payload_bytes: int) -> bool:
    """Whether a deflated record may have so many bytes: no small file may ask for gigabytes of memory."""
    return raw_bytes <= max(_UNFOLDED_BYTES, _UNFOLDED_SHARE * payload_bytes)


def no_pipes(path: str, flags: int) -> int:
    """For ``open``: a stranger's store can have a named pipe in an object's place, and nobody who writes into it."""
    return os.open(path, flags | os.O_NONBLOCK)


class ObjectReader:
    """Reads objects of one store. Safe to share between threads; pickles (its counters start anew)."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.counters = ReadCounters()
        self._local = threading.local()

    def __getstate__(self) -> Layout:
        return self.layout

    def __setstate__(self, layout: Layout) -> None:
        self.__init__(layout)  # type: ignore[misc]

    def read_record(self, kind: Kind, digest: Digest, role: Role = Role.OTHER) -> bytes:
        """A node's, commit's or plan's bytes.

        Raises:
            DamagedError: the object is missing, or is not what its id says.
        """
        header, payload = self._load(digest, role)
        if header.kind is not kind:
            raise self._damaged(digest, f"is no {kind.name.lower()}")
        return self._record(digest, header, payload)

    def _record(self, digest: Digest, header: Header, payload: memoryview) -> bytes:
        if header.encoding not in (Encoding.RAW, Encoding.DEFLATE):
            raise self._damaged(digest, "is encoded in a way that its kind never is")
        data = bytes(payload) if header.encoding is Encoding.RAW else self._inflate(digest, header, payload)
        if len(data) != header.raw_bytes or hash_record(_RECORDS[header.kind], data) != digest:
            raise self._damaged(digest, "does not have the content that its id names")
        return data

    def read_block(
        self,
        digest: Digest,
        out: Bytes,
        role: Role = Role.OTHER,
        base: tuple[Digest, Bytes] | None = None,
    ) -> None:
        """Decode a block, or a piece of a file, into ``out``, which must have exactly its size.

        ``base``: an id and its decoded bytes; a delta against that id then costs no second read.

        Raises:
            DamagedError: the object is missing, or is not what its id says.
        """
        header, payload = self._load(digest, role)
        if header.raw_bytes != out.nbytes:
            raise self._damaged(digest, f"holds {header.raw_bytes} bytes where {out.nbytes} were expected")
        self._block(digest, header, payload, out, role, base)

    def _block(
        self,
        digest: Digest,
        header: Header,
        payload: memoryview,
        out: Bytes,
        role: Role,
        base: tuple[Digest, Bytes] | None,
    ) -> None:
        try:
            self._decode(header, payload, out, role, base)
        except (ValueError, RuntimeError, zlib.error) as error:
            self._blame_base(header, base)
            raise self._damaged(digest, f"cannot be decoded ({error})") from error
        if hash_bytes(out.data) != digest:
            self._blame_base(header, base)
            raise self._damaged(digest, "does not have the content that its id names")

    def _blame_base(self, header: Header, base: tuple[Digest, Bytes] | None) -> None:
        """Raises DamagedError that names a delta's base, where that is what is damaged."""
        if header.base is not None and base is None:
            if self.read_header(header.base).encoding is Encoding.DELTA:
                return  # which no base is: it may even be this one
            self.verify(header.base)

    def read_piece(self, digest: Digest, size: int, role: Role = Role.OTHER) -> bytes:
        """A block's or a file piece's bytes, when its size is known from a manifest."""
        import numpy as np

        out = np.empty(size, np.uint8)
        self.read_block(digest, out, role)
        return out.tobytes()

    def verify(self, digest: Digest) -> Header:
        """Read an object whole and check everything: its frame, its content, and its content against its id.

        Raises:
            DamagedError: anything is not as it was written.
        """
        header, payload = self._load(digest, Role.OTHER)
        if not check_matches(self._buffer("own", header.stored_bytes)):
            raise self._damaged(digest, "has a payload that does not match its check")
        if header.kind in _RECORDS:
            self._record(digest, header, payload)
            return header
        if header.raw_bytes > MAXIMUM_BLOCK_BYTES:
            raise self._damaged(digest, f"claims {header.raw_bytes} bytes")
        from mergepipe.store.codecs import scratch

        self._block(digest, header, payload, scratch.bytes("verified", header.raw_bytes), Role.OTHER, None)
        return header

    def prefetch(self, digest: Digest) -> None:
        """Tell the system that an object, and the base of a delta, will be read soon; not counted, never fails."""
        try:
            header = unpack_header(will_need(self.layout.object_path(digest), HEADER_BYTES))
        except (OSError, ValueError):
            return  # whoever reads it will say what is wrong
        if header.base is not None:
            with suppress(OSError):
                will_need(self.layout.object_path(header.base), 0)

    def prefetch_all(self, digests: Iterable[Digest]) -> None:
        """Tell the system that objects will be read soon, by themselves; not counted, never fails."""
        for digest in digests:
            with suppress(OSError):
                will_need(self.layout.object_path(digest), 0)

    def read_header(self, digest: Digest) -> Header:
        """An object's header alone; not counted.

        Raises:
            DamagedError: the object is missing or its header cannot be read.
        """
        try:
            with open(self.layout.object_path(digest), "rb", buffering=0, opener=no_pipes) as file:
                return unpack_header(file.read(HEADER_BYTES))
        except (OSError, ValueError) as error:
            raise self._damaged(digest, _reason(error)) from error

    def _decode(
        self, header: Header, payload: memoryview, out: Bytes, role: Role, base: tuple[Digest, Bytes] | None
    ) -> None:
        import numpy as np

        from mergepipe.store import codecs

        if header.encoding is Encoding.RAW:
            out[:] = np.frombuffer(payload, np.uint8)
        elif header.encoding is Encoding.PLANES:
            codecs.decode_planes(payload, codecs.effective_width(out.nbytes, header.width), out)
        elif header.encoding is Encoding.DELTA and header.base is not None:
            if base is not None and base[0] == header.base:
                codecs.decode_delta(payload, header.width, base[1], out)
            else:
                codecs.decode_delta(payload, header.width, self._read_base(header.base, out.nbytes, role), out)
        else:
            raise ValueError("not an encoding of blocks")

    def _read_base(self, digest: Digest, size: int, role: Role) -> Bytes:
        """The base of a delta. Its content shows in the delta's own, so only a mismatch there asks for its hash."""
        from mergepipe.store.codecs import scratch

        header, payload = self._load(digest, role, slot="base")
        if header.encoding is Encoding.DELTA or header.raw_bytes != size:
            raise ValueError(f"the base {digest.short} of the delta is a delta itself or has another size")
        out = scratch.bytes("delta base", size)
        self._decode(header, payload, out, role, None)
        return out

    def _load(self, digest: Digest, role: Role, slot: str = "own") -> tuple[Header, memoryview]:
        """Header and payload; the payload lives in this thread's buffer until the next load into its slot."""
        try:
            with open(self.layout.object_path(digest), "rb", buffering=0, opener=no_pipes) as file:
                size = os.fstat(file.fileno()).st_size
                if size > HEADER_BYTES + MAXIMUM_RECORD_BYTES:
                    raise ValueError(f"the file has {size} bytes, more than an object can have")
                buffer = self._buffer(slot, size)
                if file.readinto(buffer) != size:
                    raise ValueError("the file ended early")
            header = unpack_header(buffer[:HEADER_BYTES])
            if header.stored_bytes != size:
                raise ValueError(f"the file has {size} bytes, its header says {header.stored_bytes}")
        except (OSError, ValueError) as error:
            raise self._damaged(digest, _reason(error)) from error
        self.counters.add(role, size, header.raw_bytes)
        return header, buffer[HEADER_BYTES:]

    def _buffer(self, slot: str, size: int) -> memoryview:
        buffer: Any = getattr(self._local, slot, None)
        if buffer is None or len(buffer) < size:
            buffer = bytearray(max(size, 1 << 20))
            setattr(self._local, slot, buffer)
        return memoryview(buffer)[:size]

    def _inflate(self, digest: Digest, header: Header, payload: memoryview) -> bytes:
        if header.raw_bytes > MAXIMUM_RECORD_BYTES or not may_unfold(header.raw_bytes, payload.nbytes):
            raise self._damaged(digest, f"claims {header.raw_bytes} bytes")
        try:
            # The limit keeps a hostile payload from growing past the size that the header declares.
            return zlib.decompressobj().decompress(payload, header.raw_bytes + 1)
        except zlib.error as error:
            raise self._damaged(digest, f"cannot be decoded ({error})") from error

    def _damaged(self, digest: Digest, reason: str) -> DamagedError:
        return DamagedError(
            f"object {digest.short} {reason} ({self.layout.object_path(digest)})",
            hint="`mp verify` lists what is damaged and what uses it. Ingesting the same checkpoint again repairs it.",
            object_id=digest,
        )


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return f"cannot be read: {error}"
