"""What is kept: blocks, objects, the catalog, manifests, commits, refs; ingest and export."""

from mergepipe.store.digest import Digest
from mergepipe.store.errors import MergePipeError
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.store import Store
from mergepipe.store.version import VERSION

__all__ = ["VERSION", "Digest", "MergePipeError", "Snapshot", "Store"]
