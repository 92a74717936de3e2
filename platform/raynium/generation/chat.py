"""A conversation with a run's model, in the form of its chat template."""

import json
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from typing import Any

from raynium.data.records.template import ChatTemplate, TemplateRefusal
from raynium.errors import ConfigError
from raynium.generation.continuation import Continuation
from raynium.generation.drawing import Drawing
from raynium.generation.sampler import Ended, Sampler, open_sampler


class Chat:
    """Turns are messages (role, content), as in a record of chats. What the model has read of the turns before is not
    computed again.
    """

    def __init__(self, sampler: Sampler, template: ChatTemplate, drawing: Drawing, *, system: str | None = None):
        """drawing: of each answer; what the template puts after an answer ends one, too. ConfigError if the template
        refuses a question and its answer.
        """
        self.sampler = sampler
        self.system = system
        # Of the last answer. "interrupted": nobody waited for its end. "full": it has all that the model can read.
        self.ended: Ended | str = "stop"
        self._template = template
        self._turns: list[dict[str, Any]] = []
        try:
            end = template.answer_end()
        except TemplateRefusal as error:
            raise _refused(error) from error
        self._drawing = replace(drawing, stop=(*drawing.stops, end)) if end else drawing
        self._continuation: Continuation | None = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All of them, the system's first."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self._turns]

    @property
    def max_seq_len(self) -> int:
        """What the model can read of a chat, in tokens, with the answer."""
        return self.sampler.model.config.max_seq_len

    def say(self, text: str) -> Generator[str]:
        """The answer, in pieces as they come. Closed before its end, what was said until then is the answer.

        ConfigError if the template refuses the turn, or if the chat with it leaves no room for an answer; it then is no
        part of the chat. `ended` says how the answer ended.
        """
        self._turns.append({"role": "user", "content": text})
        said: list[str] = []
        self.ended = "interrupted"
        try:
            context = self.sampler.texts.markup(_rendered(self._template, self.messages))
            room = self.max_seq_len - len(context)
            if room < 1:
                raise ConfigError(
                    [
                        f"the chat has {len(context):,} tokens with this turn, and the model reads "
                        f"{self.max_seq_len:,} with its answer: begin a new one (/reset in `raynium chat`, reset() in "
                        "Python), or say less"
                    ]
                )
            drawing = replace(self._drawing, max_new_tokens=min(room, self._drawing.max_new_tokens))
            self._continuation = self.sampler.begin([context], drawing, earlier=self._continuation)
            with closing(self.sampler.pieces(self._continuation)) as pieces:
                for piece in pieces:
                    said.append(piece.text)
                    if piece.ended == "length" and room == drawing.max_new_tokens:
                        self.ended = "full"
                    elif piece.ended is not None:
                        self.ended = piece.ended
                    if piece.text:
                        yield piece.text
        finally:
            if answer := "".join(said):
                self._turns.append({"role": "assistant", "content": answer})
            else:
                self._turns.pop()

    def reset(self) -> None:
        """Begin anew; what the system says stays."""
        self._turns.clear()

    def record(self) -> str:
        """The chat as a line of JSON, a record of `data.records: chats`."""
        return json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n"


def open_chat(run_url: str, drawing: Drawing, *, step: int | None = None, system: str | None = None) -> Chat:
    """With the model of a run's newest checkpoint, or of `step`. ConfigError if the run has no chat template;
    CheckpointError if it has no such checkpoint.
    """
    sampler = open_sampler(run_url, step)
    template = sampler.texts.chat_template
    if template is None:
        raise ConfigError(
            [
                f"{run_url} has no chat template, so how a chat is written for its model is not known: it was not "
                "trained on chats, nor imported with a template. `raynium sample` continues a text"
            ]
        )
    return Chat(sampler, template, drawing, system=system)


def _rendered(template: ChatTemplate, messages: list[dict[str, Any]]) -> str:
    try:
        return template.render(messages, add_generation_prompt=True)
    except TemplateRefusal as error:
        raise _refused(error) from error


def _refused(error: TemplateRefusal) -> ConfigError:
    return ConfigError([f"the run's chat template refuses this turn: {error}"])
