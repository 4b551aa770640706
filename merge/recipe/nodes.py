"""YAML text as values that know their line, read as a stranger's.

Every value keeps the place that it came from, so that each later complaint can name it. Limits hold before anything
is built: bytes, nesting, and the number of values once each alias has been replaced by what it stands for. Aliases
share one value in memory, so text that unfolds to billions costs nothing but the refusal. Only plain data is read; a
tag that asks for more is refused. Scalars have the types of YAML 1.1, as PyYAML's safe loader gives them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from mergepipe.store.errors import BadInputError

MAXIMUM_BYTES: Final = 4 << 20
MAXIMUM_DEPTH: Final = 50
MAXIMUM_VALUES: Final = 200_000
_LONGEST_NUMBER: Final = 100
_SHOWN: Final = 60

_LOADER: Final[Any] = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
_RESOLVER: Final[Any] = yaml.resolver.Resolver()
_CONSTRUCTOR: Final[Any] = yaml.constructor.SafeConstructor()
_STANDARD: Final = "tag:yaml.org,2002:"
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def shown(value: object) -> str:
    """A value as a message shows it: one short line."""
    if isinstance(value, str) and len(value) > _SHOWN:
        return repr(value[:_SHOWN]) + "…"
    text = repr(value)
    return text if len(text) <= 2 * _SHOWN else text[: 2 * _SHOWN] + "…"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value stands: the file's name and its line, counted from 1."""

    where: str
    line: int

    def error(self, message: str, hint: str) -> BadInputError:
        """The error that says ``file:line: message``, for the caller to raise."""
        return BadInputError(f"{self.where}:{self.line}: {message}", hint=hint)


@dataclass(frozen=True, slots=True)
class Scalar:
    """One plain value; ``None`` is YAML's null."""

    place: Place
    value: str | float | int | bool | None


@dataclass(frozen=True, slots=True)
class Items:
    """A sequence."""

    place: Place
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A mapping's value, with the place of its key."""

    place: Place
    node: Node


@dataclass(frozen=True, slots=True)
class Entries:
    """A mapping from text. Keys stand once each, and merged ones (``<<``) come after the mapping's own."""

    place: Place
    entries: Mapping[str, Entry]


Node = Scalar | Items | Entries


def load(text: str, where: str) -> tuple[Node, ...]:
    """The documents of a YAML text, empty ones left out.

    Raises:
        BadInputError: not YAML, too large, nested too deeply, a key that stands twice or is not text, a tag, an alias
            to nothing or into itself.
    """
    _check_size(text, where)
    events = yaml.parse(text, Loader=_LOADER)
    try:
        documents = list(_Builder(where, iter(events)).documents())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(where, mark.line + 1 if mark else 1)
        problem = _CONTROL.sub(" ", error.problem or error.context or "unreadable")
        raise place.error(f"not valid YAML: {problem}", "Check the indentation, quotes and brackets there.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = text.count("\n", 0, getattr(error, "position", 0) or 0) + 1
        problem = _CONTROL.sub(" ", str(getattr(error, "reason", error)))
        raise Place(where, line).error(f"not valid YAML: {problem}", "A recipe is text of printable signs.") from error
    return tuple(node for node in documents if not (isinstance(node, Scalar) and node.value is None))


def _check_size(text: str, where: str) -> None:
    try:
        size = len(text) if len(text) > MAXIMUM_BYTES else len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        place = Place(where, text.count("\n", 0, error.start) + 1)
        raise place.error("half of a character, which is not UTF-8", "Save the recipe as UTF-8 text.") from error
    if size > MAXIMUM_BYTES:
        raise Place(where, 1).error(
            f"the recipe is larger than {MAXIMUM_BYTES >> 20} MiB",
            "Recipes are a few kilobytes; is this the right file?",
        )


@dataclass(slots=True)
class _Builder:
    """Builds values from the parser's events. ``spent`` counts values with every alias unfolded."""

    where: str
    events: Iterator[Any]
    spent: int = 0
    anchors: dict[str, tuple[Node, int, int] | None] = field(default_factory=dict)

    def documents(self) -> Iterator[Node]:
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                self.anchors.clear()
                yield self._node(next(self.events), 1)[0]

    def _place(self, event: Any) -> Place:
        return Place(self.where, event.start_mark.line + 1)

    def _spend(self, values: int, place: Place) -> None:
        self.spent += values
        if self.spent > MAXIMUM_VALUES:
            raise place.error(
                f"more than {MAXIMUM_VALUES} values, with aliases unfolded", "Split the recipe, or use fewer aliases."
            )

    def _deepen(self, depth: int, place: Place) -> None:
        if depth > MAXIMUM_DEPTH:
            raise place.error(f"nested more than {MAXIMUM_DEPTH} levels deep", "No field of a recipe nests so deeply.")

    def _node(self, event: Any, depth: int) -> tuple[Node, int]:
        """The value that begins with an event, and how many levels it has."""
        place = self._place(event)
        self._deepen(depth, place)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, depth, place)
        anchor, before = event.anchor, self.spent
        self._spend(1, place)
        if anchor is not None:
            self.anchors[anchor] = None  # not yet complete
        node: Node
        if isinstance(event, yaml.ScalarEvent):
            node, height = Scalar(place, _scalar(event, place)), 1
        elif isinstance(event, yaml.SequenceStartEvent):
            _check_tag(event.tag, "seq", place)
            node, height = self._sequence(depth, place)
        else:
            _check_tag(event.tag, "map", place)
            node, height = self._mapping(depth, place)
        if anchor is not None:
            self.anchors[anchor] = (node, self.spent - before, height)
        return node, height

    def _alias(self, event: Any, depth: int, place: Place) -> tuple[Node, int]:
        if event.anchor not in self.anchors:
            raise place.error(f"the alias *{event.anchor} has no anchor", "Write the anchor (&name) before its alias.")
        known = self.anchors[event.anchor]
        if known is None:
            raise place.error(f"the alias *{event.anchor} stands inside itself", "Write the value out.")
        node, size, height = known
        self._spend(size, place)
        self._deepen(depth + height - 1, place)
        return node, height

    def _sequence(self, depth: int, place: Place) -> tuple[Items, int]:
        items, height = [], 0
        for event in self.events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            node, levels = self._node(event, depth + 1)
            items.append(node)
            height = max(height, levels)
        return Items(place, tuple(items)), height + 1

    def _mapping(self, depth: int, place: Place) -> tuple[Entries, int]:
        entries: dict[str, Entry] = {}
        merged: Node | None = None
        height = 0
        for event in self.events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            at = self._place(event)
            merging = isinstance(event, yaml.ScalarEvent) and event.value == "<<" and event.implicit[0]
            key = "<<" if merging else _key(self._node(event, depth + 1)[0], at)
            node, levels = self._node(next(self.events), depth + 1)
            height = max(height, levels)
            if key in entries or (merging and merged is not None):
                raise at.error(f"the key {shown(key)} stands twice", "Keep one of the two.")
            if merging:
                merged = node
            else:
                entries[key] = Entry(at, node)
        for mapping in _mappings(merged):
            for key, entry in mapping.entries.items():
                entries.setdefault(key, entry)
        return Entries(place, entries), height + 1


