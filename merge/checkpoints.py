"""What a merge has finished, published as it goes: an interrupted merge finds it again, and computes only the rest.

Blocks, their recipes and statistics gather here; every few seconds one thread makes all of them durable and visible at
once, as any writer does. No ref moves before the end, so nobody sees half a merge.
"""

from __future__ import annotations

import threading
import time
from typing import Final

from mergepipe.store.digest import Digest
from mergepipe.store.publish import Changes, publish
from mergepipe.store.staging import Staging
from mergepipe.store.store import Store

INTERVAL_SECONDS: Final = 3.0
_POLL_SECONDS: Final = 0.1


class Finished:
    """The finished part of one run. Threads may share it."""

    def __init__(
        self, store: Store, staging: Staging, interval_seconds: float | None = None, *, keep_results: bool = True
    ) -> None:
        self._store = store
        self._staging = staging
        self._interval = INTERVAL_SECONDS if interval_seconds is None else interval_seconds
        self._keep_results = keep_results
        self._lock = threading.Lock()
        self._changes = Changes()
        self._relied_on: set[Digest] = set()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.published_blocks = 0

    def begin(self) -> None:
        """Start publishing in the background."""
        self._thread = threading.Thread(target=self._work, name="publisher", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop publishing in the background; what is left stays for :meth:`take` or :meth:`publish`."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def check(self) -> None:
        """Raises what publishing in the background raised."""
        if self._error is not None:
            raise self._error

    def rely_on(self, digest: Digest) -> None:
        """The result has a block that was in the store before."""
        with self._lock:
            self._relied_on.add(digest)

    def add_statistics(self, rows: dict[bytes, bytes]) -> None:
        """Rows for the catalog's ``tensors``."""
        with self._lock:
            self._changes.tensors.update(rows)

    def add_block(self, recipe: Digest, digest: Digest, base: Digest, statistics: bytes | None) -> None:
        """A block is computed and staged, or was in the store before."""
        with self._lock:
            if self._keep_results:
                self._changes.results[recipe] = digest
            self._relied_on.add(digest)
            if statistics is not None:
                self._changes.deltas[base + digest] = statistics
        self.check()

    def take(self) -> Changes:
        """All that is not published yet, for the last publication; it names what the result relies on."""
        with self._lock:
            changes, self._changes = self._changes, Changes()
            changes.relied_on = tuple(self._relied_on)
        return changes

    def publish(self) -> None:
        """Publish what is finished now."""
        with self._lock:  # results name blocks that were staged before, so the blocks are taken after
            changes, self._changes = self._changes, Changes()
        batch = self._staging.take_batch()
        if batch.rows or changes.results or changes.tensors:
            publish(self._store.catalog, batch, changes)
            self.published_blocks += len(changes.results)

    def _work(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(_POLL_SECONDS):
            if time.monotonic() - last >= self._interval:
                try:
                    self.publish()
                except BaseException as error:  # handed to the thread that merges
                    self._error = error
                    return
                last = time.monotonic()
