"""Load: processes that do anything to one store at once, and are killed and started again, for as long as one likes.

    python tests/trust/soak.py --minutes 10 --processes 4 --seed 0

Each worker says through a pipe what it is about to do and what was acknowledged; the parent keeps that, kills workers
at random, and looks at the end: `mp verify` finds nothing, every ref is where it was acknowledged to be (or where a
worker that was killed was about to move it), and every acknowledged commit that a ref leads to exports bit for bit.
Exits with 1, and says why, where that is not so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))

from mergepipe.merge import Expert, execute, parse_budget, plan_merge  # noqa: E402
from mergepipe.store import Digest, Store  # noqa: E402
from mergepipe.store.analyze import analyze, lacking, level_for  # noqa: E402
from mergepipe.store.check import verify  # noqa: E402
from mergepipe.store.drop_previews import drop_previews  # noqa: E402
from mergepipe.store.errors import ConflictError, MergePipeError, NotFoundError  # noqa: E402
from mergepipe.store.gc import collect  # noqa: E402
from mergepipe.store.history import reflog, walk  # noqa: E402
from mergepipe.store.recover import recover  # noqa: E402
from mergepipe.store.refs import all_refs, find_ref  # noqa: E402
from mergepipe.store.repack import models_to_repack, repack  # noqa: E402
from support.checkpoints import folder_bytes  # noqa: E402
from support.model import BLOCK_BYTES, VARIANTS, Content, content_of, digest_of, move_ref, strays, write_variants  # noqa: E402

SHARED = "shared"
OWN = ("a", "b", "c")
SHARES = {
    "ingest": 30, "merge": 15, "branch": 8, "tag": 4, "rm": 10, "export": 10, "gc": 6, "verify": 3, "repack": 5,
    "analyze": 5, "drop previews": 3, "recover": 1,
}  # fmt: skip


def tensors_of_folder(folder: Path) -> Content:
    """An exported checkpoint's tensors, read without the code under test."""
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = {name: entry for name, entry in json.loads(data[8 : 8 + size]).items() if name != "__metadata__"}
    offsets = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: data[8 + size + begin : 8 + size + end] for name, (begin, end) in offsets.items()}


