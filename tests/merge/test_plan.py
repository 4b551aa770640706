"""Plans as values and as files; a file is a stranger's until every field of it is checked."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergepipe.merge.budget import Budget
from mergepipe.merge.job import Setting
from mergepipe.merge.plan import PLAN_FORMAT
from mergepipe.merge.plan_file import MAXIMUM_PLAN_BYTES, MAXIMUM_VARIANTS, decode_plan, read_plan
from mergepipe.merge.ranges import MAXIMUM_READS, format_ranges, parse_ranges
from mergepipe.store.digest import hash_record
from mergepipe.store.errors import BadInputError, MergePipeError, NotFoundError
from support.facts import Outline, Problem, input_named, made_up, plan_of, problems, question_of
from support.hostile import mutated_json, with_change, without

PLAN = plan_of(
    [
        Outline("layers.0.weight", {0: [([0], 3.0, 100)], 1: [([0, 1], 1.0, 100)], 2: [([1], 2.0, 100)]}),
        Outline("layers.1.weight", {3: [([1], 4.0, 200)]}),
    ],
    (
        "ties",
        [input_named("math", weight=0.6, density=0.3), input_named("code", weight=0.4, density=1.0)],
        {"lambda": 1.0, "normalize": True, "rescale": False, "exact": False},
    ),
    Budget(size_bytes=350),
    "BF16",
)
COMPLETE = replace(
    PLAN,
    experts=(
        replace(PLAN.experts[0], kind="adapter", onto=made_up("other")),
        replace(PLAN.experts[1], kind="task_vector"),
    ),
    variants=(Setting(1, False, (2,), PLAN.parameters, (PLAN.experts[1].parameters,)),),
    complete=True,
    files=2,
    tensors={
        **PLAN.tensors,
        "embed": replace(PLAN.tensors["layers.0.weight"], setting=1, sources=("a", "b"), reads=((0, 2, 3),)),
    },
    config={"torch_dtype": "bfloat16", "num_hidden_layers": 3},
)
"""With all that a plan can have: other kinds of experts, variants, sources, changes of the configuration."""
JSON: dict[str, Any] = PLAN.as_json()
FIRST = ("tensors", "layers.0.weight")
TENSOR: dict[str, Any] = JSON["tensors"]["layers.0.weight"]
FULL: dict[str, Any] = COMPLETE.as_json()


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


@given(problems(), st.integers(0, 2000))
def test_a_plan_survives_its_file(problem: Problem, size: int) -> None:
    tensors, question, dtype = problem
    for budget in (Budget(), Budget(size_bytes=size), Budget(relative_error=0.3)):
        plan = plan_of(tensors, question, budget, dtype)
        again = decode_plan(plan.encode(), "plan")
        assert again == plan
        assert again.encode() == plan.encode()
        assert again.id == plan.id == hash_record("plan", plan.encode())


def test_all_that_a_plan_can_have_survives() -> None:
    again = decode_plan(COMPLETE.encode(), "plan")
    assert again == COMPLETE
    assert again.settings[0] == Setting(0, True, (1, 2), PLAN.parameters, tuple(e.parameters for e in PLAN.experts))
    assert again.settings[1] is again.variants[0]
    assert again.models == (COMPLETE.base, *COMPLETE.experts)
    assert len({PLAN.id, COMPLETE.id, replace(COMPLETE, based=False).id, replace(COMPLETE, files=0).id}) == 4


def test_a_plan_that_reads_everything_says_nothing_of_its_update() -> None:
    plan = plan_of([Outline("w", {0: [([0], 3.0, 100)]})], question_of("linear", (1.0,)), Budget())
    assert plan.as_json()["bound"] == {"absolute": 0.0, "relative": 0.0, "estimate": 0.0, "update": None}
    assert decode_plan(plan.encode(), "plan") == plan


def test_the_file_is_for_people_and_the_id_is_not_of_its_spaces(tmp_path: Path) -> None:
    PLAN.write(tmp_path / "p.json")
    text = (tmp_path / "p.json").read_text()
    assert text.endswith("}\n")
    assert len(text.splitlines()) > 30
    assert read_plan(tmp_path / "p.json") == PLAN
    assert read_plan(tmp_path / "p.json").id == PLAN.id


def test_numbers_have_one_form() -> None:
    """Who writes 0 for 0.0 or 6e-1 for 0.6 has written the same plan, with the same id."""
    value = with_change(JSON, ("parameters", "lambda"), 1)
    value = with_change(value, (*FIRST, "bound"), int(TENSOR["bound"]))
    text = encoded(value).replace(b'"weight": 0.6', b'"weight": 6e-1')
    again = decode_plan(text, "plan")
    assert again.encode() == decode_plan(again.encode(), "plan").encode()
    assert b'"lambda":1.0' in again.encode()
    assert b'"weight":0.6' in again.encode()


indices = st.sets(st.integers(0, 60)).map(lambda found: tuple(sorted(found)))


@given(indices)
def test_ranges_are_read_as_they_are_written(found: tuple[int, ...]) -> None:
    assert parse_ranges(format_ranges(found)) == found


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ((), ""),
        ((0,), "0"),
        ((0, 1, 2, 5), "0-2,5"),
        ((3, 4), "3-4"),
        ((0, 2, 4), "0,2,4"),
        ((7, 8, 10, 11), "7-8,10-11"),
    ],
)
def test_ranges_as_text(found: tuple[int, ...], text: str) -> None:
    assert format_ranges(found) == text
    assert parse_ranges(text) == found


@pytest.mark.parametrize(
    "text",
    [
        ",", "0,", ",0", "-", "-1", "1-", "2-1", "0-0", "0,1", "0-1,2", "1,0", "0,0", "00", "01", "+1", " 1", "1 ",
        "1_0", "0x1", "a", "1.0", "1e3", "٣", "0--1", "0-1-2", "0-2,1-3", "\n", f"0-{MAXIMUM_READS}", "0-4294967295",
        "5-99999999999999999999999999", "9" * 5000,
    ],
)  # fmt: skip
def test_what_is_no_list_of_ranges(text: str) -> None:
    with pytest.raises(ValueError):
        parse_ranges(text)


def test_ranges_have_a_limit_together() -> None:
    """A few bytes can ask for a billion indices: neither one list nor many have more than a plan can read."""
    most = f"0-{MAXIMUM_READS - 2}"
    again = decode_plan(encoded(with_change(JSON, ("tensors",), {"w": {**TENSOR, "reads": [most, most]}})), "plan")
    reads = again.tensors["w"].reads
    assert len(reads[0]) == MAXIMUM_READS - 1
    assert reads[0] is reads[1], "equal lists are one"
    for first, second in ((most, "0-1"), ("0-3000000", "1-3000000")):
        value = with_change(JSON, ("tensors",), {"w": {**TENSOR, "reads": [first, second]}})
        with pytest.raises(BadInputError, match="more blocks than a plan can read"):
            decode_plan(encoded(value), "plan")


FIELDS = [
    *((name,) for name in JSON),
    ("base", "commit"), ("base", "name"), ("base", "parameters"),
    ("experts", 0, "commit"), ("experts", 1, "name"), ("experts", 1, "parameters"),
    *(("experts", 0, name) for name in ("kind", "onto")), *((*FIRST, name) for name in TENSOR),
    *(("costs", name) for name in JSON["costs"]), *(("bound", name) for name in JSON["bound"]),
]  # fmt: skip


@pytest.mark.parametrize("path", FIELDS, ids=str)
def test_a_missing_field_is_named(path: tuple[str | int, ...]) -> None:
    with pytest.raises(BadInputError, match=rf"p\.json: .*field '{path[-1]}' is missing"):
        decode_plan(encoded(without(JSON, path)), "p.json")


VARIANT = ("variants", 0)


@pytest.mark.parametrize("name", FULL["variants"][0])
def test_a_missing_field_of_a_variant_is_named(name: str) -> None:
    with pytest.raises(BadInputError, match=rf"p\.json: variants\[0\]: field '{name}' is missing"):
        decode_plan(encoded(without(FULL, (*VARIANT, name))), "p.json")


@pytest.mark.parametrize("path", [(), ("base",), ("experts", 1), FIRST, ("costs",), ("bound",), VARIANT], ids=str)
def test_an_unknown_field_is_named(path: tuple[str | int, ...]) -> None:
    with pytest.raises(BadInputError, match="field 'zz_run' is unknown"):
        decode_plan(encoded(with_change(FULL, (*path, "zz_run"), "rm -rf /")), "p.json")


PINNED = (*FIRST, "pinned")
EMBED = ("tensors", "embed")
TEXTS = [
    ("base", "commit"),
    ("base", "name"),
    ("base", "kind"),
    ("experts", 0, "commit"),
    ("method",),
    (*FIRST, "reads", 0),
    (*EMBED, "sources", 1),
    ("config", "torch_dtype"),
]
WHOLES = [
    ("format",),
    ("method_version",),
    ("files",),
    (*FIRST, "setting"),
    (*VARIANT, "reference"),
    (*VARIANT, "experts", 0),
    ("config", "num_hidden_layers"),
    *(("costs", name) for name in JSON["costs"]),
]
NUMBERS = [
    (*FIRST, "bound"),
    *(("bound", name) for name in JSON["bound"] if name != "update"),
    (*PINNED, "thresholds", 0),
    ("experts", 0, "parameters", "weight"),
    (*VARIANT, "own", 0, "weight"),
]
SIGNED = NUMBERS[-3:]
FLAGS = [("based",), ("complete",), (*VARIANT, "based")]
OBJECTS = [
    (),
    ("base",),
    ("base", "parameters"),
    ("experts", 0),
    ("parameters",),
    ("tensors",),
    FIRST,
    PINNED,
    VARIANT,
    (*VARIANT, "parameters"),
    (*VARIANT, "own", 0),
    ("config",),
    ("costs",),
    ("bound",),
]
LISTS = [
    ("experts",),
    ("variants",),
    (*VARIANT, "experts"),
    (*VARIANT, "own"),
    (*FIRST, "reads"),
    (*PINNED, "kept"),
]
WRONG: list[tuple[Any, Any]] = [
    *((path, value) for path in TEXTS for value in (None, 1, ["a"], {}, True)),
    *((path, value) for path in WHOLES for value in (None, "1", 1.0, -1, True, [], 2**63, 10**400)),
    *((path, value) for path in NUMBERS for value in (None, "1", [], {}, 10**400)),
    *((path, value) for path in NUMBERS if path not in SIGNED for value in (-1.0, True)),
    *((path, value) for path in FLAGS for value in (None, 0, 1, "true", [])),
    *((("bound", "update"), value) for value in ("1", [], -1.0, True)),
    *((("experts", 0, "kind"), value) for value in ("", "lora", "Model")),
    *((("experts", 0, "onto"), value) for value in ("", "ab", "base", 1)),
    (("experts", 1, "onto"), "12" * 32),
    (("base", "onto"), "12" * 32),
    *((("files",), value) for value in (3, 4)),
    *(((*VARIANT, "reference"), value) for value in (3, 4)),
    *(((*VARIANT, "experts"), value) for value in ([3], [1, 2], [], ["1"])),
    *(((*VARIANT, "own"), value) for value in ([], [{}, {}], [1])),
    *(((*EMBED, "sources"), value) for value in ([], ["a"], ["a", "b", "c"], "ab", [1, 2])),
    *(((*EMBED, "setting"), value) for value in (0, 2)),
    (("config", "vocab_size"), 5),
    (("variants",), [FULL["variants"][0]] * (MAXIMUM_VARIANTS + 1)),
    *((path, value) for path in OBJECTS for value in (None, 1, "a", [], [["a", 1]])),
    *((path, value) for path in LISTS for value in (None, 1, "a", {})),
    *((("dtype",), value) for value in (1, [], True)),
    *((("budget_bytes",), value) for value in (-1, "1", 1.0, True, [], 2**63)),
    *(((*PINNED, "kept", 0), value) for value in (None, "1", True, [1])),
    *(((*FIRST, "reads"), value) for value in ([], ["0"], ["0", "1", "2"], [0, 1], [["0"], "1"])),
    *((("base", "commit"), value) for value in ("", "ab", "Z" * 64, "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n")),
    *((("format",), value) for value in (0, 1, PLAN_FORMAT + 1)),
    (("experts",), []),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), WRONG, ids=lambda part: str(part)[:40])
def test_a_wrong_value_is_refused(path: tuple[str | int, ...], value: Any) -> None:
    with pytest.raises(BadInputError, match=r"p\.json: "):
        decode_plan(encoded(with_change(FULL, path, value)), "p.json")


@pytest.mark.parametrize(
    "text",
    [
        b"", b"null", b"[]", b"1", b'"plan"', b"{", b"{}", b"\xff\xfe", b"\x00", b"{} {}", b"not JSON",
        b'{"format": 1, "format": 1}', b'{"format": NaN}', b'{"a": Infinity}', b'{"\\ud800": 1}',
        b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000, b"9" * 5000,
    ],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_what_is_no_plan_at_all(text: bytes) -> None:
    with pytest.raises(BadInputError, match=r"p\.json: "):
        decode_plan(text, "p.json")


@pytest.mark.parametrize("name", [b'"experts"', b'"weight"', b'"layers.0.weight"', b'"bound"'])
def test_a_key_that_stands_twice_is_refused(name: bytes) -> None:
    """Two readers could each believe another one of them."""
    text = encoded(JSON)
    place = text.index(name + b":")
    value = text[place : text.index(b",", place) if name == b'"weight"' else place] or name + b": 1"
    with pytest.raises(BadInputError, match="stands twice"):
        decode_plan(text[:place] + value + b", " + text[place:], "p.json")


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999"])
@pytest.mark.parametrize("field", [b'"weight": 0.6', b'"lambda": 1.0', b'"bound": '])
def test_numbers_are_finite(field: bytes, number: bytes) -> None:
    text = encoded(JSON)
    if field == b'"bound": ':
        text = encoded(with_change(JSON, (*FIRST, "bound"), math.pi))
        field = b'"bound": ' + repr(math.pi).encode()
    assert field in text
    name = field.split(b":")[0]
    with pytest.raises(BadInputError):
        decode_plan(text.replace(field, name + b": " + number), "p.json")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(300 << 20)
    assert path.stat().st_size > MAXIMUM_PLAN_BYTES
    with pytest.raises(BadInputError, match="more than a plan has"):
        read_plan(path)


def test_a_file_that_is_not_there_or_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no plan"):
        read_plan(tmp_path / "none.json")
    for odd in (tmp_path, Path("/dev/zero")):
        with pytest.raises(BadInputError, match="not a file"):
            read_plan(odd)


@settings(max_examples=max(500, settings().max_examples))
@given(st.one_of(mutated_json(JSON), mutated_json(FULL)))
def test_a_changed_file_is_a_plan_or_refused(data: bytes) -> None:
    """No other error, and what is a plan has one canonical form that means the same."""
    try:
        plan = decode_plan(data, "p.json")
    except MergePipeError as error:
        assert isinstance(error, BadInputError)
        assert error.message.startswith("p.json: ")
        return
    again = decode_plan(plan.encode(), "again")
    assert again == plan
    assert again.id == plan.id
