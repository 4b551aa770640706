"""The measuring part of ``bench/parity.py``, for tests. Importing it imports mergekit, which takes seconds."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
import parity  # found by the path above

__all__ = ["parity"]
