"""What is written to the terminal: columns, colours where they are wanted, progress where somebody watches."""

from __future__ import annotations

import io
import sys
import threading

import pytest

from mergepipe.cli.progress import progress_bar
from mergepipe.cli.tables import Cell, first_line, local_time, plural, print_table, seconds_text, shape_text, share
from mergepipe.cli.terminal import harmless, paint, wants_colour


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def test_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["name", "size", "none"], [["a", "10", ""], [Cell("longer", "cyan"), "5", ""]], right="size")
    assert capsys.readouterr().out == "name    size\na         10\nlonger     5\n"


def test_no_rows(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["name", "size"], [])
    assert capsys.readouterr().out == ""


def test_colours_only_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not wants_colour(io.StringIO())
    assert wants_colour(Terminal())
    assert paint("x", "red", Terminal()) == "\033[1;31mx\033[0m"
    assert paint("x", "", Terminal()) == "x"
    monkeypatch.setenv("TERM", "dumb")
    assert not wants_colour(Terminal())
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert wants_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour(Terminal())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("two\nlines", "two\nlines"),
        ("bell\a", "bell\\x07"),
        ("\033[2Jclear", "\\x1b[2Jclear"),
        ("\033[1;31mours\033[0m", "\033[1;31mours\033[0m"),
        ("back\rward", "back\\rward"),
        ("lone \udcff", "lone \\udcff"),
    ],
)
def test_control_characters_are_written_out(text: str, shown: str) -> None:
    assert harmless(text) == shown


def test_words_for_numbers() -> None:
    assert (plural(1, "block"), plural(1234, "block"), plural(0, "entry", "entries")) == (
        "1 block", "1,234 blocks", "0 entries",
    )  # fmt: skip
    assert (shape_text((2, 3)), shape_text(())) == ("2 × 3", "scalar")  # noqa: RUF001
    assert (share(1, 3), share(0, 0)) == ("33%", "")
    assert [seconds_text(value) for value in (0.04, 9.94, 12.3, 59.6, 200)] == [
        "0.0 s", "9.9 s", "12 s", "1 min 0 s", "3 min 20 s",
    ]  # fmt: skip
    assert local_time("2030-01-02T03:04:05.000000Z")[:5] == "2030-"
    assert local_time("never") == "never"
    assert (first_line("a\nb"), first_line("")) == ("a", "")


def test_nobody_watches() -> None:
    with progress_bar() as progress:
        assert progress is None


def test_progress_from_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_bar(quiet=True) as progress:
        assert progress is None
    with progress_bar() as progress:
        assert progress is not None
        threads = [
            threading.Thread(target=lambda: [progress("ingest", done, 1 << 20) for done in range(0, 1 << 20, 1 << 14)])
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        progress("ingest", 1 << 20, 1 << 20)
        progress("flush", 0, 0)
    assert "ingest" in screen.getvalue()
    assert "MiB" in screen.getvalue()