class Worker:
    """One process: random commands, and what came of them, on standard output."""

    def __init__(self, root: Path, checkpoints: Path, number: int, seed: int) -> None:
        self.store = Store.open(root)
        self.checkpoints = [checkpoints / f"v{variant}" for variant in range(VARIANTS)]
        self.number = number
        self.choose = random.Random(seed)
        self.known: dict[str, Digest | None] = {}
        self.stopped = False
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopped", True))

    def run(self, most: int) -> None:
        """Until it is told to stop, or for so many commands."""
        with self.store.catalog.reading() as view:
            for name in OWN:
                found = find_ref(view, f"w{self.number}/{name}")
                self.known[f"w{self.number}/{name}"] = found.commit if found else None
        say(found={name: commit.hex() if commit else None for name, commit in self.known.items()})
        done = 0
        while not self.stopped and (not most or done < most):
            (action,) = self.choose.choices(list(SHARES), list(SHARES.values()))
            self.act(action)
            done += 1
        self.store.close()

    def act(self, action: str) -> None:
        do: Callable[[], dict[str, Any]] = getattr(self, action.replace(" ", "_"))
        began = time.monotonic()
        try:
            said = do()
        except (ConflictError, NotFoundError) as error:
            if not error.hint:
                say(broken=action, trace=f"no hint: {error!r}")
            say(refused=action, why=error.message[:300])
        except MergePipeError as error:
            say(broken=action, trace=f"{error!r} hint {error.hint!r}\n{traceback.format_exc()[-3000:]}")
        except Exception:
            say(broken=action, trace=traceback.format_exc()[-3500:])
        else:
            say(done=action, seconds=round(time.monotonic() - began, 3), **said)

    def own(self, *, there: bool) -> str:
        names = [name for name, commit in self.known.items() if commit is not None or not there]
        if not names:
            raise NotFoundError("nothing of its own yet", hint="-")
        return self.choose.choice(names)

    def any_ref(self) -> str:
        """A ref of anybody's: it may be gone in a moment."""
        with self.store.catalog.reading() as view:
            return self.choose.choice([ref.name for ref in all_refs(view)])

    def _moved(self, name: str, commit: Digest | None) -> dict[str, Any]:
        if name in self.known:
            self.known[name] = commit
        return {"ref": name, "commit": commit.hex() if commit else None}

    def _target(self) -> str:
        name = SHARED if self.choose.random() < 0.2 else self.own(there=False)
        say(begin=name)
        return name

    def ingest(self) -> dict[str, Any]:
        name, variant = self._target(), self.choose.randrange(VARIANTS)
        base = self.choose.choice([None, "base", "base", self.any_ref()])
        previews = base is not None and self.choose.random() < 0.5
        (found,) = self.store.ingest([self.checkpoints[variant]], ref=name, base=base, previews=previews)
        return {**self._moved(name, found.commit), "variant": variant}

    def merge(self) -> dict[str, Any]:
        name, method = self._target(), self.choose.choice(["task_arithmetic", "ties"])
        own = {"density": 0.5} if method == "ties" else {}
        refs = dict.fromkeys(self.choose.choice([self.any_ref(), self.own(there=True)]) for _ in range(2))
        experts = [Expert(ref, {"weight": self.choose.choice([0.3, 0.5, 1.0]), **own}) for ref in refs]
        budget = self.choose.choice([None, "60%", "25%"])
        plan = plan_merge(self.store, "base", experts, method, budget=parse_budget(budget, None))
        found = execute(self.store, plan, name)
        said = self._moved(name, found.commit)
        if name != SHARED:
            said["content"] = digest_of(content_of(self.store, found.commit))
        return said

    def branch(self) -> dict[str, Any]:
        name, commit = self._target(), self.store.resolve(self.any_ref())
        with self.store.catalog.reading() as view:
            before = find_ref(view, name)
        move_ref(self.store, name, before.commit if before else None, commit)
        return self._moved(name, commit)

    def tag(self) -> dict[str, Any]:
        name = f"w{self.number}/t{self.choose.randrange(3)}"
        move_ref(self.store, name, None, self.store.resolve(self.any_ref()), "tag")
        return {}

    def rm(self) -> dict[str, Any]:
        if self.choose.random() < 0.5:  # a tag is not kept count of
            name = f"w{self.number}/t{self.choose.randrange(3)}"
            commit = self.store.resolve(name)
            move_ref(self.store, name, commit, None, "tag")
            return {}
        name = self.own(there=True)
        say(begin=name)
        move_ref(self.store, name, self.known[name], None)
        return self._moved(name, None)

    def export(self) -> dict[str, Any]:
        name = self.own(there=True) if self.choose.random() < 0.7 else self.any_ref()
        with tempfile.TemporaryDirectory(dir=self.checkpoints[0].parent) as folder:
            self.store.snapshot(name).export(Path(folder) / "out")
            tensors_of_folder(Path(folder) / "out")
        return {}

    def gc(self) -> dict[str, Any]:
        return {"freed": collect(self.store, apply=True, grace_seconds=0).freed_bytes}

    def verify(self) -> dict[str, Any]:
        damaged = verify(self.store).damaged
        if damaged:
            raise AssertionError(damaged[:3])
        return {}

    def repack(self) -> dict[str, Any]:
        name = self.own(there=True)
        found = repack(self.store, models_to_repack(self.store, [name]))
        return {"replaced": sum(each.replaced for each in found)}

    def analyze(self) -> dict[str, Any]:
        pair = self.store.snapshot("base"), self.store.snapshot(self.own(there=True))
        level = level_for(self.store, *pair)
        return {"made": analyze(self.store, lacking(self.store, *pair, previews=True), previews=level).previews}

    def drop_previews(self) -> dict[str, Any]:
        return {"dropped": len(drop_previews(self.store).ids)}

    def recover(self) -> dict[str, Any]:
        layout = self.store.layout
        self.store.close()
        try:
            return {"made": recover(layout, apply=True).is_needed}
        finally:
            self.store = Store.open(layout.root)


def say(**what: Any) -> None:
    """One line, in one write: it is there whole or not at all."""
    os.write(1, (json.dumps(what) + "\n").encode())


