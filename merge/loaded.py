"""What was read of one place: the inputs as they were decoded, in the thread's own memory or in memory that is held."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.inputs import Virtual
from mergepipe.merge.method import Looks, Stack
from mergepipe.store.codecs import Bytes, scratch
from mergepipe.store.digest import Digest
from mergepipe.store.dtypes import DType
from mergepipe.store.previews import CODES_START, Preview, content_size

_MOST_FREE_BYTES: Final = 96 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """One expert's block, decoded. ``virtual``: ``block`` or ``preview`` is what that is computed from, and ``onto``
    what it is added to, where that is not the reference's block."""

    dtype: DType
    block: Bytes | None
    virtual: Virtual | None = None
    onto: Bytes | None = None
    preview: Preview | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A place's inputs, decoded. ``root``: what a delta of the result may be stored against.

    A part that is None is the reference's own block. ``stack``: where all are bfloat16 and lie in the store, their
    blocks as one array (K, elements); the parts' blocks are then its rows, but for those of which the preview was read.
    """

    base: Bytes
    base_type: DType
    root: tuple[Digest, Bytes]
    parts: tuple[Part | None, ...]
    stack: NDArray[np.uint16] | None = None

    @property
    def present(self) -> NDArray[np.bool_]:
        """Which experts have a block of their own, (K,)."""
        return np.array([part is not None and part.block is not None for part in self.parts], np.bool_)

    def arrays(self) -> Iterator[Bytes]:
        """The memory of a held place, each array at least once."""
        yield self.base
        yield self.root[1]
        if self.stack is not None:
            yield self.stack.reshape(-1).view(np.uint8)
        else:
            for part in self.parts:
                if part is not None:
                    yield from (block for block in (part.block, part.onto) if block is not None)

    def as_stack(self) -> Stack | None:
        """The whole block for methods that have a short way for it."""
        if self.stack is None:
            return None
        base = self.base.view("<u2")
        return Stack(self.stack, self.present, base, self._looks(base.size) or _no_looks(len(self.parts)))

    def _looks(self, elements: int) -> Looks | None:
        """The previews that were read, side by side, as :func:`load` laid them."""
        found = [(number, part.preview) for number, part in enumerate(self.parts) if part and part.preview]
        if not found:
            return None
        count = len(self.parts)
        coarse = np.zeros(count, np.bool_)
        scales = scratch.bytes("scales", count * found[0][1].scales.size * 4).view(np.float32).reshape(count, -1)
        for number, preview in found:
            coarse[number] = True
            scales[number] = preview.scales
        size = content_size(elements)
        contents = scratch.bytes("previews", count * size).reshape(count, size)
        return Looks(coarse, contents, CODES_START, scales)


def _no_looks(experts: int) -> Looks:
    nothing = np.empty((experts, 0), np.uint8)
    return Looks(np.zeros(experts, np.bool_), nothing, 0, nothing.view(np.float32))


class Pool:
    """Memory for what is held: fresh arrays cost a page fault for every 4 KiB, so those given back are used again."""

    def __init__(self) -> None:
        self._free: dict[int, list[Bytes]] = {}
        self._free_bytes = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> Bytes:
        """``size`` bytes, with anything in them."""
        with self._lock:
            free = self._free.get(size)
            if free:
                self._free_bytes -= size
                return free.pop()
        return np.empty(size, np.uint8)

    def give(self, loaded: Loaded) -> None:
        """Take back what a held place has; nobody looks at it any more."""
        arrays = {id(array): array for array in loaded.arrays()}
        with self._lock:
            for array in arrays.values():
                if self._free_bytes + array.nbytes <= _MOST_FREE_BYTES:
                    self._free_bytes += array.nbytes
                    self._free.setdefault(array.nbytes, []).append(array)
