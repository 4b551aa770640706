"""The model card of a merge: a README.md with YAML front matter, made from the commit and its plan alone.

Pure: the same commit and plan give the same text. Names come from plans, and can be any text: in the front matter they
stand in double quotes with everything else escaped, in the body as code where they are plain, and with every mark
escaped where they are not; so no name can open a table cell, a link or a second front matter.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final

from mergepipe.merge.job import Setting
from mergepipe.merge.method import Method, Value
from mergepipe.merge.methods import find_method
from mergepipe.merge.plan import Input, Plan
from mergepipe.store.commits import Commit
from mergepipe.store.digest import Digest
from mergepipe.store.errors import MergePipeError
from mergepipe.store.sizes import format_size

CARD: Final = "README.md"
PLAN_FILE: Final = "mergepipe_plan.json"
_LONGEST: Final = 200
_PLAIN: Final = re.compile(r"[A-Za-z0-9._/@+:=~^,-]+\Z")
_MARK: Final = re.compile(r"([!\"#$%&*+<=>?@\[\\\]^_`{|}~]|:(?=/))")  # Markdown allows a backslash before each
_LIST: Final = re.compile(r"\A(\d*)([-.)])")  # what begins a list, or with dashes alone a heading


def model_card(
    commit_id: Digest, commit: Commit, plan: Plan, *, title: str, files: Collection[str] = (), dtype: str | None = None
) -> str:
    """The text of README.md.

    ``title``: what the merge is called. ``files``: the names of the commit's files; a config.json among them says that
    transformers loads it. ``dtype``: the type that this export was converted to, None where it was not.
    """
    sections = (
        _front_matter(plan, transformers="config.json" in files),
        [f"# {_text(title)}", "", *_introduction(commit, plan, dtype)],
        ["## Method", "", *_method(plan)],
        ["## Models", "", *_models(plan)],
        ["## Distance from the full merge", "", *_distance(plan)],
        ["## Measured", "", *_measured(commit)],
        ["## Run it again", "", *_again(commit_id, commit, plan)],
    )
    return "\n".join("\n".join(lines) + "\n" for lines in sections)


def _front_matter(plan: Plan, *, transformers: bool) -> list[str]:
    names = [model.name for model in (plan.models if plan.based else plan.experts)]
    return [
        "---",
        "base_model:",
        *(f"- {_quoted(name)}" for name in dict.fromkeys(names)),
        *(["library_name: transformers"] if transformers else []),
        "tags:",
        "- merge",
        "- mergepipe",
        "---",
    ]


def _introduction(commit: Commit, plan: Plan, dtype: str | None) -> list[str]:
    experts = [_text(expert.name) for expert in plan.experts]
    together = " and ".join([", ".join(experts[:-1]), experts[-1]] if len(experts) > 1 else experts)
    onto = f" into {_text(plan.base.name)}" if plan.based else ""
    lines = [f"A merge of {together}{onto} by the method {_text(plan.method)}, made with {_words(commit.tool)}."]
    if commit.message:
        lines += ["", f"> {_words(' '.join(commit.message.split()))}"]
    if dtype is not None:
        lines += ["", f"This copy was converted to {_text(dtype)} when it was exported; the merge itself was not."]
    return lines


def _method(plan: Plan) -> list[str]:
    method = _known_method(plan.method)
    lines = [f"{_text(plan.method)}, version {plan.method_version}"]
    if method is not None:
        lines = [f"{lines[0]}: {_sentence(method.summary)}", "", f"Source: {_sentence(method.source)}"]
    settings = _settings(plan)
    shared = _spread(setting.parameters for setting in settings)
    if shared:
        lines += ["", *_table(["parameter", "value"], [[_text(name), value] for name, value in shared.items()])]
    if len(settings) > 1:
        lines += [
            "",
            f"Parts of the model have parameters of their own, {len(settings):,} sets of them; where a value is a "
            f"range, they differ in it. [{PLAN_FILE}]({PLAN_FILE}) has them all.",
        ]
    if plan.dtype is not None:
        lines += ["", f"The result's element type is {_text(plan.dtype)}."]
    return lines


def _models(plan: Plan) -> list[str]:
    own = [_spread(_own(plan, number)) for number in range(1, len(plan.experts) + 1)]
    names = sorted({name for each in own for name in each}, key=lambda name: (name != "weight", name))
    role = "base" if plan.based else "reference"
    rows = [[role, _text(plan.base.name), *[""] * len(names), _id(plan.base.commit)]]
    for expert, values in zip(plan.experts, own, strict=True):
        cells = [values.get(name, "") for name in names]
        rows.append([_role(expert), _text(expert.name), *cells, _id(expert.commit)])
    lines = _table(["role", "model", *map(_text, names), "commit"], rows)
    if not plan.based:
        lines += ["", "The reference is what the models were compared with; it has no part in the method."]
    return lines


def _distance(plan: Plan) -> list[str]:
    costs, bound = plan.costs, plan.bound
    read = f"{format_size(costs.expert_bytes)} of the {format_size(costs.expert_bytes_full)}"
    budget = f", within a budget of {format_size(plan.budget_bytes)}" if plan.budget_bytes is not None else ""
    if bound.update is None or bound.absolute == 0:
        return [f"None: this is the merge that reads everything ({read} in which the experts differ{budget})."]
    share = costs.expert_bytes / costs.expert_bytes_full if costs.expert_bytes_full else 0.0
    likely = bound.estimate / bound.update if bound.update else 0.0
    return [
        f"The plan read {read} in which the experts differ ({100 * share:.3g}%){budget}{_levels(plan)}. Before "
        "rounding, the weights are at most this far from those of the merge that reads everything:",
        "",
        *_table(
            ["", "L2 distance", "of the whole update"],
            [
                ["certified bound", f"{bound.absolute:.4g}", f"{bound.relative:.2e}"],
                ["estimate", f"{bound.estimate:.4g}", f"{likely:.2e}"],
            ],
        ),
    ]


def _levels(plan: Plan) -> str:
    """``: previews of 1,204 of their blocks, and 40 blocks whole``; nothing where no preview was read."""
    coarse = sum(len(indices) for tensor in plan.tensors.values() for indices in tensor.previews or ())
    exact = sum(len(indices) for tensor in plan.tensors.values() for indices in tensor.reads)
    return f": previews of {coarse:,} of their blocks, and {exact:,} blocks whole" if coarse else ""


def _measured(commit: Commit) -> list[str]:
    rows = [[_text(name.replace("_", " ")), _amount(name, value)] for name, value in sorted(commit.measured.items())]
    return _table(["counter", "value"], rows) if rows else ["Nothing was measured."]


def _again(commit_id: Digest, commit: Commit, plan: Plan) -> list[str]:
    return [
        f"[{PLAN_FILE}]({PLAN_FILE}) is the whole plan. In a store that has the models' commits:",
        "",
        "```",
        f"mp merge --plan {PLAN_FILE} --as NAME",
        "```",
        "",
        *_table(
            ["", "id"],
            [["commit", _id(commit_id)], ["tree", _id(commit.tree)], ["plan", _id(plan.id)]],
        ),
        "",
        f"Made {_text(commit.time)}.",
    ]


def _known_method(name: str) -> Method | None:
    """The method's declaration, where this installation has it."""
    try:
        return find_method(name)
    except MergePipeError:
        return None