@dataclass
class Ledger:
    """What was acknowledged: where refs are, which moves began and were not heard of, contents of commits."""

    refs: dict[str, str | None] = field(default_factory=dict)
    began: dict[str, bool] = field(default_factory=dict)
    contents: dict[str, str] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)
    commits: set[str] = field(default_factory=set)
    done: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    slowest: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    kills: int = 0
    variants: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def hear(self, line: str) -> None:
        """Take down what a worker said."""
        what = json.loads(line)
        with self.lock:
            if "found" in what:
                for name, commit in what["found"].items():
                    self._found(name, commit)
            elif "begin" in what:
                self.began[what["begin"]] = True
            elif "done" in what:
                self._done(what)
            elif "refused" in what:
                self.refused[what["refused"]] += 1
                self.reasons[" ".join(word for word in what["why"].split() if not set(word) & set("/'0123456789"))] += 1
                self.began = {name: True for name in self.began if name == SHARED}
            else:
                self.problems.append(f"{what['broken']}: {what['trace']}")

    def _found(self, name: str, commit: str | None) -> None:
        """What a worker that began again found, after it may have been killed in the middle of a move."""
        if commit != self.refs.get(name) and not self.began.pop(name, False):
            self.problems.append(f"{name} was acknowledged at {self.refs.get(name)} and is at {commit}")
        self.refs[name] = commit

    def _done(self, what: dict[str, Any]) -> None:
        self.done[what["done"]] += 1
        self.slowest[what["done"]] = max(what["seconds"], self.slowest.get(what["done"], 0.0))
        name, commit = what.get("ref"), what.get("commit")
        if name is None:
            return
        self.began.pop(name, None)
        content = self.variants[what["variant"]] if "variant" in what else what.get("content")
        if commit is not None:
            self.commits.add(commit)
            if content is not None and self.contents.setdefault(commit, content) != content:
                self.problems.append(f"commit {commit} had another content before")
        if name == SHARED and commit is not None:
            self.shared.add(commit)
        else:
            self.refs[name] = commit


