"""YAML text to plain values, guided by the schema.

The schema says what a scalar is meant to be, so YAML's guesses never decide: `name: 123` stays text where text is
asked for, `1e-4` is a number (YAML 1.1 wants `1.0e-4`), `on` and `no` are words, `010` is ten.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, get_args, get_origin

import yaml

from raynium.config.fields import BUILDS_ON, did_you_mean, fields_below, schema_fields, split_annotation
from raynium.config.paths import SECRET

NULLS = {"", "~", "null", "Null", "NULL"}
BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
# The length is bounded, since int() refuses thousands of digits.
INTEGER = re.compile(r"[-+]?[0-9]{1,30}(_[0-9]{1,30}){0,9}")
NUMBER = re.compile(r"[-+]?([0-9]+(_[0-9]+)*(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
SPECIAL_NUMBERS = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}


# Bounds on what is parsed at all: YAML's own parser takes seconds for a megabyte, or for thousands of open brackets.
MAX_CHARACTERS = 2**16
MAX_NESTING = 200
# Of a value in a message.
MAX_SHOWN = 200
# Half a surrogate pair: how Python spells bytes that are no UTF-8, and what no file, name or server can hold.
_NO_TEXT = re.compile("[\ud800-\udfff\0]")


@dataclass
class Reading:
    """What was read so far: nested values, where each came from, and the problems met on the way.

    origins: dotted name → "jobs/a.yaml line 3". refused: names that were given, but in a form that was already
    reported.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)

    def refuse(self, name: str, problem: str) -> None:
        """Note a problem of a name that the schema knows; that it is then missing is no second problem."""
        self.problems.append(problem)
        self.refused.add(name)

    def put(self, name: str, value: Any, origin: str) -> None:
        """Set the value of a dotted name, in place of what it had; {} opens a section, and leaves what is in it."""
        value = _whole(value)
        for text in _texts_in(value):
            if _NO_TEXT.search(text):
                self.refuse(
                    name,
                    f"{name} is {repeated(name, ascii(text))} ({origin}), which is not valid text: it holds bytes "
                    "that are no UTF-8, or a null; check how it was typed, and the locale (LC_ALL=C.UTF-8 is right "
                    "everywhere)",
                )
                return
        *sections, key = name.split(".")
        level = self.values
        for section in sections:
            if not isinstance(level.get(section), dict):
                level[section] = {}
            level = level[section]
        if value != {} or not isinstance(level.get(key), dict):
            level[key] = value
        self.origins[name] = origin


def compose(text: str, source: str, name: str, reading: Reading) -> yaml.Node | None:
    """The YAML node tree of `text`, the value of `name`; None where it is empty or unreadable (then it is refused)."""
    if len(text) > MAX_CHARACTERS:
        reading.refuse(name, f"{source} has {len(text):,} characters: a config has at most {MAX_CHARACTERS:,}")
        return None
    nesting = accumulate(1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[\]{}]", text))
    try:
        if max(nesting, default=0) > MAX_NESTING:
            raise RecursionError
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        reading.refuse(name, f"{source} is nested far deeper than any field: look for brackets that are never closed")
        return None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = " ".join(filter(None, [getattr(error, "context", None), getattr(error, "problem", None)])) or str(error)
        reading.refuse(name, f"{source}{place} is not valid YAML: {what}")
        return None


def read_section(node: yaml.Node, name: str, source: str, reading: Reading) -> None:
    """Take over a mapping node as the section `name` ("" for the whole config) of the schema."""
    if not isinstance(node, yaml.MappingNode):
        accepted = schema_fields()[name].accepted if name else "sections such as `train:` with fields below them"
        given = f"{name} is {shown(node)} ({place_of(node, source)})" if name else f"{source} is {shown(node)}"
        reading.refuse(name, f"{given}: it must be {accepted}")
        return
    if name:
        reading.put(name, {}, place_of(node, source))
    known = {member.name for member in fields_below(name)}
    for key_node, child in _members(node, name, source, reading):
        full_name = f"{name}.{key_node.value}" if name else key_node.value
        if full_name in BUILDS_ON:
            # What it names was laid below before this section is read (`load`).
            continue
        if full_name not in known:
            reading.problems.append(_unknown_key(key_node.value, full_name, place_of(key_node, source)))
        else:
            read_field(child, full_name, source, reading)


def read_field(node: yaml.Node, name: str, source: str, reading: Reading) -> None:
    """Take over a node as the value of the field or section `name`, which the schema knows."""
    known = schema_fields()[name]
    if known.is_section and not (known.nullable and _is_null(node)):
        read_section(node, name, source, reading)
    elif isinstance(node, yaml.MappingNode):
        reading.refuse(name, f"{name} is a section here ({place_of(node, source)}): it must be {known.accepted}")
    else:
        reading.put(name, _value(node, known.type, name, source, reading), place_of(node, source))


