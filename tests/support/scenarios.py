"""Commands that are interrupted at every step (:mod:`support.steps`), and what must hold of the store after that."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mergepipe.merge import Expert, execute, parse_budget, plan_merge
from mergepipe.store import Store
from mergepipe.store.analyze import analyze, lacking, level_for
from mergepipe.store.drop_previews import drop_previews, plan_removal
from mergepipe.store.errors import DamagedError, NotFoundError
from mergepipe.store.gc import collect
from mergepipe.store.layout import find_layout
from mergepipe.store.recover import recover
from mergepipe.store.refs import all_refs
from mergepipe.store.repack import models_to_repack, repack
from support.checkpoints import folder_bytes
from support.model import BLOCK_BYTES, content_of, digest_of, move_ref, strays
from support.stores import assert_clean

Look = dict[str, tuple[str, str]]
"""Of each ref its commit, and a digest of its content."""


def make_template(root: Path, checkpoints: Path) -> None:
    """A base, two experts with previews, one that came without its base, their merge, and one that was removed."""
    with Store.create(root, block_bytes=BLOCK_BYTES) as store:
        store.ingest([checkpoints / "v0"])
        store.ingest([checkpoints / "v1", checkpoints / "v2"], base="v0", previews=True)
        store.ingest([checkpoints / "v3"])
        _merge(store, "task_arithmetic", "m1", None)
        _merge(store, "ties", "old", None)
        move_ref(store, "old", store.resolve("old"), None)
        move_ref(store, "spare", None, store.resolve("v1"))


def _merge(store: Store, method: str, ref: str, budget: str | None) -> None:
    own = {"density": 0.5} if method == "ties" else {}
    named = [Expert("v1", {"weight": 0.6, **own}), Expert("v2", {"weight": 0.4, **own})]
    execute(store, plan_merge(store, "v0", named, method, budget=parse_budget(budget, None)), ref)


def _first(root: Path, checkpoints: Path) -> None:
    """As the first `mp ingest` does it."""
    try:
        store = Store.open(root)
    except NotFoundError:
        store = Store.create(root, block_bytes=BLOCK_BYTES)
    with store:
        store.ingest([checkpoints / "v0"])


def _ingest(root: Path, checkpoints: Path) -> None:
    with Store.open(root) as store:
        store.ingest([checkpoints / "v4", checkpoints / "v5"], base="v0", previews=True)


def _merge_within_a_budget(root: Path, _: Path) -> None:
    with Store.open(root) as store:
        _merge(store, "task_arithmetic", "m2", "60%")


def _gc(root: Path, _: Path) -> None:
    with Store.open(root) as store:
        collect(store, apply=True, grace_seconds=0)


def _drop_previews(root: Path, _: Path) -> None:
    with Store.open(root) as store:
        drop_previews(store)
        assert not plan_removal(store).ids


def _analyze(root: Path, _: Path) -> None:
    with Store.open(root) as store:
        one, other = store.snapshot("v0"), store.snapshot("v3")
        analyze(store, lacking(store, one, other, previews=True), previews=level_for(store, one, other))
        assert not lacking(store, one, other, previews=True)


def _repack(root: Path, _: Path) -> None:
    with Store.open(root) as store:
        repack(store, models_to_repack(store))


def _recover(root: Path, _: Path) -> None:
    recover(find_layout(root), apply=True)


def _refs(root: Path, _: Path) -> None:
    with Store.open(root) as store:
        with store.catalog.reading() as view:
            known = {ref.name: ref.commit for ref in all_refs(view)}
        if "t" not in known:
            move_ref(store, "t", None, known["m1"], "tag")
        if known["v3"] != known["v2"]:
            move_ref(store, "v3", known["v3"], known["v2"])
        if "spare" in known:
            move_ref(store, "spare", known["spare"], None)


@dataclass(frozen=True)
class Scenario:
    """A command that may be given again, the refs that it moves, and whether all of them move at once."""

    run: Callable[[Path, Path], None]
    moves: frozenset[str] = frozenset()
    together: bool = True
    from_nothing: bool = False
    loses_catalog: bool = False

    def prepare(self, template: Path) -> None:
        """Bring a copy of the template into the state that it begins with."""
        if self.loses_catalog:
            shutil.rmtree(template / "catalog")
        if self.from_nothing:
            shutil.rmtree(template)

    def look(self, root: Path) -> Look:
        """What refs there are, and what they stand for; nothing where there is no store, or its catalog is lost."""
        try:
            store = Store.open(root)
        except NotFoundError:
            return {}
        except DamagedError:
            if not self.loses_catalog:
                raise
            return {}
        with store:
            with store.catalog.reading() as view:
                refs = all_refs(view)
            return {ref.name: (ref.commit.hex(), digest_of(content_of(store, ref.commit))) for ref in refs}

    def check_left(self, root: Path, before: Look, wanted: Look) -> None:
        """After it was interrupted: what was acknowledged is there, what was not is there whole or not at all."""
        now = self.look(root)
        if not now and not before:
            return
        with Store.open(root) as store:
            assert_clean(store)
        came = [name for name in self.moves if now.get(name) != before.get(name)]
        for name in now.keys() | before.keys() | wanted.keys():
            if name not in came:
                assert now.get(name) == (before.get(name) if before else wanted.get(name)), name
            else:
                assert _content(now, name) == _content(wanted, name), name
        assert not self.together or not came or set(came) == self.moves, f"only {came} came"

    def judge(self, root: Path, checkpoints: Path, before: Look, wanted: Look) -> None:
        """Likewise; and given again, it succeeds, and a collection leaves nothing behind."""
        self.check_left(root, before, wanted)
        self.run(root, checkpoints)
        for collected in (False, True):
            with Store.open(root) as store:
                if collected:
                    collect(store, apply=True, grace_seconds=0)
                    assert not strays(store), strays(store)
                assert_clean(store)
            now = self.look(root)
            assert now.keys() == wanted.keys()
            for name in now:
                same = now[name][1:] == wanted[name][1:] if name in self.moves else now[name] == wanted[name]
                assert same, f"{name}: {now[name]}, not {wanted[name]}"
        with Store.open(root) as store, tempfile.TemporaryDirectory(dir=root.parent) as folder:
            for name in now.keys() & {"v0", "v4"}:
                store.snapshot(name).export(Path(folder) / name)
                assert folder_bytes(Path(folder) / name) == folder_bytes(checkpoints / name), name


def _content(look: Look, name: str) -> str:
    return look[name][1] if name in look else ""


SCENARIOS = {
    "first": Scenario(_first, frozenset({"v0"}), from_nothing=True),
    "ingest": Scenario(_ingest, frozenset({"v4", "v5"})),
    "merge": Scenario(_merge_within_a_budget, frozenset({"m2"})),
    "refs": Scenario(_refs, frozenset({"t", "v3", "spare"}), together=False),
    "gc": Scenario(_gc),
    "drop previews": Scenario(_drop_previews),
    "analyze": Scenario(_analyze),
    "repack": Scenario(_repack),
    "recover": Scenario(_recover, loses_catalog=True),
}
