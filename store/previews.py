"""Previews: a coarse look at every delta, for a few of its bytes.

A *preview* stands for the delta of one block against its base block. Of each segment of 1024 elements it keeps the
signs of the largest magnitudes, at most a share of them, and one scale: the mean of the magnitudes that it keeps, which
is the least-squares choice. That is a ternary quantiser whose threshold is set by its rate: a share of 0.33 takes 1.25
bits an element at most, one of 0.6 takes 1.57. The first is the coarse level, the second the fine one; a model has
all its previews at one of them (:mod:`mergepipe.store.preview_level`). What it leaves out has an exact norm, which a
plan's certificate counts in place of the whole delta's. ``docs/adr/0015-previews.md`` has what was measured.

Previews are derived: they can be dropped and made again, bit for bit, and no lossless object changes. Each is an object
of its own. Its content says what it is a preview of, so that the catalog's rows can be made again from the objects.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.store.catalog import Reading
from mergepipe.store.codecs import Bytes, scratch
from mergepipe.store.digest import DIGEST_BYTES, Digest, hash_bytes
from mergepipe.store.dtypes import DType
from mergepipe.store.errors import DamagedError
from mergepipe.store.frame import Kind
from mergepipe.store.layout import Layout
from mergepipe.store.staging import Staging, is_intact

VERSION: Final = 1
COARSE: Final = 1
FINE: Final = 2
SHARES: Final = {COARSE: 0.33, FINE: 0.6}  # of the elements, at most, that keep a sign
SEGMENT: Final = 1024
LEAST_ELEMENTS: Final = 4 * SEGMENT
WORTH_IT: Final = 0.7  # of the exact block's stored bytes: a preview that takes more is not kept
_CODE_BYTES: Final = SEGMENT // 4
_HEAD: Final = struct.Struct("<BBHIQd32s32sfI")
CODES_START: Final = _HEAD.size
_ROW: Final = struct.Struct("<32sQd")
_SLACK: Final = 2.0**-17  # float32 sums of at most 16 squares in a lane, and one rounding each: far below
_LEAST_SQUARE: Final = 2.0**-126  # mean squares below float32's normal numbers are not known well enough


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """What the catalog knows of a preview: its object, that file's bytes, and the L2 norm of what it leaves out."""

    id: Digest
    stored_bytes: int
    residual: float

    def pack(self) -> bytes:
        """The catalog row: the id, a u64 and an f64, little-endian."""
        return _ROW.pack(self.id, self.stored_bytes, self.residual)


@dataclass(frozen=True, slots=True)
class Preview:
    """A decoded preview. ``level``: :data:`COARSE` or :data:`FINE`.

    ``scales`` is (S,) float32, ``codes`` (S * 256,) uint8, for S segments.
    """

    level: int
    base: Digest
    block: Digest
    elements: int
    residual: float
    scales: NDArray[np.float32]
    codes: Bytes

    def delta_into(self, start: int, out: NDArray[np.float32]) -> None:
        """Elements ``start`` to ``start + out.size`` of the block's delta."""
        from mergepipe.store import preview_kernels

        preview_kernels.deltas_of_codes(self.codes, self.scales, start, out)


def preview_key(base: Digest, block: Digest, level: int) -> bytes:
    """The catalog's key in ``previews``."""
    return base + block + bytes([level])


def find_preview(view: Reading, base: Digest, block: Digest) -> PreviewRow | None:
    """The row of the preview of ``block - base``, None where there is none; raises DamagedError if it is unreadable.

    Where models that share blocks have different levels there may be two: the fine one counts. An empty row says that
    a preview was looked into, and would gain nothing.
    """
    row = view.get("previews", preview_key(base, block, FINE)) or view.get("previews", preview_key(base, block, COARSE))
    return unpack_row(row) if row else None


def preview_rows(view: Reading, base: Digest, block: Digest, level: int, row: PreviewRow | None) -> dict[bytes, bytes]:
    """The catalog's rows for a preview that was just made, or looked into; one of another level does not count now."""
    found = {preview_key(base, block, level): b"" if row is None else row.pack()}
    for other in SHARES:
        key = preview_key(base, block, other)
        if other != level and view.get("previews", key):
            found[key] = b""
    return found


def lacks_preview(layout: Layout, view: Reading, base: Digest, block: Digest) -> bool:
    """Whether the preview of ``block - base`` is to be made: nobody looked into it, or its object is not well."""
    rows = [view.get("previews", preview_key(base, block, level)) for level in (FINE, COARSE)]
    data = rows[0] or rows[1]
    if not data:
        return rows == [None, None]
    try:
        row = unpack_row(data)
    except DamagedError:
        return True
    known = view.object_row(row.id)
    if known is None or known.kind is not Kind.PREVIEW or known.stored_bytes != row.stored_bytes:
        return True
    return not is_intact(layout, view, row.id)


