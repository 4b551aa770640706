"""The model card: what it says of a merge, and that no name in a plan can break its YAML or its tables."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from mergepipe.merge import Plan, decode_plan
from mergepipe.merge.card import model_card
from mergepipe.merge.job import Setting
from mergepipe.merge.methods import METHODS
from mergepipe.merge.plan import Bound, Costs, Input, TensorPlan
from mergepipe.store import Store
from mergepipe.store.commits import Commit
from mergepipe.store.digest import Digest, hash_bytes
from mergepipe.store.frame import Kind
from support.merges import merge
from support.stores import assert_clean

HOSTILE = (
    "a\nb", "a\r\n---\nlicense: mit\n---", "a | b", "`", "``x``", "``` \n# h", "[x](http://evil)", "![x](y)",
    "<img src=x>", "&lt;", "- a", "1. a", "1) a", "---", "===", "> a", "# a", "a: b", "a #b", "yes", "null", "~",
    "0x10", "1e3", "2024-01-01", "{a}", "[a]", "*a*", "_a_", "!tag", "%a", "@a", '"', "'", "\\", "\\|", "a\\", "\\n",
    "\t", "\x00", "\x85", "\u2028", "\ufeff", "\u202e", "", " ", "é", "模型", "😀", "a" * 5000, "|" * 300, "$x$",
    "~~a~~", "--- ", "...", "<!-- x", "http://evil.example", "a@b.c", ":-", "| - |", "    code",
)  # fmt: skip


def plan_of(*names: str, base: str = "base", based: bool = True, **changes: object) -> Plan:
    experts = tuple(
        Input(hash_bytes(b"%d" % n), name, {"weight": 0.5 + n, "density": 1.0}) for n, name in enumerate(names)
    )
    plan = Plan(
        base=Input(hash_bytes(b"base"), base), experts=experts, method="ties", method_version=2,
        parameters={"lambda": 1.0, "normalize": True}, dtype=None, budget_bytes=1 << 30, tensors={},
        costs=Costs(1 << 29, 5 << 30, 1, 2, 3), bound=Bound(0.125, 0.0031, 0.0625, 40.0), based=based,
    )  # fmt: skip
    return replace(plan, **changes)  # type: ignore[arg-type]


def commit_of(message: str = "why", **measured: int | float) -> Commit:
    return Commit(
        hash_bytes(b"tree"), (), "merge", message, "ada", "2026-01-02T03:04:05.000006Z", "mergepipe 0.1.0",
        hash_bytes(b"plan"), measured or {"expert_bytes_read": 3 << 20, "elapsed_seconds": 2.5},
    )  # fmt: skip


def card(plan: Plan, commit: Commit | None = None, title: str = "merged/v1", **options: object) -> str:
    return model_card(hash_bytes(b"commit"), commit or commit_of(), plan, title=title, **options)  # type: ignore[arg-type]


def front_matter(text: str) -> dict[str, object]:
    """As the hub reads it: between the first line and the next that is ``---``."""
    lines = text.split("\n")
    assert lines[0] == "---"
    return dict(yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)])))


def tables(text: str) -> list[list[list[str]]]:
    """All tables, row by row and cell by cell."""
    found: list[list[list[str]]] = []
    before = ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not before.startswith("|"):
                found.append([])
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        before = line
    return found


def test_what_it_says() -> None:
    text = card(plan_of("math", "code"), files=["config.json"])
    assert front_matter(text) == {
        "base_model": ["base", "math", "code"], "library_name": "transformers", "tags": ["merge", "mergepipe"],
    }  # fmt: skip
    assert "\n# `merged/v1`\n" in text
    assert METHODS["ties"].source in text
    assert METHODS["ties"].summary in text
    models = next(table for table in tables(text) if table[0][0] == "role")
    assert models == [
        ["role", "model", "`weight`", "`density`", "commit"],
        ["---"] * 5,
        ["base", "`base`", "", "", f"`{hash_bytes(b'base')}`"],
        ["expert", "`math`", "0.5", "1", f"`{hash_bytes(b'0')}`"],
        ["expert", "`code`", "1.5", "1", f"`{hash_bytes(b'1')}`"],
    ]
    assert ["certified bound", "0.125", "3.10e-03"] in [row for table in tables(text) for row in table]
    assert "512.0 MiB of the 5.0 GiB in which the experts differ (10%), within a budget of 1.0 GiB" in text
    assert ["expert bytes read", "3.0 MiB"] in [row for table in tables(text) for row in table]
    for id_ in (b"commit", b"tree"):
        assert str(hash_bytes(id_)) in text
    assert str(plan_of("math", "code").id) in text


def test_the_same_plan_gives_the_same_text() -> None:
    assert card(plan_of("math")) == card(plan_of("math"))


def test_without_a_config_it_is_for_no_library() -> None:
    assert "library_name" not in front_matter(card(plan_of("math"), files=["model.bin"]))


def test_a_full_merge() -> None:
    text = card(plan_of("math", budget_bytes=None, bound=Bound(0.0, 0.0, 0.0, None)))
    assert "None: this is the merge that reads everything" in text
    assert "certified" not in text


def test_without_a_base() -> None:
    text = card(plan_of("math", "code", based=False))
    assert front_matter(text)["base_model"] == ["math", "code"]
    assert "it has no part in the method" in text


def test_settings_that_differ_are_ranges() -> None:
    settings = tuple(
        Setting(0, True, (1,), {"lambda": scale, "normalize": True}, ({"weight": weight, "density": 0.5},))
        for scale, weight in ((1.0, 0.25), (1.0, 0.75), (9.0, 9.0))
    )
    tensors = {name: TensorPlan(number, None, ((),), {}, 0.0) for name, number in (("a", 1), ("b", 2))}
    text = card(plan_of("math", variants=settings, complete=True, tensors=tensors))
    rows = [row for table in tables(text) for row in table]
    assert ["expert", "`math`", "0.25 to 0.75", "0.5", f"`{hash_bytes(b'0')}`"] in rows
    assert ["`lambda`", "1"] in rows, "a setting that no tensor has does not count"
    assert "2 sets of them" in text


def test_adapters_are_named_as_such() -> None:
    onto = hash_bytes(b"onto")
    adapter = Input(hash_bytes(b"a"), "lora", {"weight": 1.0}, "adapter", onto)
    vector = Input(hash_bytes(b"t"), "tv", {"weight": 1.0}, "task_vector")
    text = card(plan_of(experts=(adapter, vector)))
    assert f"| expert (adapter) on `{onto}` | `lora` |" in text
    assert "| expert (task vector) | `tv` |" in text


def test_a_method_that_nobody_has_here() -> None:
    text = card(plan_of("math", method="of a plug-in"))
    assert "of a plug-in, version 2\n" in text
    assert "Source" not in text


def shape(text: str) -> list[str]:
    """What a Markdown parser makes of the text behind the front matter: headings, tables, cells, links; no words."""
    tokens = MarkdownIt("commonmark", {"linkify": False}).enable("table").parse(text.split("\n---\n", 1)[1])
    found = []
    for token in tokens:
        found.append(f"{token.type} {token.tag}")
        inside = [
            each.type for each in token.children or () if each.type not in ("text", "code_inline", "text_special")
        ]
        found += [each.replace("softbreak", "") for each in inside]
    return found


def words(text: str) -> list[str]:
    """What a reader sees of each paragraph and cell."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text.split("\n---\n", 1)[1])
    return ["".join(each.content for each in token.children or ()) for token in tokens if token.type == "inline"]