def _settings(plan: Plan) -> list[Setting]:
    """The settings that some tensor is merged with."""
    settings = plan.settings
    used = sorted({tensor.setting for tensor in plan.tensors.values()}) if plan.complete else [0]
    return [settings[number] for number in used if settings[number].experts] or [settings[0]]


def _own(plan: Plan, number: int) -> Iterator[Mapping[str, Value]]:
    """What each setting gives one expert."""
    for setting in _settings(plan):
        for expert, own in zip(setting.experts, setting.own, strict=True):
            if expert == number:
                yield own


def _spread(given: Iterable[Mapping[str, Value]]) -> dict[str, str]:
    """Each parameter with its value, or with the range of its values."""
    found: dict[str, set[Value]] = {}
    for parameters in given:
        for name, value in parameters.items():
            found.setdefault(name, set()).add(value)
    return {name: _range(sorted(values)) for name, values in found.items()}


def _range(values: Sequence[Value]) -> str:
    shown = [str(value).lower() if isinstance(value, bool) else f"{value:g}" for value in values]
    return shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"


def _role(expert: Input) -> str:
    onto = f" on {_id(expert.onto)}" if expert.onto is not None else ""
    return ("expert" if expert.kind == "model" else f"expert ({expert.kind.replace('_', ' ')})") + onto


def _amount(name: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _text(str(value))
    if "bytes" in name:
        return format_size(int(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _id(digest: Digest) -> str:
    return f"`{digest.hex()}`"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; its cells are Markdown already."""
    lines = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _text(value: str) -> str:
    """Any text as Markdown that shows it, in one line: as code where that is plain."""
    if len(value) > _LONGEST:
        value = value[: _LONGEST - 1] + "…"
    return f"`{value}`" if _PLAIN.match(value) else _words(value) or "(no name)"


def _words(value: str) -> str:
    """Any text as Markdown that shows it, in one line."""
    return _LIST.sub(r"\1\\\2", _MARK.sub(r"\\\1", _printable(value)).strip())


def _sentence(value: str) -> str:
    return _words(value).rstrip(".") + "."


def _quoted(value: str) -> str:
    """Any text as a YAML scalar in double quotes."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{_printable(escaped)}"'


def _printable(value: str) -> str:
    """The text with each character that is not printable written as its number."""
    return value if value.isprintable() else "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in value)
