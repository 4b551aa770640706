"""A short run of ``soak.py``: processes that are killed at random while they all work on one store."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.covered import count


def test_ten_seconds(tmp_path: Path, deep: bool) -> None:
    words = ["--minutes", "2" if deep else "0.17", "--processes", "4", "--seed", "0", "--kill-every", "0.8"]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("soak.py"), *words, "--folder", tmp_path],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-3000:]
    summary, end = json.JSONDecoder().raw_decode(done.stdout)
    assert "all that was acknowledged is there" in done.stdout[end:]
    count(**{name: summary[name] for name in ("operations", "kills", "commits")})
    assert summary["operations"] > 10