def shown(node: yaml.Node) -> str:
    """A node as a message shows it."""
    if isinstance(node, yaml.ScalarNode):
        return "empty" if _is_null(node) else cut(repr(node.value))
    return "a list" if isinstance(node, yaml.SequenceNode) else "a section"


def repeated(name: str, text: str) -> str:
    """What somebody gave for a field, as a message repeats it: not at all where it may be a secret."""
    known = schema_fields().get(name)
    may_be_secret = SECRET.search(text) is not None or (known is not None and known.is_private)
    return "something that is not repeated here, since it may be a secret" if may_be_secret else cut(text)


def cut(text: str) -> str:
    """What somebody gave, no longer than a message shows: it may be a whole file."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}… ({len(text):,} characters)"


def place_of(node: yaml.Node, source: str) -> str:
    """Where a node stands; an override is one line, and a node made for an empty one stands nowhere."""
    return source if source.startswith("override") else f"{source} line {node.start_mark.line + 1}"


def _members(
    node: yaml.MappingNode, name: str, source: str, reading: Reading
) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """(key, value) nodes of a mapping, once per key; a key given twice is a problem."""
    first_lines: dict[str, int] = {}
    for key_node, child in node.value:
        place = place_of(key_node, source)
        if not isinstance(key_node, yaml.ScalarNode):
            reading.problems.append(f"{place} has {shown(key_node)} for a key: a key must be the name of a field")
            continue
        key = key_node.value
        if key in first_lines:
            where = f"{name}.{key}" if name else key
            reading.problems.append(
                f"{where} is given twice ({place}, first on line {first_lines[key]}): keep one of them"
            )
            continue
        first_lines[key] = key_node.start_mark.line + 1
        yield key_node, child


def _unknown_key(key: str, full_name: str, place: str) -> str:
    if "." in key and key in schema_fields():
        section, _, last = key.rpartition(".")
        return f"{key} is one word here ({place}): in a file, write `{last}:` below `{section.replace('.', ': ')}:`"
    return f"{full_name} is not a field ({place}): {did_you_mean(full_name)}"


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in NULLS


def _value(node: yaml.Node, wanted: Any, name: str, source: str, reading: Reading) -> Any:
    """A plain value of a node. What does not fit `wanted` stays as it is, and is refused by pydantic.

    name: of the value, in messages. `wanted` bounds how deep this goes: a YAML alias may point back to its own list.
    """
    if isinstance(node, yaml.SequenceNode):
        if get_origin(wanted) is not tuple:
            return [child.value if isinstance(child, yaml.ScalarNode) else {} for child in node.value]
        member = split_annotation(get_args(wanted)[0])[0]
        return [
            _value(child, member, f"{name}[{at}]", source, reading)
            if isinstance(child, yaml.ScalarNode) or _types_below(member)
            else {}
            for at, child in enumerate(node.value)
        ]
    if isinstance(node, yaml.MappingNode):
        types = _types_below(wanted)
        members = _members(node, name, source, reading) if types else ()
        return {
            key.value: _value(child, types.get(key.value, types.get("")), f"{name}.{key.value}", source, reading)
            for key, child in members
        }
    assert isinstance(node, yaml.ScalarNode)
    if _is_null(node):
        return None
    if node.style is not None or wanted not in (int, float, bool):
        return node.value
    return _number(node.value, wanted)


def _types_below(wanted: Any) -> dict[str, Any]:
    """The types of a mapping's values by key, "" for any key; {} where no mapping is wanted."""
    if get_origin(wanted) is dict:
        return {"": split_annotation(get_args(wanted)[1])[0]}
    fields = getattr(wanted, "model_fields", {})
    return {key: split_annotation(info.annotation)[0] for key, info in fields.items()}


def _number(text: str, wanted: type) -> Any:
    if text in BOOLEANS:
        return BOOLEANS[text]
    if INTEGER.fullmatch(text):
        return int(text)
    if text in SPECIAL_NUMBERS:
        return float(SPECIAL_NUMBERS[text])
    if NUMBER.fullmatch(text):
        number = float(text)
        # 1e3 steps is a whole number, however it is written.
        return int(number) if wanted is int and number.is_integer() else number
    return text


def _whole(value: Any) -> Any:
    """JSON escapes a character above U+FFFF as two surrogates, each of which YAML reads as a character."""
    if isinstance(value, list):
        return [_whole(each) for each in value]
    if isinstance(value, dict):
        return {_whole(key): _whole(each) for key, each in value.items()}
    return (
        value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass") if isinstance(value, str) else value
    )


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for each in value if isinstance(value, list) else [*value.keys(), *value.values()]:
            yield from _texts_in(each)
