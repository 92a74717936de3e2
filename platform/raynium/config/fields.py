"""What the schema accepts, field by field: dotted names, "did you mean", and the words that error messages use."""

import difflib
import inspect
import types
import typing
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from raynium.config.schema import Config
from raynium.config.section import Accepts, Private, Section, Unit

# Keys that are no fields, since the resolved config has what they stand for: key → what it takes.
BUILDS_ON = {
    "extends": "the job file to build on, a preset's name or a path relative to this file",
    "model.preset": "the job file whose model to take, a preset's name or a path relative to this file",
}


@dataclass(frozen=True)
class SchemaField:
    """One field or section of the schema.

    name: dotted, e.g. "model.rope_scaling.factor". type: the annotation without `None` and `Annotated`; a subclass of
    Section for a section. marks: what came with the annotation (pydantic's objects with ge, gt, le or lt, our Unit and
    Accepts). meaning: of a section, its docstring. default: None also where `required`.
    """

    name: str
    type: Any
    marks: tuple[Any, ...]
    nullable: bool
    required: bool
    meaning: str
    default: Any

    @property
    def is_section(self) -> bool:
        return isinstance(self.type, type) and issubclass(self.type, Section)

    @property
    def lists_sections(self) -> bool:
        return get_origin(self.type) is tuple and bool(getattr(get_args(self.type)[0], "model_fields", None))

    @property
    def is_private(self) -> bool:
        return any(isinstance(mark, Private) for mark in self.marks)

    @property
    def accepted(self) -> str:
        """What may be given here, in words a user reads."""
        if self.is_section:
            words = "a section with " + ", ".join(self.type.model_fields)
        else:
            words = _in_words(self.type, self.marks)
        return words + (", or null" if self.nullable else "")

    @property
    def unit(self) -> str:
        """What its number counts or measures; "" where it has no unit."""
        return next((mark.name for mark in self.marks if isinstance(mark, Unit)), "")


@cache
def schema_fields() -> dict[str, SchemaField]:
    """Every section and field of the schema by dotted name, in the schema's order."""
    return {field.name: field for field in _walk(Config, "")}


def fields_below(section: str) -> list[SchemaField]:
    """The direct members of a section ("" for the whole config)."""
    prefix = section + "." if section else ""
    members = (f for name, f in schema_fields().items() if name.startswith(prefix))
    return [field for field in members if "." not in field.name[len(prefix) :]]


def similar_names(name: str) -> list[str]:
    """Up to three dotted names a user may have meant by `name`, the likeliest first.

    Sure signs: the same last part in another place ("steps" for "train.steps"), its initials ("lr"), a slip of a
    letter. Only without any: names that contain it, and near spellings of the whole name or of its last part.
    """
    names = [*schema_fields(), *BUILDS_ON]
    wanted = name.rpartition(".")[2]
    last_parts = {full: full.rpartition(".")[2] for full in names}
    initials = {full: "".join(word[:1] for word in last.split("_")) for full, last in last_parts.items()}
    sure = [
        *(full for full in names if last_parts[full] == wanted or (len(wanted) > 1 and initials[full] == wanted)),
        *difflib.get_close_matches(name, names, n=2, cutoff=0.85),
    ]
    near_last_parts = difflib.get_close_matches(wanted, set(last_parts.values()), n=2, cutoff=0.75)
    near = [
        *(full for full in names if len(wanted) > 3 and wanted in last_parts[full]),
        *difflib.get_close_matches(name, names, n=2, cutoff=0.7),
        *(full for last in near_last_parts for full in names if last_parts[full] == last),
    ]
    own_sections = {name[:at] for at, letter in enumerate(name) if letter == "."}
    return [full for full in dict.fromkeys(sure or near) if full not in own_sections][:3]


def did_you_mean(name: str) -> str:
    """The end of a message about the unknown key `name`: near names, or the names that exist beside it."""
    # Comparing takes time by the square of the length.
    name = name[:200]
    if similar := similar_names(name):
        return f"did you mean {' or '.join(similar)}?"
    section = name.rpartition(".")[0]
    known = schema_fields().get(section)
    section = section if known and known.is_section else ""
    members = ", ".join(field.name for field in fields_below(section))
    return f"the {'fields of ' + section if section else 'sections'} are {members}"


def accepted_within(wanted: Any, parts: typing.Sequence[str]) -> str:
    """What may be given at a place inside a list of sections, in words; parts: the way there, as ["0", "weight"]."""
    marks, nullable = (), False
    for part in parts:
        if get_origin(wanted) in (tuple, dict):
            wanted, marks, nullable = split_annotation(get_args(wanted)[0 if get_origin(wanted) is tuple else 1])
        elif part in wanted.model_fields:
            info = wanted.model_fields[part]
            wanted, marks, nullable = split_annotation(info.annotation)
            marks = (*info.metadata, *marks)
    return _in_words(wanted, marks) + (", or null" if nullable else "")


def split_annotation(annotation: Any) -> tuple[Any, tuple[Any, ...], bool]:
    """(type, marks, nullable) of an annotation such as `Annotated[int, Field(ge=1), Unit("steps")] | None`."""
    marks: list[Any] = []
    nullable = False
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation, *metadata = get_args(annotation)
            for item in metadata:
                marks += item.metadata if isinstance(item, FieldInfo) else [item]
        elif origin in (types.UnionType, typing.Union):
            members = [member for member in get_args(annotation) if member is not type(None)]
            assert len(members) == 1, f"the schema may only unite one type with None, not {annotation}"
            annotation, nullable = members[0], True
        else:
            return annotation, tuple(marks), nullable


def _walk(section: type[Section], prefix: str) -> typing.Iterator[SchemaField]:
    for key, info in section.model_fields.items():
        bare_type, marks, nullable = split_annotation(info.annotation)
        field = SchemaField(
            name=prefix + key,
            type=bare_type,
            marks=(*info.metadata, *marks),
            nullable=nullable,
            required=info.is_required(),
            meaning=" ".join(filter(None, [_docstring(bare_type), " ".join((info.description or "").split())])),
            default=None if info.is_required() else info.default,
        )
        yield field
        if field.is_section:
            yield from _walk(bare_type, field.name + ".")


def _docstring(bare_type: Any) -> str | None:
    return inspect.getdoc(bare_type) if isinstance(bare_type, type) and issubclass(bare_type, Section) else None


def _in_words(bare_type: Any, marks: tuple[Any, ...]) -> str:
    if told := [mark.words for mark in marks if isinstance(mark, Accepts)]:
        return told[0]
    if get_origin(bare_type) is Literal:
        return "one of " + ", ".join(map(str, get_args(bare_type)))
    if get_origin(bare_type) is tuple:
        members = get_args(bare_type)
        member_type, member_marks, _ = split_annotation(members[0])
        length = "" if members[-1] is Ellipsis else f" of {len(members)}"
        return f"a list{length}, each {_in_words(member_type, member_marks)}"
    if get_origin(bare_type) is dict:
        return f"names, each with {_in_words(*split_annotation(get_args(bare_type)[1])[:2])}"
    if isinstance(bare_type, type) and issubclass(bare_type, Section):
        return "a section with " + ", ".join(bare_type.model_fields)
    nouns = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return " ".join(filter(None, [nouns[bare_type], " and ".join(filter(None, map(_limit_in_words, marks)))]))


def _limit_in_words(limit: Any) -> str:
    words = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
    return " and ".join(f"{words[name]} {getattr(limit, name)}" for name in words if hasattr(limit, name))
