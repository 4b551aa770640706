"""A store against a dictionary: after any sequence of commands it holds what the dictionary says, bit for bit."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mergepipe.merge import Expert, execute, parse_budget, plan_merge
from mergepipe.store import Digest, Store
from mergepipe.store.analyze import analyze, lacking, level_for
from mergepipe.store.drop_previews import drop_previews, plan_removal
from mergepipe.store.errors import ConflictError
from mergepipe.store.gc import collect
from mergepipe.store.layout import Layout
from mergepipe.store.recover import recover
from mergepipe.store.repack import models_to_repack, repack
from support.checkpoints import folder_bytes
from support.covered import count
from support.model import BLOCK_BYTES, VARIANTS, Content, Model, content_of, content_of_variant, move_ref, strays
from support.model import write_variants as write
from support.stores import assert_clean

NAMES = ("a", "b", "c", "merged/x")
TAGS = ("v1", "v2")
numbers = st.integers(0, 11)
RULES: dict[str, int] = {}


@cache
def checkpoints(folder: Path) -> tuple[list[Path], list[Content], list[dict[str, bytes]]]:
    """The variants on disk, written once: their folders, their tensors, their files."""
    paths = write(folder / "variants")
    return paths, [content_of_variant(number) for number in range(VARIANTS)], [folder_bytes(path) for path in paths]


class StoreMachine(RuleBasedStateMachine):
    """Each rule does one command to the store and says to the model what must have come of it."""

    top: Path

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=self.top))
        self.paths, self.contents, self.files = checkpoints(self.top)
        self.model = Model()
        self.ingested: dict[Digest, int] = {}
        self.merged: dict[object, Content] = {}
        self.store = Store.create(self.folder / ".mp", block_bytes=BLOCK_BYTES)
        self.touched = True

    def done(self, what: str) -> None:
        RULES[what] = RULES.get(what, 0) + 1
        event(what)

    def pick(self, number: int) -> str:
        return sorted(self.model.refs)[number % len(self.model.refs)]

    @initialize()
    def first(self) -> None:
        (result,) = self.store.ingest([self.paths[0]], ref="a")
        self._came("a", result.commit, 0)

    def _came(self, name: str, commit: Digest, number: int) -> None:
        self.model.move(name, commit)
        self.model.contents[commit] = self.contents[number]
        self.ingested[commit] = number

    @rule(number=st.integers(0, VARIANTS - 1), name=st.sampled_from(NAMES))
    def ingest(self, number: int, name: str) -> None:
        self._ingest(number, name, None, previews=False)

    @precondition(lambda self: self.model.refs)
    @rule(number=st.integers(1, VARIANTS - 1), name=st.sampled_from(NAMES), base=numbers, previews=st.booleans())
    def ingest_on_base(self, number: int, name: str, base: int, previews: bool) -> None:
        self._ingest(number, name, self.pick(base), previews=previews)

    def _ingest(self, number: int, name: str, base: str | None, *, previews: bool) -> None:
        before = self.model.refs.get(name)
        (result,) = self.store.ingest([self.paths[number]], ref=name, base=base, previews=previews)
        if result.unchanged:
            assert before is not None
            assert result.commit == before[0]
            assert self.model.contents[before[0]] == self.contents[number]
        else:
            self._came(name, result.commit, number)
        self.done("ingest, unchanged" if result.unchanged else f"ingest{' on a base' if base else ''}")

    @precondition(lambda self: self.model.refs)
    @rule(
        name=st.sampled_from(NAMES),
        base=numbers,
        experts=st.lists(numbers, min_size=1, max_size=2),
        method=st.sampled_from(["task_arithmetic", "ties"]),
        budget=st.sampled_from([None, None, "70%", "25%"]),
    )
    def merge(self, name: str, base: int, experts: list[int], method: str, budget: str | None) -> None:
        on, chosen = self.pick(base), list(dict.fromkeys(self.pick(number) for number in experts))
        parameters = {"density": 0.5} if method == "ties" else {}
        named = [Expert(expert, {"weight": 0.5, **parameters}) for expert in chosen]
        plan = plan_merge(self.store, on, named, method, budget=parse_budget(budget, None))
        before = self.model.refs.get(name)
        inputs = tuple(frozenset(self.model.contents[self.model.refs[ref][0]].items()) for ref in (on, *chosen))
        result = execute(self.store, plan, name)
        content = content_of(self.store, result.commit)
        if budget is None:  # what a budget leaves out depends on how blocks are stored
            assert self.merged.setdefault((method, inputs), content) == content
        if result.unchanged:
            assert before is not None
            assert (result.commit, content) == (before[0], self.model.contents[before[0]])
        else:
            self.model.move(name, result.commit)
            self.model.contents[result.commit] = content
        self.done(f"merge {method}{' within a budget' if budget else ''}")

    @precondition(lambda self: self.model.refs)
    @rule(name=st.sampled_from(TAGS), which=numbers)
    def tag(self, name: str, which: int) -> None:
        if name in self.model.refs:
            with pytest.raises(ConflictError, match="is a tag"):
                self.store.ingest([self.paths[0]], ref=name)
            return
        commit = self.model.refs[self.pick(which)][0]
        move_ref(self.store, name, None, commit, "tag")
        self.model.move(name, commit, "tag")
        self.done("tag")

    @precondition(lambda self: self.model.refs)
    @rule(name=st.sampled_from(NAMES), which=numbers)
    def move_branch(self, name: str, which: int) -> None:
        commit, before = self.model.refs[self.pick(which)][0], self.model.refs.get(name)
        move_ref(self.store, name, before[0] if before else None, commit)
        self.model.move(name, commit)
        self.done("branch")

    @precondition(lambda self: self.model.refs)
    @rule(name=st.sampled_from(NAMES), which=numbers)
    def move_from_elsewhere(self, name: str, which: int) -> None:
        """The writer saw another value than the ref has."""
        commit, before = self.model.refs[self.pick(which)][0], self.model.refs.get(name)
        with pytest.raises(ConflictError, match="somebody else moved it"):
            move_ref(self.store, name, None if before else commit, commit)
        self.done("branch, refused")

    @precondition(lambda self: len(self.model.refs) > 1)
    @rule(which=numbers)
    def remove(self, which: int) -> None:
        name = self.pick(which)
        commit, kind = self.model.refs[name]
        move_ref(self.store, name, commit, None, kind)
        self.model.move(name, None)
        self.done("rm")

    @rule()
    def gc(self) -> None:
        found = collect(self.store, apply=True, grace_seconds=0)
        assert not strays(self.store)
        self.done("gc, something" if found.freed_bytes else "gc, nothing")

    @rule()
    def drop_all_previews(self) -> None:
        found = drop_previews(self.store)
        assert not plan_removal(self.store).ids
        self.done("drop previews" if found.ids else "drop previews, none")

    @precondition(lambda self: self.model.refs)
    @rule(which=numbers, base=numbers)
    def make_previews(self, which: int, base: int) -> None:
        one, other = (self.store.snapshot(self.pick(number)) for number in (base, which))
        pairs = lacking(self.store, one, other, previews=True)
        found = analyze(self.store, pairs, previews=level_for(self.store, one, other))
        assert not lacking(self.store, one, other, previews=True)
        self.done("analyze, previews" if found.previews else "analyze, none")

    @rule()
    def repack_all(self) -> None:
        results = repack(self.store, models_to_repack(self.store))
        assert not any(result.unreadable or result.left for result in results)
        self.done("repack" if any(result.replaced for result in results) else "repack, nothing")

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = Store.open(self.folder)
        self.done("reopen")

    @rule(lost=st.booleans())
    def recover(self, lost: bool) -> None:
        layout: Layout = self.store.layout
        self.store.close()
        if lost:
            shutil.rmtree(layout.catalog)
        recovery = recover(layout, apply=True)
        assert recovery.is_needed == lost
        self.store = Store.open(self.folder)
        self.done("recover" if lost else "recover, nothing lost")

    @rule()
    def verify(self) -> None:
        assert_clean(self.store)
        self.done("verify")

    @invariant()
    def it_holds_what_the_model_says(self) -> None:
        self.model.check(self.store)

    def teardown(self) -> None:
        try:
            assert_clean(self.store)
            for number, (commit, _) in enumerate(self.model.refs.values()):
                folder = self.folder / "out" / str(number)
                self.store.snapshot_of(commit).export(folder)
                if commit in self.ingested:
                    assert folder_bytes(folder) == self.files[self.ingested[commit]]
            collect(self.store, apply=True, grace_seconds=0)
            assert not strays(self.store)
            assert_clean(self.store)
            self.model.check(self.store)
        finally:
            self.store.close()
            shutil.rmtree(self.folder)


def test_any_sequence_of_commands(tmp_path: Path, deep: bool) -> None:
    RULES.clear()

    class Machine(StoreMachine):
        top = tmp_path

    limits = settings(max_examples=300 if deep else 25, stateful_step_count=60 if deep else 30)
    run_state_machine_as_test(Machine, settings=limits)
    count(examples=limits.max_examples, commands=sum(RULES.values()), kinds_of_commands=len(RULES))
    assert {"ingest", "ingest on a base", "rm", "repack", "recover", "gc, something"} <= RULES.keys()
