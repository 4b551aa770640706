"""The rest of a store, fuzzed: rows of the catalog, its file, the settings, the journal of refs."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergepipe.store import Store
from mergepipe.store.catalog import DATABASES, Writing
from mergepipe.store.check import verify
from mergepipe.store.errors import MergePipeError
from mergepipe.store.history import reflog, walk
from mergepipe.store.journal import read_journal
from mergepipe.store.layout import read_layout
from mergepipe.store.refs import all_refs
from mergepipe.store.usage import usage
from support.fuzz import Target, mutate_bytes, mutate_json
from support.fuzz_stores import REFS, OnStore


class Rows(OnStore):
    """A row of the catalog that is anything: everything that reads rows says so, or reads what is right."""

    def __init__(self, zoo: Path, work: Path) -> None:
        super().__init__(zoo, work)
        with self.store.catalog.reading() as view:
            self.rows = {name: found for name in DATABASES if (found := list(view.items(name)))}
        self.tensors = {ref: self._weights(ref) for ref in REFS}
        self.now: tuple[str, bytes]

    def _weights(self, ref: str) -> bytes:
        snapshot = self.store.snapshot(ref)
        return b"".join(snapshot.read_tensor(name).tobytes() for name in sorted(snapshot.tensors))

    def mutate(self, dice: random.Random) -> bytes:
        database = dice.choice(sorted(self.rows))
        key, value = dice.choice(self.rows[database])
        if dice.random() < 0.2:
            key = mutate_bytes(dice, [key])[:500] or b"x"
        self.now = (database, key)
        try:
            parsed = json.loads(value)
        except ValueError:
            return mutate_bytes(dice, [value])
        return mutate_json(dice, parsed) if dice.random() < 0.7 else mutate_bytes(dice, [value])

    def check(self, data: bytes) -> str | None:
        database, key = self.now
        with self.store.catalog.reading() as view:
            marked = dict(view.items("damaged"))
            before = view.get(database, key)

        def undo(view: Writing) -> None:
            view.delete(database, key)
            if before is not None:
                view.put(database, key, before)
            for digest, _ in list(view.items("damaged")):
                if digest not in marked:
                    view.delete("damaged", digest)

        self.store.catalog.write(lambda view: view.put(database, key, data))
        try:
            return self._use(database)
        finally:
            self.store.catalog.write(undo)

    def _use(self, database: str) -> str | None:
        first: MergePipeError | None = None
        for look in self._looks():
            try:
                look()
            except MergePipeError as error:
                assert error.message
                first = first or error
        for ref in REFS:
            try:
                found = self._weights(ref)
            except MergePipeError as error:
                first = first or error
            else:
                moved = database in ("refs", "commits")
                assert moved or found == self.tensors[ref], "wrong bytes"
        if first is not None:
            raise first
        return None

    def _looks(self) -> list[Callable[[], object]]:
        def read(look: Callable[[Any], object]) -> None:
            with self.store.catalog.reading() as view:
                look(view)

        return [
            lambda: verify(self.store),
            lambda: usage(self.store),
            lambda: read(all_refs),
            lambda: read(reflog),
            lambda: read(lambda view: list(walk(view, [ref.commit for ref in all_refs(view)]))),
            *(
                lambda text=text: self.store.snapshot(text)
                for text in ("base@{0}", "merged@{0}", "merged^2", "expert0~1")
            ),
        ]


# LMDB believes its pages. Opening looks at the first of them alone: the file may have gigabytes.


class Catalogs:
    """The catalog's own file is other bytes, in a process of its own, for LMDB can end that."""

    commands = (["verify"], ["ls"], ["log"], ["recover"])
    seconds = 30

    def __init__(self, zoo: Path, work: Path) -> None:
        self.work = work
        self.good = (zoo / "store" / "catalog" / "data.mdb").read_bytes()
        shutil.rmtree(work / "store", ignore_errors=True)
        shutil.copytree(zoo / "store", work / "store")
        from mergepipe.cli.app import main  # loaded once: children begin with it

        self.main = main
        assert self._child(["--version"])[0] == 0

    def mutate(self, dice: random.Random) -> bytes:
        data = bytearray(self.good)
        page = 4096
        for _ in range(dice.choice([1, 1, 2, 8])):
            start = dice.randrange(len(data) // page) * page
            match dice.randrange(8):
                case 0:
                    data[start : start + page] = mutate_bytes(dice, [bytes(data[start : start + page])])[:page].ljust(
                        page, b"\0"
                    )
                case 1:
                    place = start + dice.randrange(64)
                    data[place] = dice.randrange(256)
                case 2:
                    data[start : start + page] = bytes(page)
                case 3:
                    other = dice.randrange(len(data) // page) * page
                    data[start : start + page] = data[other : other + page]
                case 4:
                    data[start + dice.randrange(page)] ^= 1 << dice.randrange(8)
                case 5:  # noise behind a head that says that all is well
                    begin = start + dice.choice([16, 16 + dice.randrange(400)])
                    data[begin : start + page] = dice.randbytes(start + page - begin)
                case 6:
                    place = start + 2 * dice.randrange(page // 2)
                    data[place : place + 2] = dice.randrange(1 << 16).to_bytes(2, "little")
                case 7 if len(data) > 4 * page:
                    del data[dice.randrange(len(data)) if dice.random() < 0.5 else start :]
                    if len(data) < page:
                        return bytes(data)
        return bytes(data)

    def check(self, data: bytes) -> str | None:
        (self.work / "store" / "catalog" / "data.mdb").write_bytes(data)
        (self.work / "store" / "catalog" / "lock.mdb").unlink(missing_ok=True)
        worst = None
        for words in self.commands:
            code, said = self._child([*words, "--store", str(self.work / "store")])
            assert "Traceback" not in said, said[-1500:]
            assert code == 0 or 2 <= code <= 8, f"mp {words[0]} ended with {code}\n{said[-1500:]}"
            assert said.strip(), f"exit code {code} without a word"
            worst = worst or (f"exit {code}" if code else None)
        return worst

    def _child(self, words: list[str]) -> tuple[int, str]:
        """The exit code (or minus the signal), and what was said."""
        path = self.work / "said"
        child = os.fork()
        if child == 0:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)
                out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(out, 1)
                os.dup2(out, 2)
                sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
                code = self.main(words)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            except BaseException as error:
                os.write(2, repr(error).encode())
                os._exit(99)
        end = time.monotonic() + self.seconds
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status), path.read_text(errors="replace")
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return -99, "more time than any command may take"
            time.sleep(0.002)


class Settings(OnStore):
    """``store.json`` that is anything: the store opens as it was, or says what is wrong."""

    def mutate(self, dice: random.Random) -> bytes:
        good = (self.work / "store" / "store.json").read_bytes()
        return mutate_json(dice, json.loads(good)) if dice.random() < 0.7 else mutate_bytes(dice, [good])

    def check(self, data: bytes) -> str | None:
        path = self.work / "store" / "store.json"
        good = path.read_bytes()
        path.write_bytes(data)
        try:
            assert read_layout(path.parent).block_bytes in {1 << shift for shift in range(12, 27)}
            with Store.open(path.parent) as store:
                store.snapshot("base").read_tensor("model.norm.weight")
            return None
        finally:
            path.write_bytes(good)


class Journals(OnStore):
    """The refs' journal: reading it never fails, and gives no line that was not written, but those that hold."""

    def mutate(self, dice: random.Random) -> bytes:
        from blake3 import blake3

        lines = self.store.layout.journal.read_bytes().splitlines(keepends=True)
        if dice.random() < 0.5:
            return mutate_bytes(dice, [b"".join(lines)])
        here = dice.randrange(len(lines))
        text = mutate_json(dice, json.loads(lines[here][17:])).replace(b"\n", b" ")
        lines[here] = blake3(text).hexdigest()[:16].encode() + b" " + text + b"\n"
        return b"".join(lines)

    def check(self, data: bytes) -> str | None:
        path = self.work / "journal"
        path.write_bytes(data)
        found = read_journal(path)
        assert found is not None
        good = read_journal(self.store.layout.journal)
        assert good is not None
        for entry in found.entries:
            assert entry in good.entries or all(
                isinstance(text, str) for text in (entry.name, entry.kind, entry.reason, entry.author, entry.time)
            )
        return "lines left out" if found.unreadable or found.torn else None


TARGETS: dict[str, Callable[[Path, Path], Target]] = {
    "catalog rows": Rows,
    "catalog files": Catalogs,
    "store.json": Settings,
    "refs.journal": Journals,
}