def check_shape(text: str, names: list[str], experts: int) -> None:
    """The names are in the front matter as they are, and the document is built as one with harmless names is."""
    assert front_matter(text)["base_model"] == list(dict.fromkeys(names))
    assert all(c.isprintable() or c == "\n" for c in text)
    assert shape(text) == shape(card(plan_of(*"x" * experts), commit_of("x"), title="x"))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name(name: str) -> None:
    text = card(plan_of(name, "code", base=name + "b"), commit_of(f"x{name}"), title=name)
    check_shape(text, [name + "b", name, "code"], 2)


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=3, max_size=3),
    st.text("`|\\\n-#*[]()<>:. a1", max_size=30),
)
def test_any_names(names: list[str], message: str) -> None:
    text = card(plan_of(names[1], names[2], base=names[0]), commit_of(f"x{message}"), title=message)
    check_shape(text, names, 2)


def test_a_name_is_shown_as_it_is() -> None:
    """Whatever is escaped for the parser is there again for the reader."""
    for name in ("a | b", "*a* [b](c)", "1. `x`", "- <b>", "x_y & z", "模型 1"):
        seen = words(card(plan_of(name)))
        assert name in seen
        assert f"A merge of {name} into base by the method ties, made with mergepipe 0.1.0." in seen


def test_hostile_parameters_and_counters() -> None:
    """A plan's parameters are checked before it is run; the card does not rely on it."""
    expert = Input(hash_bytes(b"e"), "math", {"a|b\n": 1.0})
    text = card(plan_of(experts=(expert,), parameters={"`|": True}), commit_of(**{"x|y\n_bytes": 2}))
    for table in tables(text):
        assert len({len(row) for row in table}) == 1
    commit = replace(commit_of(), measured={"odd": "a|b"})  # type: ignore[dict-item]
    assert r"| `odd` | a\|b |" in card(plan_of("math"), commit)


def test_the_card_of_a_real_merge(family: Store) -> None:
    result = merge(family, "task_arithmetic", {"math": 0.6, "code": 0.4}, budget="50%")
    commit = family.commit(result.commit)
    assert commit.plan is not None
    plan = decode_plan(family.reader.read_record(Kind.PLAN, Digest(commit.plan)), "plan")
    text = model_card(result.commit, commit, plan, title="merged")
    assert front_matter(text)["base_model"] == ["base", "math", "code"]
    assert str(plan.id) in text
    assert plan.id == result.plan
    assert_clean(family)