def _mappings(merged: Node | None) -> Iterator[Entries]:
    """What a merge key (``<<``) takes in, the most important first."""
    if merged is None:
        return
    for node in merged.items if isinstance(merged, Items) else (merged,):
        if not isinstance(node, Entries):
            raise node.place.error("only mappings can be merged with <<", "Let << name a mapping, or a list of them.")
        yield node


def _key(node: Node, place: Place) -> str:
    if isinstance(node, Scalar) and isinstance(node.value, str):
        return node.value
    what = f"the key {shown(node.value)}" if isinstance(node, Scalar) else "a key"
    raise place.error(f"{what} is not text", "Put quotes around the key if it is meant as text.")


def _check_tag(tag: str | None, kind: str, place: Place) -> None:
    if tag not in (None, "!", _STANDARD + kind):
        raise place.error(f"the tag {shown(tag)} is not for recipes", "Remove the tag: recipes are plain data.")


def _scalar(event: Any, place: Place) -> str | float | int | bool | None:
    text: str = event.value
    tag: str | None = event.tag
    if tag in (None, "!") and event.implicit[0]:
        tag = _RESOLVER.resolve(yaml.ScalarNode, text, (True, False)) if len(text) <= _LONGEST_NUMBER else None
        given = False
    else:
        given = tag is not None
    if tag in (None, "!", _STANDARD + "str"):
        return text
    kind = tag.removeprefix(_STANDARD)
    if kind in ("null", "bool", "int", "float") and len(text) <= _LONGEST_NUMBER:
        try:
            return _convert(kind, text)
        except (ValueError, KeyError, IndexError, OverflowError) as error:
            raise place.error(f"{shown(text)} is not a value of the type {kind}", "Put quotes around text.") from error
    if given:
        _check_tag(tag, "str", place)
    return text  # dates and such: text that YAML 1.1 has a type for


def _convert(kind: str, text: str) -> float | int | bool | None:
    if kind == "null":
        return None
    node = yaml.ScalarNode(_STANDARD + kind, text)
    if kind == "bool":
        return bool(_CONSTRUCTOR.construct_yaml_bool(node))
    if kind == "int":
        return int(_CONSTRUCTOR.construct_yaml_int(node))
    return float(_CONSTRUCTOR.construct_yaml_float(node))
