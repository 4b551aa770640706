"""What the suites that trust rests on covered, at the end of a session: steps killed, damages tried, inputs fuzzed.

A test counts what it does with :func:`count`. The figures come with its report, from other processes too.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, Final

import pytest

FUZZED: Final = "fuzzed"
_COVERED: Final = "covered"
SUITES: Final = {
    "round trip": ("tests/store/test_round_trip.py",),
    "state machine": ("tests/trust/test_state_machine.py",),
    "kill at every step": ("tests/trust/test_kill_everywhere.py", "tests/store/test_publish.py::TestCrashes"),
    "damage grid": ("tests/store/test_damage.py", "tests/store/test_preview_damage.py"),
    "races": ("tests/trust/test_races.py", "tests/store/test_publish.py::TestTwoProcesses"),
    "hostile input": ("tests/trust/test_hostile", "tests/store/test_hostile_store.py"),
    "fuzzing": ("tests/trust/test_fuzz.py",),
    "old formats": ("tests/trust/test_formats.py",),
    "disk full": ("tests/store/test_disk_full.py",),
    "soak": ("tests/trust/test_soak.py",),
}
"""The rows of the test table, and where their tests are."""
_counted: Counter[str] = Counter()


def count(**figures: int) -> None:
    """Add to what the test that runs now has covered."""
    _counted.update(figures)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """The test's figures go with its report."""
    _counted.clear()
    yield
    if _counted:
        item.user_properties.append((_COVERED, json.dumps(_counted)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A line for each suite, and one for each kind of input that was fuzzed."""
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if getattr(report, "when", "") == "call"
    ]
    figures: dict[str, Counter[str]] = defaultdict(Counter)
    fuzzed = []
    for report in reports:
        for suite, places in SUITES.items():
            if report.nodeid.startswith(places):
                figures[suite]["tests"] += 1
                for name, value in report.user_properties:
                    if name == _COVERED:
                        figures[suite].update(json.loads(value))
                    elif name == FUZZED:
                        fuzzed.append(json.loads(value))
                        figures[suite]["mutations"] += sum(fuzzed[-1]["outcomes"].values())
    if figures:
        terminalreporter.section("trust: what the suites covered")
    for suite in (suite for suite in SUITES if suite in figures):
        tests = figures[suite].pop("tests")
        shown = "".join(f", {number:,} {name.replace('_', ' ')}" for name, number in figures[suite].items())
        terminalreporter.line(f"{suite:20} {tests} tests{shown}")
    if fuzzed:
        _fuzzing(terminalreporter, fuzzed)


def _fuzzing(terminalreporter: Any, results: list[dict[str, Any]]) -> None:
    total: Counter[str] = Counter()
    terminalreporter.section("fuzzing: mutations by kind of input and outcome")
    for result in sorted(results, key=lambda each: str(each["kind"])):
        outcomes = Counter(result["outcomes"])
        total += outcomes
        shown = ", ".join(f"{name} {count}" for name, count in outcomes.most_common())
        terminalreporter.line(f"{result['kind']:20} {outcomes.total():6}  {shown}")
    shown = ", ".join(f"{name} {count}" for name, count in total.most_common(4))
    grown = max(result["grown_bytes"] for result in results) >> 20
    terminalreporter.line(f"{'all':20} {total.total():6}  {shown}; memory grew by {grown} MiB at most")
