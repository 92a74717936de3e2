"""Pairs of answers to one prompt, of which people preferred the first: two documents each, chosen and rejected."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raynium.data.records.chats import checked_messages, checked_tools
from raynium.data.records.formats import FieldOf, RecordError, Rendered, text_of
from raynium.data.records.template import ChatTemplate, TemplateRefusal


@dataclass(frozen=True)
class Preferences:
    """All three are texts, or lists of messages that the template renders; what follows the prompt is learned.

    Without a prompt, chosen and rejected are whole chats, and it is all messages that they begin with alike. The end of
    the document follows texts only: what ends an answer of a chat is the template's matter. See `RecordFormat`.
    """

    template: ChatTemplate | None
    sequences = 2
    fields = (
        FieldOf("prompt", required=False),
        FieldOf("chosen", required=True),
        FieldOf("rejected", required=True),
        FieldOf("tools", required=False),
    )

    def render(self, record: Mapping[str, Any]) -> list[Rendered]:
        if record["chosen"] == record["rejected"]:
            raise RecordError("chosen and rejected are equal, so neither is better: leave it out")
        if isinstance(record["chosen"], str) and isinstance(record.get("prompt"), str):
            return [_text(record, answer) for answer in ("chosen", "rejected")]
        return self._chats(record)

    def _chats(self, record: Mapping[str, Any]) -> list[Rendered]:
        """Raises RecordError."""
        answers = [_answer(name, record[name]) for name in ("chosen", "rejected")]
        if "prompt" in record:
            prompt = checked_messages(record["prompt"])
        else:
            alike = 0
            while alike < min(map(len, answers)) and answers[0][alike] == answers[1][alike]:
                alike += 1
            prompt, answers = answers[0][:alike], [answer[alike:] for answer in answers]
        if not prompt or not all(answers):
            raise RecordError(
                "without a prompt, chosen and rejected must be chats that begin alike and go on differently, each with "
                "an answer: give the column of the prompt in data.fields, or leave it out"
            )
        if self.template is None:
            raise RecordError(
                "its prompt and answers are messages, and the tokenizer has no chat template: give data.chat_template"
            )
        tools = checked_tools(record.get("tools"))
        try:
            asked = self.template.render(prompt, tools, add_generation_prompt=True)
            whole = [self.template.render([*prompt, *answer], tools) for answer in answers]
        except TemplateRefusal as error:
            raise RecordError(f"the chat template refuses it: {error}") from error
        if any(not each.startswith(asked) for each in whole):
            raise RecordError(
                "which tokens are the answer cannot be told: the template renders the prompt otherwise when an answer "
                "follows it. Give a data.chat_template that renders both alike"
            )
        return [Rendered(each, ((len(asked), len(each)),), markup=True, ends=False) for each in whole]


def _text(record: Mapping[str, Any], answer: str) -> Rendered:
    prompt, said = text_of(record, "prompt"), text_of(record, answer)
    return Rendered(prompt + said, ((len(prompt), len(prompt + said)),), markup=False, ends=True)


def _answer(name: str, value: Any) -> list[dict[str, Any]]:
    """Raises RecordError for what is no list of messages that ends with the assistant's."""
    if not isinstance(value, list):
        raise RecordError(
            f"{name} is {type(value).__name__}: prompt, chosen and rejected must all be texts, or all lists of messages"
        )
    messages = checked_messages(value)
    if messages[-1]["role"] != "assistant":
        raise RecordError(
            f"{name} ends with a message of {messages[-1]['role']}: the assistant must have the last word"
        )
    return messages
