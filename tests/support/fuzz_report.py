"""What fuzzing covered, at the end of a session: counts by kind of input and by outcome."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

PROPERTY = "fuzzed"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A line for each kind of input; the figures come with the reports, from other processes too."""
    results = [
        json.loads(value)
        for report in terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
        for name, value in getattr(report, "user_properties", [])
        if name == PROPERTY
    ]
    if not results:
        return
    total: Counter[str] = Counter()
    terminalreporter.section("fuzzing: mutations by kind of input and outcome")
    for result in sorted(results, key=lambda each: str(each["kind"])):
        outcomes = Counter(result["outcomes"])
        total += outcomes
        shown = ", ".join(f"{name} {count}" for name, count in outcomes.most_common())
        terminalreporter.line(f"{result['kind']:16} {outcomes.total():6}  {shown}")
    shown = ", ".join(f"{name} {count}" for name, count in total.most_common(4))
    grown = max(result["grown_bytes"] for result in results) >> 20
    terminalreporter.line(f"{'all':16} {total.total():6}  {shown}; memory grew by {grown} MiB at most")
