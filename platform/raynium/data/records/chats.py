"""Chats: messages rendered by a template, of which the assistant's turns are learned."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raynium.data.records.formats import FieldOf, RecordError, Rendered, text_of
from raynium.data.records.template import ChatTemplate, TemplateRefusal

ROLES = ("system", "developer", "user", "assistant", "tool")
TrainOn = Literal["all", "last"]
MARK_IT = (
    "Set data.train_on to last, where one turn alone is learned; or give a data.chat_template that marks what the "
    "assistant writes with {% generation %}"
)


@dataclass(frozen=True)
class Chats:
    """from_prompts: a record has a prompt and a completion, one turn each, in place of messages. See `RecordFormat`."""

    template: ChatTemplate
    train_on: TrainOn = "all"
    from_prompts: bool = False
    sequences = 1

    @property
    def fields(self) -> tuple[FieldOf, ...]:
        if self.from_prompts:
            return (FieldOf("system", False), FieldOf("prompt", True), FieldOf("completion", True))
        return (FieldOf("messages", True), FieldOf("tools", False))

    def render(self, record: Mapping[str, Any]) -> list[Rendered]:
        if self.from_prompts:
            turns = [("system", "system"), ("user", "prompt"), ("assistant", "completion")]
            messages = [{"role": role, "content": text_of(record, name)} for role, name in turns if record.get(name)]
        else:
            messages = checked_messages(record["messages"])
        return [rendered_chat(self.template, messages, checked_tools(record.get("tools")), self.train_on)]


def rendered_chat(
    template: ChatTemplate, messages: Sequence[Mapping[str, Any]], tools: Any, train_on: TrainOn
) -> Rendered:
    """With the labels of all assistant turns, or the last. Raises RecordError."""
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise RecordError("the chat has no turn of the assistant, so there is nothing to learn: leave it out")
    learned = turns if train_on == "all" else turns[-1:]
    try:
        if template.is_marked(tools):
            whole = template.render_marked(messages, tools)
            # Those of turns before are as many, however the template changes them.
            before = 0 if train_on == "all" else len(template.render_marked(messages[: learned[0]], tools).spans)
            spans = whole.spans[before:]
            if not spans:
                raise RecordError(
                    "the template has {% generation %} marks, and none around what this chat's assistant says: mend "
                    "the template, or take one without marks"
                )
            _refuse_python(messages, whole.text)
            return Rendered(whole.text, spans, markup=True, ends=False)
        text = template.render(messages, tools)
        _refuse_python(messages, text)
        spans = tuple(_span(template, messages, tools, number, text) for number in learned)
    except TemplateRefusal as error:
        raise RecordError(f"the chat template refuses it: {error}") from error
    return Rendered(text, spans, markup=True, ends=False)


def _refuse_python(messages: Sequence[Mapping[str, Any]], text: str) -> None:
    """Raises RecordError for a content that a template for texts alone has written as Python shows it."""
    for number, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list) and str(content) in text:
            raise RecordError(
                f"message {number} (from 0) has a list of parts as its content, {_shown(content)}, and the chat "
                "template takes texts alone: give the text in place of the list"
            )


def _span(
    template: ChatTemplate, messages: Sequence[Mapping[str, Any]], tools: Any, number: int, whole: str
) -> tuple[int, int]:
    """What a turn adds to the text, as it is when the turn before it asks for an answer. Raises RecordError."""
    before = template.render(messages[:number], tools, add_generation_prompt=True)
    with_turn = template.render(messages[: number + 1], tools)
    if not with_turn.startswith(before):
        raise RecordError(
            f"which tokens the assistant writes cannot be told: the template renders message {number} (from 0) "
            f"otherwise than it asks for it ({_apart(before, with_turn)}). Give a data.chat_template that marks what "
            "the assistant writes with {% generation %}"
        )
    if not whole.startswith(with_turn):
        raise RecordError(
            f"which tokens the assistant writes cannot be told: the template renders the chat up to message {number} "
            f"(from 0) otherwise when messages follow it ({_apart(with_turn, whole)}), as templates do that leave out "
            f"earlier thinking. {MARK_IT}"
        )
    return len(before), len(with_turn)


def _apart(expected: str, found: str) -> str:
    """Where two texts part."""
    pairs = zip(f"{expected}\0", f"{found}\1", strict=False)
    at = next(at for at, (before, after) in enumerate(pairs) if before != after)
    return f"{expected[at : at + 30]!r} becomes {found[at : at + 30]!r}"


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Raises RecordError for what is no list of messages."""
    if not isinstance(messages, list) or not messages:
        raise RecordError(f"messages is {_shown(messages)}: it must be a list of messages, one at least")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message:
            keys = f"an object with {', '.join(message) or 'nothing'}" if isinstance(message, dict) else _shown(message)
            raise RecordError(f"message {number} (from 0) is {keys}: it must be an object with role and content")
        if message["role"] not in ROLES:
            raise RecordError(
                f"message {number} (from 0) has the role {_shown(message['role'])}: it must be one of "
                + ", ".join(ROLES)
            )
        if not isinstance(message.get("content"), str | list | None):
            raise RecordError(
                f"message {number} (from 0) has the content {_shown(message['content'])}: it must be a text, or a list "
                "of parts where the template takes one"
            )
    return messages


def checked_tools(tools: Any) -> list[Any] | None:
    """A list of schemas, or the JSON text of one; None where there are none. Raises RecordError."""
    try:
        found = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise RecordError(f"tools is a text that is not JSON ({error}): give a list of JSON schemas") from error
    if found is not None and not (isinstance(found, list) and all(isinstance(each, dict) for each in found)):
        raise RecordError(f"tools is {_shown(tools)}: it must be a list of JSON schemas")
    return found or None


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"
