"""Previews: what they leave out has an exact norm, hostile ones are refused, and ingest and analyze make the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mergepipe.store import Digest, Store
from mergepipe.store import analyze as analyze_module
from mergepipe.store.analyze import Analysis, analyze, lacking, level_for
from mergepipe.store.codecs import Bytes
from mergepipe.store.digest import hash_bytes
from mergepipe.store.dtypes import DTYPES
from mergepipe.store.errors import DamagedError, UsageError
from mergepipe.store.frame import HEADER_BYTES, Kind
from mergepipe.store.preview_kernels import codes_of_bfloat16, codes_of_float32
from mergepipe.store.previews import (
    COARSE,
    LEAST_ELEMENTS,
    SHARES,
    WORTH_IT,
    Preview,
    PreviewRow,
    content_size,
    find_preview,
    make_preview,
    preview_key,
    read_preview,
    store_preview,
    unpack_row,
)
from mergepipe.store.publish import Changes, publish
from mergepipe.store.staging import Staging
from support.family import base_weights, fine_tune, write_family, write_model
from support.stores import catalog_rows, object_files, objects_of, state_of

NUMPY: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
SEGMENT = 1024
BASE, BLOCK = hash_bytes(b"base"), hash_bytes(b"block")


def as_bytes(values: NDArray[Any]) -> Bytes:
    return np.frombuffer(values.tobytes(), np.uint8)


def make(
    new: NDArray[Any], old: NDArray[Any], new_type: str, old_type: str = "", level: int = COARSE
) -> tuple[bytes, Preview] | None:
    """The preview of ``new - old``, whose arrays are of these types; its content is copied out of the scratch."""
    types = DTYPES[new_type], DTYPES[old_type or new_type]
    made = make_preview(as_bytes(new), as_bytes(old), *types, BASE, BLOCK, level)
    if made is None:
        return None
    content = made[0].tobytes()
    preview = read_preview(np.frombuffer(content, np.uint8))
    assert preview.residual == made[1]
    return content, preview


def decoded(preview: Preview) -> NDArray[np.float32]:
    out = np.empty(preview.elements, np.float32)
    preview.delta_into(0, out)
    return out


def plain_least(sizes: NDArray[np.uint32], most: int) -> int:
    """The smallest magnitude that is kept, as the format's page has it, over a segment's upper 16 bits."""

    def reach(least: int) -> int:
        return int((sizes >= least).sum())

    low, high = 1, int(sizes.max()) + 1
    if reach(low) <= most:
        return low
    if high > 1024:
        if reach(high - 1024) <= most:
            high -= 1024
        else:
            low = high - 1024
    while high - low > 1:
        middle = (low + high) // 2
        if reach(middle) <= most:
            high = middle
        else:
            low = middle
    return low if 2 * reach(high) < most else high


def plain_codes(delta: NDArray[np.float32], share: float) -> NDArray[np.uint8]:
    """Codes in plain NumPy: 1 or 2 where a magnitude is kept, four quarters to a byte."""
    codes = np.zeros(-(-delta.size // SEGMENT) * SEGMENT, np.uint8)
    for start in range(0, delta.size, SEGMENT):
        bits = delta[start : start + SEGMENT].view(np.uint32)
        sizes = (bits & 0x7FFFFFFF) >> 16
        least = plain_least(sizes, int(share * bits.size))
        codes[start : start + bits.size] = np.where(sizes >= least, 1 + (bits >> 31), 0)
    quarters = codes.reshape(-1, 4, SEGMENT // 4)
    packed: NDArray[np.uint8] = (
        quarters[:, 0] | quarters[:, 1] << 2 | quarters[:, 2] << 4 | quarters[:, 3] << 6
    ).ravel()
    return packed


@st.composite
def pairs(draw: st.DrawFn) -> tuple[NDArray[Any], NDArray[Any], str, str]:
    """Two blocks and their types: dense, sparse, on a lattice, heavy-tailed, tiny, huge, of any size."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    new_type = draw(st.sampled_from(["BF16", "BF16", "F16", "F32", "F64"]))
    old_type = draw(st.sampled_from([new_type, new_type, "BF16", "F32"]))
    elements = draw(st.integers(LEAST_ELEMENTS, 3 * LEAST_ELEMENTS))
    kind = draw(st.sampled_from(["dense", "sparse", "lattice", "ties", "tails", "uneven", "last", "none"]))
    scale = 10.0 ** draw(st.sampled_from([-30, -21, -19, -10, -6, -4, -3, -2, 0, 2, 9, 20]))
    delta = generator.standard_normal(elements)
    if kind == "sparse":
        delta[generator.random(elements) < 0.98] = 0
    elif kind == "lattice":
        delta = generator.integers(-2, 3, elements).astype(np.float64)
    elif kind == "ties":
        delta = np.sign(delta)
    elif kind == "tails":
        delta = generator.standard_cauchy(elements) ** 3
    elif kind == "uneven":
        delta *= 10.0 ** generator.integers(-6, 7, elements // 100 + 1).repeat(100)[:elements]
    elif kind == "last":
        delta[: elements // SEGMENT * SEGMENT] *= 1e-9
    elif kind == "none":
        delta[:] = 0
    own = draw(st.sampled_from([0.0, 0.0, 1.0, 100.0])) * scale
    with np.errstate(over="ignore"):
        old = (generator.standard_normal(elements) * own).astype(NUMPY[old_type])
        return (old.astype(np.float64) + delta * scale).astype(NUMPY[new_type]), old, new_type, old_type


class TestTheNorm:
    @given(pairs())
    def test_of_what_is_left_out_is_a_bound_and_tight(self, pair: tuple[NDArray[Any], NDArray[Any], str, str]) -> None:
        new, old, new_type, old_type = pair
        made = make(new, old, new_type, old_type)
        if made is None:
            return
        _, preview = made
        with np.errstate(over="ignore"):
            delta = new.astype(np.float64) - old.astype(np.float64)
            if not new_type == old_type == "F64":  # as a merge takes it: rounded to float32, then subtracted
                delta = (new.astype(np.float32) - old.astype(np.float32)).astype(np.float64)
        left = math.sqrt(math.fsum((delta - decoded(preview)) ** 2))
        assert preview.residual >= left
        assert preview.residual**2 <= (1.001 * left) ** 2 + 2.0**-15 * math.fsum(delta**2)

    @pytest.mark.parametrize("dtype", list(NUMPY))
    @pytest.mark.parametrize("elements", [LEAST_ELEMENTS, 5000, 6 * SEGMENT + 63])
    def test_of_a_usual_delta_is_within_a_thousandth(self, dtype: str, elements: int) -> None:
        generator = np.random.default_rng(elements)
        old = (generator.standard_normal(elements) * 0.02).astype(NUMPY[dtype])
        new = (old.astype(np.float64) + generator.standard_normal(elements) * 1e-3).astype(NUMPY[dtype])
        made = make(new, old, dtype)
        assert made is not None
        delta = new.astype(np.float64) - old.astype(np.float64)
        left = float(np.linalg.norm(delta - decoded(made[1])))
        assert left <= made[1].residual <= 1.001 * left
        assert left < 0.55 * np.linalg.norm(delta)
        assert np.count_nonzero(decoded(made[1])) <= SHARES[COARSE] * elements

    def test_where_all_mass_is_in_a_short_last_segment(self) -> None:
        """Sums in float32 lose most where many numbers go into one of them."""
        new = np.zeros(4 * SEGMENT + 63, np.float32)
        new[-63:] = np.float32(2.0**-12) * np.float32(0.9999)  # squares of nearly half a step of 1's square
        new[-63] = 1.0
        made = make(new, np.zeros_like(new), "F32")
        assert made is not None
        assert made[1].residual >= math.sqrt(math.fsum((new.astype(np.float64) - decoded(made[1])) ** 2))


class TestWhatHasNone:
    @pytest.mark.parametrize("dtype", list(NUMPY))
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_a_delta_that_is_not_finite(self, dtype: str, value: float) -> None:
        old = np.zeros(LEAST_ELEMENTS, NUMPY[dtype])
        new = np.full(LEAST_ELEMENTS, 0.5).astype(NUMPY[dtype])
        assert make(new, old, dtype) is not None
        new[77] = value
        assert make(new, old, dtype) is None
        assert make(old, new, dtype) is None

    def test_a_small_block_and_one_that_does_not_differ(self) -> None:
        new = np.ones(LEAST_ELEMENTS, np.float32)
        assert make(new[1:], np.zeros_like(new[1:]), "F32") is None
        assert make(new, new, "F32") is None

    @pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-20, 1e25])
    def test_magnitudes_whose_squares_float32_does_not_hold(self, size: float) -> None:
        new = np.full(LEAST_ELEMENTS, size, np.float32)
        assert make(new, np.zeros_like(new), "F32") is None

    def test_one_that_overflows_float32(self) -> None:
        new = np.full(LEAST_ELEMENTS, 1e300)
        assert make(new, -new, "F64") is None

    def test_a_segment_whose_scale_has_no_ratio(self) -> None:
        new = np.full(200 * SEGMENT, 1e-6, np.float32)
        new[:SEGMENT] = 1e6
        made = make(new, np.zeros_like(new), "F32")
        assert made is not None
        assert np.isfinite(made[1].scales).all()
        new[1:SEGMENT] = 0
        assert make(new, np.zeros_like(new), "F32") is None

    def test_one_that_keeps_nothing(self) -> None:
        """All that changed is in a last segment too short for a share of it to be an element."""
        new = np.zeros(LEAST_ELEMENTS + 2, np.float32)
        new[-1] = 1
        assert make(new, np.zeros_like(new), "F32") is None
        assert make(np.append(new, [0, 0]).astype(np.float32), np.zeros(LEAST_ELEMENTS + 4, np.float32), "F32")