def unpack_row(data: bytes) -> PreviewRow:
    """Inverse of :meth:`PreviewRow.pack`; raises DamagedError."""
    try:
        digest, stored, residual = _ROW.unpack(data)
    except struct.error as error:
        raise DamagedError("a row of the catalog's previews cannot be read", hint="Run `mp verify`.") from error
    if not residual >= 0 or not math.isfinite(residual):
        raise DamagedError("a preview's row has no norm of what it leaves out", hint="Run `mp verify`.")
    return PreviewRow(Digest(digest), stored, residual)


def content_size(elements: int) -> int:
    """Bytes of the content of a preview of so many elements."""
    segments = -(-elements // SEGMENT)
    return _HEAD.size + segments * (2 + _CODE_BYTES)


def make_preview(
    new: Bytes,
    old: Bytes,
    new_type: DType,
    old_type: DType,
    base: Digest,
    block: Digest,
    level: int,
) -> tuple[Bytes, float] | None:
    """The content of the preview of ``new - old`` in this thread's scratch, and the L2 norm of what it leaves out.

    None where there is nothing to gain: a small block, a delta that is zero, one that is not finite, or one whose
    squares float32 cannot hold.
    """
    from mergepipe.store import preview_kernels
    from mergepipe.store.statistics import float32_delta

    elements = new.nbytes * 8 // new_type.bits
    if elements < LEAST_ELEMENTS:
        return None
    content = scratch.bytes("preview", content_size(elements))
    segments = -(-elements // SEGMENT)
    codes = content[_HEAD.size : -2 * segments]
    sums = scratch.bytes("preview sums", segments * 24).view(np.float64).reshape(segments, 3)
    if new_type.name == old_type.name == "BF16":
        preview_kernels.codes_of_bfloat16(new.view("<u2"), old.view("<u2"), SHARES[level], codes, sums)
    else:
        with np.errstate(all="ignore"):
            delta = float32_delta(new, old, new_type, old_type, elements)
        preview_kernels.codes_of_float32(delta, SHARES[level], codes, sums)
    kept, total, squares = sums[:, 0], sums[:, 1], sums[:, 2]
    if not np.isfinite(squares).all() or math.fsum(squares) < _LEAST_SQUARE * elements:
        return None
    unit = np.float32(total.sum() / max(kept.sum(), 1.0))
    if unit == 0:
        return None
    with np.errstate(over="ignore"):  # a segment whose magnitudes are thousands of times the others' has no ratio
        ratios = (total / np.maximum(kept, 1.0) / float(unit)).astype("<f2")
    scales = (ratios.astype(np.float32) * unit).astype(np.float64)
    if not np.isfinite(scales).all():
        return None
    left = squares - 2 * scales * total + kept * scales * scales
    residual = math.sqrt(max(math.fsum(left) + _SLACK * math.fsum(squares), 0.0))
    head = _HEAD.pack(VERSION, level, 0, SEGMENT, elements, residual, base, block, unit, 0)
    content[: _HEAD.size] = np.frombuffer(head, np.uint8)
    # After the codes: zstd's blocks have 128 KiB each, and only the last one is mixed with ratios.
    content[-2 * segments :] = ratios.view(np.uint8)
    return content, residual


def store_preview(
    staging: Staging,
    new: Bytes,
    old: Bytes,
    new_type: DType,
    old_type: DType,
    base: Digest,
    block: Digest,
    exact_bytes: int,
    level: int,
) -> PreviewRow | None:
    """Make a preview, and stage it where it takes clearly less than the block's own ``exact_bytes`` on disk."""
    made = make_preview(new, old, new_type, old_type, base, block, level)
    if made is None:
        return None
    content, residual = made
    digest = hash_bytes(content.data)
    if staging.claim(digest):
        row = staging.add_preview(digest, content, int(WORTH_IT * exact_bytes))
    else:
        row = staging.row_of(digest)
    if row is None or row.kind is not Kind.PREVIEW:  # too large; or a file of a checkpoint has these very bytes
        return None
    return PreviewRow(digest, row.stored_bytes, residual)


def read_preview(content: Bytes) -> Preview:
    """Take a preview's content apart; raises ValueError that says what is wrong. The arrays are views of it."""
    if content.nbytes < _HEAD.size:
        raise ValueError("a preview ends inside its head")
    version, level, zero, segment, elements, residual, base, block, unit, rest = _HEAD.unpack(
        content[: _HEAD.size].tobytes()
    )
    if level not in SHARES or (version, zero, segment, rest) != (VERSION, 0, SEGMENT, 0):
        raise ValueError("a preview of another version or level")
    if content.nbytes != content_size(elements) or not math.isfinite(residual) or residual < 0:
        raise ValueError("a preview's head contradicts its size")
    segments = -(-elements // SEGMENT)
    ratios = content[content.nbytes - 2 * segments :].view("<f2")
    with np.errstate(all="ignore"):
        scales = ratios.astype(np.float32) * np.float32(unit)
    if not math.isfinite(unit) or not np.isfinite(scales).all():
        raise ValueError("a preview's scales are not finite")
    return Preview(
        level,
        Digest(base),
        Digest(block),
        elements,
        residual,
        scales,
        content[_HEAD.size : content.nbytes - 2 * segments],
    )


assert _HEAD.size == 96
assert _ROW.size == DIGEST_BYTES + 16
