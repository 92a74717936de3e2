"""The one place that knows every format of records: from what a config or a command says to the object that renders."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from raynium.data.records.chats import Chats, TrainOn
from raynium.data.records.formats import Completions, RecordFormat
from raynium.data.records.own_class import own_class
from raynium.data.records.preferences import Preferences
from raynium.data.records.template import CHATML, ChatTemplate, ReadBeside, special_tokens
from raynium.data.text.documents import Column
from raynium.errors import ConfigError, DataError, StoreError
from raynium.storage.store import read_place

TEXT = "text"
NAMES = (TEXT, "chats", "completions", "preferences")
MAX_TEMPLATE_BYTES = 2**22
_WITH_TEMPLATE = ("chats",)


class RecordsRecipe(BaseModel):
    """How records became tokens and labels, in a store's manifest. format, train_on: as data.records, data.train_on.
    fields: the columns of each field. sequences: documents that each becomes, and that are learned together.
    template_sha256: of the chat template and the tokens it names, if there is one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: str
    fields: dict[str, list[str]]
    sequences: Annotated[int, Field(ge=1)] = 1
    train_on: Literal["all", "last"]
    template_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None


@dataclass(frozen=True)
class Records:
    """A format, what the manifest says of it, and the template that a store keeps. Pickles small."""

    format: RecordFormat
    recipe: RecordsRecipe
    template: ChatTemplate | None

    @property
    def columns(self) -> tuple[Column, ...]:
        """What is read of a source."""
        return tuple(
            Column(each.name, tuple(self.recipe.fields[each.name]), each.required) for each in self.format.fields
        )


def records_of(
    name: str,
    *,
    fields: Mapping[str, Sequence[str]] | None = None,
    chat_template: str | None = None,
    train_on: TrainOn = "all",
    read: ReadBeside = lambda name: None,
    where: str = "the tokenizer",
) -> Records | None:
    """The records of this name; None for texts. fields, chat_template, train_on: as in `data`.

    read: a file beside the tokenizer, which `where` names. Raises ConfigError, and DataError for a template that cannot
    be had.
    """
    mapped = {field: list(columns) for field, columns in (fields or {}).items()}
    if name == TEXT:
        _refuse_for_texts(mapped, chat_template)
        return None
    template = None
    if name in _WITH_TEMPLATE:
        template = _template(chat_template, read, where)
    elif name == "preferences":
        # Those whose answers are texts take none.
        template = ChatTemplate.load(read, where) if chat_template is None else _template(chat_template, read, where)
    elif chat_template is not None:
        raise ConfigError([f"data.chat_template is for chats, and data.records is {name}: take it out"])
    made = _made(name, mapped, template, train_on)
    asked = {field.name for field in made.fields}
    if unasked := [field for field in mapped if field not in asked]:
        raise ConfigError(
            [f"data.fields names {', '.join(unasked)}, which {name} do not have: they have {', '.join(sorted(asked))}"]
        )
    recipe = RecordsRecipe(
        format=name,
        fields={field: mapped.get(field, [field]) for field in (each.name for each in made.fields)},
        sequences=made.sequences,
        train_on=train_on,
        template_sha256=template.sha256 if template else None,
    )
    return Records(made, recipe, template)


def _made(
    name: str, mapped: Mapping[str, Sequence[str]], template: ChatTemplate | None, train_on: TrainOn
) -> RecordFormat:
    if name == "chats":
        assert template is not None
        from_prompts = "messages" not in mapped and ("prompt" in mapped or "completion" in mapped)
        return Chats(_of_today(template), train_on, from_prompts)
    if name == "preferences":
        return Preferences(None if template is None else _of_today(template))
    if name == "completions":
        return Completions()
    if ":" not in name:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            [f"data.records is {name!r}: {hint}It must be one of {', '.join(NAMES)}, or package.module:Class"]
        )
    made = own_class("data.records", name)()
    if missing := [each for each in ("fields", "render", "sequences") if not hasattr(made, each)]:
        raise ConfigError(
            [f"data.records is {name!r}, which has no {', '.join(missing)}: see docs/tasks.md, A format of your own"]
        )
    return made


def _of_today(template: ChatTemplate) -> ChatTemplate:
    """Every task of a build renders the same day."""
    return ChatTemplate(template.templates, template.tokens, now=datetime.now())


def _template(chat_template: str | None, read: ReadBeside, where: str) -> ChatTemplate:
    """Raises DataError if there is none."""
    if chat_template is None:
        beside = ChatTemplate.load(read, where)
        if beside is None:
            raise DataError(
                f"{where} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json), as "
                "that of a base model: give the file of one as data.chat_template, or chatml, whose tokens "
                "<|im_start|> and <|im_end|> the tokenizer must have; or learn from completions (data.records), which "
                "take none"
            )
        return beside
    tokens = special_tokens(read, where)
    if chat_template == "chatml":
        return ChatTemplate({"default": CHATML}, tokens)
    try:
        text = read_place(chat_template, max_bytes=MAX_TEMPLATE_BYTES).decode()
    except (OSError, StoreError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template = {chat_template!r} cannot be read: {error}; give a Jinja file") from error
    return ChatTemplate({"default": text}, tokens)


def _refuse_for_texts(mapped: Mapping[str, Sequence[str]], chat_template: str | None) -> None:
    for field, given in (("data.fields", mapped), ("data.chat_template", chat_template)):
        if given:
            raise ConfigError(
                [f"{field} is for records, and data.records is text: set data.records to chats or completions, or take "
                 f"out {field}"]
            )  # fmt: skip