class TestSparse:
    def test_all_that_changed_is_kept_where_that_is_little(self) -> None:
        new = np.zeros(8 * SEGMENT, np.float32)
        new[::50] = np.float32(0.25)
        new[::100] = np.float32(-0.25)
        made = make(new, np.zeros_like(new), "F32")
        assert made is not None
        assert (decoded(made[1]) == new).all()
        assert made[1].residual < 0.003 * np.linalg.norm(new)

    def test_a_lattice_of_one_step_is_kept_whole(self) -> None:
        """More than the share has the largest magnitude: then a little more is kept, rather than nothing."""
        new = np.where(np.arange(8 * SEGMENT) % 2 == 0, np.float32(0.5), np.float32(-0.5))
        made = make(new, np.zeros_like(new), "F32")
        assert made is not None
        np.testing.assert_array_equal(decoded(made[1]), new)


class TestContent:
    def test_it_depends_on_nothing_but_the_delta(self) -> None:
        generator = np.random.default_rng(0)
        old, new = (generator.standard_normal(5000).astype(np.float32) for _ in range(2))
        first = make(new, old, "F32")
        noise = generator.standard_normal(50_000).astype(np.float32)
        make(noise, np.zeros_like(noise), "F32")  # leaves the scratch full of something else
        second = make(new, old, "F32")
        assert first is not None
        assert second is not None
        assert first[0] == second[0]

    @given(
        st.integers(0, 2**32 - 1), st.integers(1, 5000), st.sampled_from([*SHARES.values(), 0.0, 1.0]), st.booleans()
    )
    def test_codes_are_those_of_plain_numpy(self, seed: int, elements: int, share: float, tied: bool) -> None:
        generator = np.random.default_rng(seed)
        new, old = (generator.standard_normal(elements).astype(ml_dtypes.bfloat16) for _ in range(2))
        if tied:
            new = (old.astype(np.float32) + generator.integers(-1, 2, elements)).astype(ml_dtypes.bfloat16)
        delta = new.astype(np.float32) - old.astype(np.float32)
        segments = -(-elements // SEGMENT)
        wanted = plain_codes(delta, share)
        signs = np.stack([wanted.reshape(segments, 1, -1) >> shift & 3 for shift in (0, 2, 4, 6)], 1).reshape(-1)
        for made in range(2):
            codes, sums = np.full(segments * SEGMENT // 4, 7, np.uint8), np.empty((segments, 3))
            if made:
                codes_of_float32(delta, share, codes, sums)
            else:
                codes_of_bfloat16(new.view("<u2"), old.view("<u2"), share, codes, sums)
            assert (codes == wanted).all()
            padded = np.zeros(segments * SEGMENT)
            padded[:elements] = np.abs(delta)
            sizes = padded.reshape(segments, SEGMENT)
            kept = np.where(signs.reshape(segments, SEGMENT) > 0, sizes, 0)
            assert (sums[:, 0] == (signs > 0).reshape(segments, SEGMENT).sum(1)).all()
            np.testing.assert_allclose(sums[:, 1], kept.sum(axis=1), rtol=1e-6)
            np.testing.assert_allclose(sums[:, 2], (sizes**2).sum(axis=1), rtol=1e-6)

    @pytest.mark.parametrize("share", [*SHARES.values(), 0.0])
    @pytest.mark.parametrize("octaves", [0, 1, 60])
    def test_codes_of_magnitudes_near_the_smallest(self, share: float, octaves: int) -> None:
        """All within eight octaves of zero; or most of them, or few; half are zeros."""
        generator = np.random.default_rng(2)
        delta = generator.standard_normal(SEGMENT) * 1e-38 * 2.0 ** (octaves * generator.random(SEGMENT) ** 2)
        delta[generator.random(SEGMENT) < 0.5] = 0
        delta = delta.astype(np.float32)
        codes = np.empty(SEGMENT // 4, np.uint8)
        codes_of_float32(delta, share, codes, np.empty((1, 3)))
        assert np.array_equal(codes, plain_codes(delta, share))

    def test_any_part_of_the_delta_can_be_had(self) -> None:
        generator = np.random.default_rng(3)
        new = generator.standard_normal(5 * SEGMENT + 100).astype(np.float32)
        made = make(new, np.zeros_like(new), "F32")
        assert made is not None
        whole = decoded(made[1])
        for start, count in [(0, 1), (1, SEGMENT), (SEGMENT - 1, 2), (1000, 3333), (5 * SEGMENT, 100), (17, 0)]:
            part = np.empty(count, np.float32)
            made[1].delta_into(start, part)
            assert (part == whole[start : start + count]).all()

    def test_scales_are_the_means_of_what_is_kept(self) -> None:
        new = np.random.default_rng(4).standard_normal(4 * SEGMENT).astype(np.float32)
        made = make(new, np.zeros_like(new), "F32")
        assert made is not None
        sizes, kept = np.abs(new).reshape(4, SEGMENT), decoded(made[1]).reshape(4, SEGMENT) != 0
        means = [sizes[i][kept[i]].mean() for i in range(4)]
        np.testing.assert_allclose(made[1].scales, means, rtol=2.0**-10)


@pytest.fixture(scope="module")
def good() -> bytes:
    new = np.random.default_rng(5).standard_normal(4 * SEGMENT + 10).astype(np.float32)
    made = make(new, np.zeros_like(new), "F32")
    assert made is not None
    return made[0]


class TestHostile:
    @given(st.data())
    def test_other_bytes_are_a_preview_or_a_clear_error(self, good: bytes, data: st.DataObject) -> None:
        content = bytearray(good)
        for _ in range(data.draw(st.integers(1, 4))):
            position = data.draw(st.one_of(st.integers(0, 110), st.integers(0, len(content) - 1)))
            content[position] = data.draw(st.integers(0, 255))
        size = data.draw(st.sampled_from([len(content)] * 4 + [0, 95, 96, len(content) - 1, len(content) + 1]))
        changed = bytes(content[:size]) + bytes(max(size - len(content), 0))
        try:
            preview = read_preview(np.frombuffer(changed, np.uint8))
        except ValueError:
            return
        assert content_size(preview.elements) == len(changed)
        assert np.isfinite(decoded(preview)).all()
        assert preview.residual >= 0

    @pytest.mark.parametrize(
        ("offset", "value"),
        [
            (0, b"\2"), (1, b"\3"), (2, b"\1"), (4, b"\0\2"), (8, b"\xff" * 8), (16, b"\xff" * 8), (23, b"\xff"),
            (88, b"\0\0\xc0\x7f"), (88, b"\0\0\x80\x7f"), (92, b"\1"), (-2, b"\0\x7c"), (-1, b"\x7e"),
        ],
    )  # fmt: skip
    def test_a_head_that_lies(self, good: bytes, offset: int, value: bytes) -> None:
        offset %= len(good)
        changed = good[:offset] + value + good[offset + len(value) :]
        with pytest.raises(ValueError, match="preview"):
            read_preview(np.frombuffer(changed, np.uint8))

    @pytest.mark.parametrize("row", [b"x", bytes(47), bytes(49), bytes(46) + b"\xf0\x7f", bytes(47) + b"\x80" + b"\1"])
    def test_a_row_that_is_none(self, row: bytes) -> None:
        with pytest.raises(DamagedError):
            unpack_row(row)

    def test_a_row_comes_back(self) -> None:
        row = PreviewRow(BLOCK, 12345, 0.125)
        assert unpack_row(row.pack()) == row


def preview_rows(store: Store) -> dict[bytes, bytes]:
    return catalog_rows(store, "previews")["previews"]


def fill(store: Store, base: Path, experts: list[Path], **options: Any) -> Store:
    store.ingest([base])
    store.ingest(experts, base="base", **options)
    return store


def make_all(store: Store, ref: str, base: str = "base") -> Analysis:
    models = store.snapshot(base), store.snapshot(ref)
    return analyze(store, lacking(store, *models, previews=True), previews=level_for(store, *models))


class TestStoring:
    def test_only_where_it_takes_clearly_less_than_the_block(self, store: Store) -> None:
        new, old = np.random.default_rng(6).standard_normal((2, 8192)).astype(np.float32)
        dtype = DTYPES["F32"]

        def stored(exact: int) -> PreviewRow | None:
            with Staging(store.layout, store.catalog) as staging:
                where = as_bytes(new), as_bytes(old), dtype, dtype, BASE, BLOCK
                row = store_preview(staging, *where, exact, COARSE)
                assert set(staging.rows) == ({row.id} if row else set())
                return row

        row = stored(10**6)
        assert row is not None
        least = math.ceil(row.stored_bytes / WORTH_IT)
        assert stored(least) == row
        assert stored(least - 1) is None

    def test_a_file_with_the_same_bytes_is_not_taken_for_one(self, store: Store) -> None:
        new, old = np.random.default_rng(6).standard_normal((2, 8192)).astype(np.float32)
        made = make(new, old, "F32")
        assert made is not None
        dtype = DTYPES["F32"]
        with Staging(store.layout, store.catalog) as staging:
            content = np.frombuffer(made[0], np.uint8)
            digest = hash_bytes(made[0])
            assert staging.claim(digest)
            staging.add_block(Kind.FILE, digest, content, 1)
            publish(store.catalog, staging, Changes())
        with Staging(store.layout, store.catalog) as staging:
            where = as_bytes(new), as_bytes(old), dtype, dtype, BASE, BLOCK
            assert store_preview(staging, *where, 10**6, COARSE) is None

    @pytest.mark.parametrize("size", [1e-3, 2e-4, 5e-5])
    def test_a_real_family_takes_eight_hundredths(
        self, make_store: Callable[..., Store], tmp_path: Path, size: float
    ) -> None:
        """Where steps are few of bfloat16's own, magnitudes are tied, and a little more than the share is kept."""
        generator = np.random.default_rng(9)
        base = {"a": (generator.standard_normal((1024, 1024), np.float32) * 0.02).astype(ml_dtypes.bfloat16)}
        step = generator.standard_normal((1024, 1024), np.float32) * np.float32(size)
        tuned = {"a": (base["a"].astype(np.float32) + step).astype(ml_dtypes.bfloat16)}
        store = make_store(block_bytes=2 << 20)
        folder = write_model(tmp_path / "base", base)
        fill(store, folder, [write_model(tmp_path / "tuned", tuned)], previews=True)
        (row,) = preview_rows(store).values()
        assert HEADER_BYTES < unpack_row(row).stored_bytes <= 0.08 * base["a"].nbytes
        (exact,) = store.snapshot("tuned").entry("a").blocks
        with store.catalog.reading() as view:
            known = view.object_row(exact)
        assert known is not None
        assert unpack_row(row).stored_bytes < WORTH_IT * known.stored_bytes


@pytest.fixture
def make_big(make_store: Callable[..., Store]) -> Callable[..., Store]:
    """Stores whose blocks are large enough for previews."""
    return lambda **options: make_store(block_bytes=8192, **options)


class TestIngest:
    def test_every_changed_block_has_a_row_and_an_object(self, make_big: Callable[..., Store], tmp_path: Path) -> None:
        base, experts = write_family(tmp_path)
        store = make_big()
        store.ingest([base])
        results = store.ingest(experts, base="base", previews=True)
        rows, seen = preview_rows(store), 0
        for result, path in zip(results, experts, strict=True):
            own = 0
            for name, entry in store.snapshot(path.name).tensors.items():
                pairs = zip(store.snapshot("base").entry(name).blocks, entry.blocks, strict=True)
                for old, new in pairs:
                    if old != new:
                        level = level_for(store, store.snapshot("base"), store.snapshot(path.name))
                        row = unpack_row(rows[preview_key(old, new, level)])
                        content = store.reader.read_piece(row.id, content_size(4096))
                        preview = read_preview(np.frombuffer(content, np.uint8))
                        assert (preview.level, preview.base, preview.block) == (level, old, new)
                        assert preview.residual == row.residual
                        own += 1
            assert (result.previews, own) == (9, 9)
            assert 0 < result.preview_bytes < result.stored_bytes
            seen += own
        assert len(rows) == len(objects_of(store, Kind.PREVIEW)) == seen
        assert sum(unpack_row(row).stored_bytes for row in rows.values()) == sum(r.preview_bytes for r in results)

    def test_again_leaves_all_as_it_was(self, make_big: Callable[..., Store], tmp_path: Path) -> None:
        base, experts = write_family(tmp_path)
        store = fill(make_big(), base, experts, previews=True)
        before = state_of(store)
        (result, _) = store.ingest(experts, base="base", previews=True)
        assert state_of(store) == before
        assert (result.unchanged, result.previews, result.written_bytes) == (True, 0, 0)

    def test_later_adds_them(self, make_big: Callable[..., Store], tmp_path: Path) -> None:
        base, experts = write_family(tmp_path)
        first, second = make_big(), make_big()
        fill(first, base, experts, previews=True)
        fill(second, base, experts)
        assert preview_rows(second) == {}
        (result, _) = second.ingest(experts, base="base", previews=True)
        assert (result.unchanged, result.previews) == (True, 9)
        assert preview_rows(first) == preview_rows(second)

    def test_a_block_that_another_thread_is_still_writing(
        self, make_big: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base, experts = write_family(tmp_path)
        first = fill(make_big(), base, experts, previews=True)
        intact, late = Staging.row_of, set[Digest]()

        def row_of(staging: Staging, digest: Digest) -> Any:
            if digest not in late:
                late.add(digest)
                return None
            return intact(staging, digest)

        monkeypatch.setattr(Staging, "row_of", row_of)
        second = fill(make_big(), base, experts, previews=True)
        assert len(late) == 18
        assert preview_rows(first) == preview_rows(second)

    def test_small_blocks_are_looked_into_once(self, store: Store, tmp_path: Path) -> None:
        base, experts = write_family(tmp_path)
        fill(store, base, experts, previews=True)
        assert set(preview_rows(store).values()) == {b""}
        assert objects_of(store, Kind.PREVIEW) == []
        assert make_all(store, "expert0") == Analysis()
        with store.catalog.reading() as view:
            assert find_preview(view, Digest(bytes(32)), Digest(bytes(32))) is None

    def test_without_a_base(self, store: Store, tmp_path: Path) -> None:
        base, _ = write_family(tmp_path, experts=0)
        with pytest.raises(UsageError, match="no base"):
            store.ingest([base], previews=True)

    def test_an_adapter_has_none_and_says_so(self, make_big: Callable[..., Store], tmp_path: Path) -> None:
        base, _ = write_family(tmp_path, experts=0)
        store = make_big()
        store.ingest([base])
        folder = write_model(tmp_path / "lora", {"a.lora_A.weight": np.ones((64, 64), np.float32)})
        (folder / "adapter_config.json").write_text("{}")
        (result,) = store.ingest([folder], base="base", previews=True)
        assert any("no previews" in text for text in result.notes)
        assert preview_rows(store) == {}


class TestAnalyze:
    def test_makes_what_ingest_would_have(self, make_big: Callable[..., Store], tmp_path: Path) -> None:
        base, experts = write_family(tmp_path)
        first, second = make_big(), make_big()
        fill(first, base, experts, previews=True)
        fill(second, base, experts)
        for path in experts:
            found = make_all(second, path.name)
            assert (found.tensors, found.previews, found.previewed_bytes) == (6, 9, 9 * 8192)
            assert found.stored_bytes < found.read_bytes * 2
            assert found.preview_bytes < 0.2 * found.previewed_bytes  # of small blocks heads are a large part
            assert make_all(second, path.name) == Analysis()
        assert catalog_rows(first, "deltas", "tensors", "previews", "objects").keys()
        for database in ("deltas", "tensors", "previews"):
            assert catalog_rows(first, database) == catalog_rows(second, database)
        assert object_files(first).keys() >= {d.hex() for d in objects_of(second, Kind.PREVIEW)}

    def test_rows_at_the_end_do_not_matter(self, make_big: Callable[..., Store], tmp_path: Path) -> None:
        """An embedding with tokens added: the blocks before them have previews, whoever makes them."""
        weights = base_weights()
        tuned = fine_tune(weights, 0)
        name = "model.embed_tokens.weight"
        step = np.random.default_rng(1).standard_normal((128, 64), np.float32) * np.float32(1e-3)
        longer = np.concatenate([weights[name].astype(np.float32) + step, np.ones((5, 64), np.float32)])
        tuned[name] = longer.astype(ml_dtypes.bfloat16)
        base, expert = write_model(tmp_path / "base", weights), write_model(tmp_path / "expert", tuned)
        first, second = make_big(), make_big()
        fill(first, base, [expert], previews=True)
        fill(second, base, [expert])
        assert make_all(second, "expert").previews == 11
        assert preview_rows(first) == preview_rows(second)
        assert make_all(first, "expert") == make_all(second, "expert") == Analysis()
        assert catalog_rows(first, "tensors") == catalog_rows(second, "tensors")

    def test_blocks_too_small_for_them_are_looked_into_once(self, store: Store, tmp_path: Path) -> None:
        base, experts = write_family(tmp_path)
        fill(store, base, experts)
        assert make_all(store, "expert0").previews == 0
        assert set(preview_rows(store).values()) == {b""}
        assert make_all(store, "expert0") == Analysis()

    def test_tensors_of_another_shape_have_none(self, make_big: Callable[..., Store], tmp_path: Path) -> None:
        weights = base_weights()
        tuned = fine_tune(weights, 0)
        tuned["model.embed_tokens.weight"] = np.tile(weights["model.embed_tokens.weight"], (1, 4))
        store = make_big()
        store.ingest([write_model(tmp_path / "base", weights)])
        store.ingest([write_model(tmp_path / "expert", tuned)])
        found = make_all(store, "expert")
        assert (found.tensors, found.previews) == (6, 9)
        assert make_all(store, "expert") == Analysis()

    def test_a_block_whose_statistics_are_lost_is_measured_again(
        self, make_big: Callable[..., Store], tmp_path: Path
    ) -> None:
        base, experts = write_family(tmp_path)
        store = fill(make_big(), base, experts, previews=True)
        rows = catalog_rows(store, "deltas", "previews")
        store.catalog.write(lambda view: view.delete("deltas", min(rows["deltas"])))
        assert make_all(store, "expert0").tensors + make_all(store, "expert1").tensors == 1
        assert catalog_rows(store, "deltas", "previews") == rows

    def test_blocks_that_tensors_of_other_shapes_share_are_done_once(
        self, make_big: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[Digest] = []

        def note(*arguments: Any) -> PreviewRow | None:
            made.append(arguments[6])
            return store_preview(*arguments)

        weights = base_weights()
        tuned = fine_tune(weights, 0)
        for model in (weights, tuned):
            model["copy.weight"] = model["model.layers.0.mlp.up_proj.weight"][:64]
        base, expert = write_model(tmp_path / "base", weights), write_model(tmp_path / "expert", tuned)
        store = fill(make_big(), base, [expert])
        monkeypatch.setattr(analyze_module, "store_preview", note)
        found = make_all(store, "expert")
        assert (found.tensors, found.previews) == (7, 9)
        assert len(made) == len(set(made)) == 9

    def test_tensors_with_the_same_blocks_are_done_once(self, make_big: Callable[..., Store], tmp_path: Path) -> None:
        weights = base_weights()
        tuned = fine_tune(weights, 0)
        for number in range(4):
            for model in (weights, tuned):
                model[f"copy.{number}.weight"] = model["model.layers.0.mlp.up_proj.weight"]
        base, expert = write_model(tmp_path / "base", weights), write_model(tmp_path / "expert", tuned)
        first, second = make_big(), make_big()
        fill(first, base, [expert], previews=True)
        fill(second, base, [expert])
        assert make_all(second, "expert").previews == 9
        assert preview_rows(first) == preview_rows(second)
        assert b"" not in preview_rows(first).values()
