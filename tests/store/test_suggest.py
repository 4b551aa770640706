"""Which base a checkpoint was trained from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mergepipe.store import Store
from mergepipe.store.errors import NotFoundError, UsageError
from mergepipe.store.publish import Changes, RefUpdate, publish
from mergepipe.store.suggest import find_base, suggest_base, suggest_stored_base
from support.checkpoints import raw, write_checkpoint, write_safetensors
from support.family import Weights, base_weights, fine_tune, write_model

BASE = base_weights()
OTHER = base_weights(99)


@pytest.fixture
def bases(store: Store, tmp_path: Path) -> Store:
    store.ingest([write_model(tmp_path / "Base-1B", BASE), write_model(tmp_path / "other", OTHER)])
    return store


def write(folder: Path, weights: Weights, **config: object) -> Path:
    tensors = {name: raw(weight) for name, weight in weights.items()}
    return write_checkpoint(folder, tensors, files={"config.json": json.dumps(config).encode()})


class TestSuggestions:
    def test_the_configurations_own_word_comes_first(self, bases: Store, tmp_path: Path) -> None:
        path = write(tmp_path / "tuned", fine_tune(BASE, 1), _name_or_path="org/other")
        suggestion = suggest_base(bases, path)
        assert suggestion is not None
        assert suggestion.ref == "other"
        assert "'other'" in suggestion.reason

    def test_a_whole_name_comes_before_the_end_of_one(self, bases: Store, tmp_path: Path) -> None:
        bases.ingest([write_model(tmp_path / "m", OTHER)], ref="a/other")
        for name, ref in (("other", "other"), ("org/other", "other")):
            suggestion = suggest_base(bases, write(tmp_path / "tuned", fine_tune(BASE, 1), _name_or_path=name))
            assert suggestion is not None
            assert suggestion.ref == ref
        bases.ingest([write_model(tmp_path / "m", fine_tune(BASE, 9))], ref="a/third")
        suggestion = suggest_base(bases, write(tmp_path / "tuned", fine_tune(BASE, 1), _name_or_path="org/third"))
        assert suggestion is not None
        assert suggestion.ref == "a/third"

    def test_else_the_nearest_weights(self, bases: Store, tmp_path: Path) -> None:
        for base, ref in ((BASE, "Base-1B"), (OTHER, "other")):
            suggestion = suggest_base(bases, write(tmp_path / f"tuned-{ref}", fine_tune(base, 1)))
            assert suggestion is not None
            assert suggestion.ref == ref
            assert "identical" in suggestion.reason

    def test_a_name_that_no_ref_has_is_no_word(self, bases: Store, tmp_path: Path) -> None:
        suggestion = suggest_base(bases, write(tmp_path / "tuned", fine_tune(BASE, 1), _name_or_path="org/Unknown"))
        assert suggestion is not None
        assert suggestion.ref == "Base-1B"

    def test_the_same_weights_are_their_own_base(self, bases: Store, tmp_path: Path) -> None:
        suggestion = suggest_base(bases, write(tmp_path / "copy", BASE))
        assert suggestion is not None
        assert (suggestion.ref, suggestion.reason[:22]) == ("Base-1B", "of the blocks sampled ")

    def test_unrelated_weights_have_none(self, bases: Store, tmp_path: Path) -> None:
        assert suggest_base(bases, write(tmp_path / "new", base_weights(5))) is None

    @pytest.mark.parametrize("change", ["name", "shape", "missing"])
    def test_other_tensors_have_none(self, bases: Store, tmp_path: Path, change: str) -> None:
        weights = dict(BASE)
        head = weights.pop("lm_head.weight")
        if change != "missing":
            weights["lm_head.weight" if change == "shape" else "head.weight"] = head[:7] if change == "shape" else head
        assert suggest_base(bases, write(tmp_path / "new", weights)) is None

    def test_nans_are_near_to_nothing(self, bases: Store, tmp_path: Path) -> None:
        weights = {name: np.full_like(weight, np.nan) for name, weight in BASE.items()}
        assert suggest_base(bases, write(tmp_path / "new", weights)) is None

    def test_an_empty_store_has_none(self, store: Store, tmp_path: Path) -> None:
        assert suggest_base(store, write(tmp_path / "new", BASE)) is None

    def test_a_model_is_not_its_own_base(self, bases: Store, tmp_path: Path) -> None:
        assert suggest_base(bases, tmp_path / "Base-1B") is None
        lone = write_safetensors(tmp_path / "lone.safetensors", {name: raw(weight) for name, weight in BASE.items()})
        bases.ingest([lone], base="Base-1B")
        suggestion = suggest_base(bases, lone)
        assert suggestion is not None
        assert (suggestion.ref, suggestion.reason) == ("Base-1B", "it was ingested with that base before")

    def test_a_base_that_has_another_name_by_now_is_named_by_its_commit(self, bases: Store, tmp_path: Path) -> None:
        tuned = write(tmp_path / "tuned", fine_tune(BASE, 1))
        bases.ingest([tuned], base="Base-1B")
        commit = bases.resolve("Base-1B")
        publish(bases.catalog, None, Changes(refs=[RefUpdate("Base-1B", commit, None, "branch", "test", "ada")]))
        suggestion = suggest_base(bases, tuned)
        assert suggestion is not None
        assert suggestion.ref == commit.hex()

    def test_refs_to_one_commit_are_compared_once(self, bases: Store, tmp_path: Path) -> None:
        commit = bases.resolve("Base-1B")
        publish(bases.catalog, None, Changes(refs=[RefUpdate("again", None, commit, "tag", "test", "ada")]))
        suggestion = suggest_base(bases, write(tmp_path / "tuned", fine_tune(BASE, 1)))
        assert suggestion is not None
        assert suggestion.ref == "Base-1B"

    def test_whole_numbers_are_near_to_nothing(self, store: Store, tmp_path: Path) -> None:
        numbers = {"ids": np.arange(4096, dtype=np.int32)}
        store.ingest([write(tmp_path / "numbers", numbers)])
        assert suggest_base(store, write(tmp_path / "new", numbers)) is None
        assert suggest_stored_base(store, store.snapshot("numbers")) is None

    def test_nor_are_stored_ones(self, store: Store, tmp_path: Path) -> None:
        numbers = {"ids": np.arange(4096, dtype=np.int32)}
        for name, shift in (("numbers", 0), ("others", 1)):
            store.ingest([write(tmp_path / name, {"ids": numbers["ids"] + np.int32(shift)})])
        assert suggest_stored_base(store, store.snapshot("others")) is None


class TestAuto:
    def test_several_with_one_base(self, bases: Store, tmp_path: Path) -> None:
        paths = [write(tmp_path / f"tuned{number}", fine_tune(BASE, number)) for number in range(2)]
        assert find_base(bases, paths) == "Base-1B"
        results = bases.ingest(paths, base="auto")
        for result in results:
            parent = bases.commit(result.commit).parent("base")
            assert parent is not None
            assert parent.commit == bases.resolve("Base-1B")

    def test_several_with_different_ones(self, bases: Store, tmp_path: Path) -> None:
        paths = [write(tmp_path / "a", fine_tune(BASE, 1)), write(tmp_path / "b", fine_tune(OTHER, 1))]
        with pytest.raises(UsageError, match="Base-1B, other"):
            bases.ingest(paths, base="auto")

    def test_none_at_all(self, bases: Store, tmp_path: Path) -> None:
        path = write(tmp_path / "new", base_weights(5))
        with pytest.raises(NotFoundError, match="new") as caught:
            bases.ingest([path], base="auto")
        assert caught.value.hint