class Soak:
    """The parent."""

    def __init__(self, folder: Path, processes: int, seed: int, operations: int = 0) -> None:
        self.folder = folder
        self.root = folder / ".mp"
        self.choose = random.Random(seed)
        self.operations = operations
        self.processes = processes
        self.paths = write_variants(folder)
        self.ledgers = [Ledger() for _ in range(processes)]
        self.running: dict[int, tuple[subprocess.Popen[str], threading.Thread]] = {}
        with Store.create(self.root, block_bytes=BLOCK_BYTES) as store:
            store.ingest([self.paths[0]], ref="base")
            store.ingest([self.paths[1]], ref=SHARED, base="base")
            contents = [digest_of(tensors_of_folder(path)) for path in self.paths]
        for ledger in self.ledgers:
            ledger.variants = contents

    def start(self, number: int) -> None:
        words = [self.root, self.folder, number, self.choose.randrange(1 << 30), self.operations]
        process = subprocess.Popen(
            [sys.executable, __file__, "--worker", *map(str, words)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None

        def listen() -> None:
            for line in process.stdout or ():
                if line.endswith("\n"):
                    self.ledgers[number].hear(line)

        thread = threading.Thread(target=listen)
        thread.start()
        self.running[number] = process, thread

    def end(self, number: int, how: signal.Signals | None, *expected: int) -> None:
        """Wait for a worker, after a signal; what it said is heard to its end."""
        process, thread = self.running.pop(number)
        if how is not None:
            process.send_signal(how)
        code = process.wait()
        thread.join()
        if code not in expected:
            self.ledgers[number].problems.append(f"worker {number} ended with {code}")

    def run(self, seconds: float, kill_every: float) -> None:
        """Kill and start again until the time is over."""
        for number in range(self.processes):
            self.start(number)
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.problems():
            time.sleep(min(self.choose.expovariate(1 / kill_every), max(until - time.monotonic(), 0.0)))
            number = self.choose.randrange(self.processes)
            if time.monotonic() < until and self.running[number][0].poll() is None:
                self.end(number, signal.SIGKILL, -signal.SIGKILL)
                self.ledgers[number].kills += 1
                self.start(number)
        for number in range(self.processes):
            self.end(number, signal.SIGTERM, 0, -signal.SIGTERM)  # the latter while it began

    def problems(self) -> list[str]:
        return [problem for ledger in self.ledgers for problem in ledger.problems]

    def finish(self) -> list[str]:
        """Look at what is there; returns what is wrong."""
        problems = self.problems()
        with Store.open(self.root) as store:
            problems += [f"damaged: {each}" for each in verify(store).damaged]
            problems += self._refs(store)
            problems += self._contents(store)
            collect(store, apply=True, grace_seconds=0)
            problems += [f"left behind: {name}" for name in strays(store)]
            problems += [f"damaged after gc: {each}" for each in verify(store).damaged]
        return problems

    def _refs(self, store: Store) -> list[str]:
        problems = []
        with store.catalog.reading() as view:
            found = {ref.name: ref.commit.hex() for ref in all_refs(view)}
            logged = {move.new.hex() for move in reflog(view, SHARED) if move.new is not None}
        for ledger in self.ledgers:
            for name, commit in ledger.refs.items():
                if found.get(name) != commit and not ledger.began.get(name):
                    problems.append(f"{name} was acknowledged at {commit} and is at {found.get(name)}")
            problems += [f"{SHARED} forgot {commit}" for commit in ledger.shared - logged]
        return problems

    def _contents(self, store: Store) -> list[str]:
        problems = []
        known = {commit: content for ledger in self.ledgers for commit, content in ledger.contents.items()}
        with store.catalog.reading() as view:
            refs = all_refs(view)
            reached = [entry.id for entry in walk(view, [ref.commit for ref in refs])]
        for commit in reached:
            content = digest_of(content_of(store, commit))
            if known.get(commit.hex(), content) != content:
                problems.append(f"commit {commit.short} has another content")
        for number, commit in enumerate({ref.commit for ref in refs}):
            folder = self.folder / "final" / str(number)
            store.snapshot_of(commit).export(folder)
            content = digest_of(tensors_of_folder(folder))
            if known.get(commit.hex(), content) != content:
                problems.append(f"commit {commit.short} exports another content")
            if content in self.ledgers[0].variants and store.commit(commit).kind == "ingest":
                came = self.paths[self.ledgers[0].variants.index(content)]
                if folder_bytes(folder) != folder_bytes(came):
                    problems.append(f"commit {commit.short} exports other files than {came.name}")
            shutil.rmtree(folder)
        self.reached = len(reached)
        return problems

    def summary(self) -> dict[str, Any]:
        done: Counter[str] = sum((ledger.done for ledger in self.ledgers), Counter())
        return {
            "operations": done.total(),
            "done": dict(done.most_common()),
            "refused": dict(sum((ledger.refused for ledger in self.ledgers), Counter()).most_common()),
            "reasons": dict(sum((ledger.reasons for ledger in self.ledgers), Counter()).most_common(12)),
            "kills": sum(ledger.kills for ledger in self.ledgers),
            "commits": len(set().union(*(ledger.commits for ledger in self.ledgers))),
            "commits checked": self.reached,
            "slowest": {
                name: max(ledger.slowest.get(name, 0.0) for ledger in self.ledgers) for name in sorted(done)
            },
        }  # fmt: skip


def soak(
    folder: Path, seconds: float, processes: int, seed: int, kill_every: float
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """A whole run; returns its summary, and what went wrong."""
    run = Soak(folder, processes, seed)
    run.run(seconds, kill_every)
    problems = run.finish()
    return run.summary(), problems


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        root, checkpoints, number, seed, most = sys.argv[2:]
        Worker(Path(root), Path(checkpoints), int(number), int(seed)).run(int(most))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill-every", type=float, default=4.0, metavar="SECONDS", help="on average")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder); kept after a failure")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir=asked.folder))
    summary, problems = soak(folder, asked.minutes * 60, asked.processes, asked.seed, asked.kill_every)
    print(json.dumps(summary, indent=1))
    if problems:
        print(f"{len(problems)} PROBLEMS; the store is in {folder}\n" + "\n\n".join(problems[:20]))
        return 1
    shutil.rmtree(folder)
    print("verify is clean, and all that was acknowledged is there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
