"""Chat templates: from messages to the text that a model was made to read. As transformers renders it, byte for byte.

Templates come from strangers: they run in jinja2's immutable sandbox, and see plain JSON values only. Which characters
of the text an assistant wrote is known from the template's `{% generation %}` marks where it has them, and else by what
each turn adds to those before it, where that is exact.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from raynium.errors import DataError

# In a document store and in a run, where it holds all of these: {"templates": by name, "tokens": by name}.
OWN_NAME = "chat-template.json"
JINJA_NAME = "chat_template.jinja"
CONFIG_NAME = "tokenizer_config.json"
# What a folder may have a second template for.
TOOLS_NAME = "tool_use"
TOOLS_FILE = f"additional_chat_templates/{TOOLS_NAME}.jinja"
TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Names under which a message's thinking is passed; templates read the first.
_THINKING = ("reasoning_content", "thinking", "reasoning")

# Stands for an answer where what a template puts after one is asked for.
_ANSWER = "An answer."

# A file of this name, of the folder of a tokenizer; None where there is none.
ReadBeside = Callable[[str], bytes | None]

CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' -}}
{% if message['role'] == 'assistant' %}
{% generation %}
{{ message['content'] + '<|im_end|>' -}}
{% endgeneration %}
{% else %}
{{ message['content'] + '<|im_end|>' -}}
{% endif %}
{{ '\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' -}}
{% endif %}
"""
# That a vocabulary must have for it.
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


class TemplateRefusal(Exception):
    """What a template says of messages that it does not take, or the error that it ends with."""


class Marked(NamedTuple):
    """A rendered chat. spans: [begin, end) of the characters in each `{% generation %}` block."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ChatTemplate:
    """templates: Jinja texts by name, "default" and perhaps "tool_use". tokens: what they may name, as bos_token. now:
    what `strftime_now` tells; None: this moment.
    """

    templates: Mapping[str, str]
    tokens: Mapping[str, str]
    now: datetime | None = None

    @classmethod
    def load(cls, read: ReadBeside, where: str) -> "ChatTemplate | None":
        """Of a tokenizer's folder, a document store or a run; None if there is none. Raises DataError for no JSON."""
        if (own := read(OWN_NAME)) is not None:
            return cls(**_object(own, f"{where}/{OWN_NAME}"))
        config = _object(read(CONFIG_NAME) or b"{}", f"{where}/{CONFIG_NAME}")
        listed = config.get("chat_template")
        templates = {}
        if isinstance(listed, str):
            templates = {"default": listed}
        elif isinstance(listed, list):
            templates = {each["name"]: each["template"] for each in listed}
        if (jinja := read(JINJA_NAME)) is not None:
            templates = {"default": jinja.decode()}
            if (second := read(TOOLS_FILE)) is not None:
                templates[TOOLS_NAME] = second.decode()
        if not templates:
            return None
        return cls(templates, special_tokens(read, where))

    def to_json(self) -> bytes:
        """The file OWN_NAME."""
        return json.dumps({"templates": dict(self.templates), "tokens": dict(self.tokens)}, sort_keys=True).encode()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_json()).hexdigest()

    def is_marked(self, tools: Any = None) -> bool:
        """Whether the template says itself what an assistant wrote."""
        return _MARK.search(self._text(tools)) is not None

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, *, add_generation_prompt: bool = False
    ) -> str:
        """The text of a chat; with `add_generation_prompt` up to where an assistant would answer.

        messages: JSON values, as read of a record. Raises TemplateRefusal.
        """
        return self.render_marked(messages, tools, add_generation_prompt=add_generation_prompt).text

    def render_marked(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, *, add_generation_prompt: bool = False
    ) -> Marked:
        """`render`, and where the assistant's characters are by the template's marks."""
        blocks: list[str] = []
        spans: list[tuple[int, int]] = []
        try:
            compiled = _compiled(self._text(tools))
            values = {
                "messages": [_message(each) for each in messages],
                "tools": tools,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                # One that is given here hides the environment's.
                **({} if self.now is None else {"strftime_now": self.now.strftime}),
            }
            with compiled.environment.tracking(blocks, spans):  # pyright: ignore[reportAttributeAccessIssue]
                for block in compiled.generate(**self.tokens, **values):
                    blocks.append(block)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise TemplateRefusal(str(error) or type(error).__name__) from error
        return Marked("".join(blocks), tuple(spans))

    def answer_end(self) -> str:
        """What the template puts after an answer, up to the line's end; "" for nothing. Raises TemplateRefusal."""
        question = {"role": "user", "content": "A question."}
        text = self.render([question, {"role": "assistant", "content": _ANSWER}])
        return text.rpartition(_ANSWER)[2].strip().partition("\n")[0].strip()

    def _text(self, tools: Any) -> str:
        if tools is not None and TOOLS_NAME in self.templates:
            return self.templates[TOOLS_NAME]
        if "default" not in self.templates:
            raise DataError(
                f"the tokenizer has chat templates {', '.join(sorted(self.templates))}, and none that is the default: "
                "give the file of one as data.chat_template"
            )
        return self.templates["default"]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers hands it to a template: without nulls, its thinking under each name that templates read."""
    said = {key: value for key, value in message.items() if value is not None}
    thinking = next((said[name] for name in _THINKING if name in said), None)
    return said if thinking is None else {"thinking": thinking, **said, "reasoning_content": thinking}


def special_tokens(read: ReadBeside, where: str) -> dict[str, str]:
    """Those of a tokenizer's folder that a template may name, as bos_token."""
    files = ("special_tokens_map.json", CONFIG_NAME)
    of_map, of_config = (_tokens(_object(read(name) or b"{}", f"{where}/{name}")) for name in files)
    return of_map | of_config


def _tokens(fields: Mapping[str, Any]) -> dict[str, str]:
    """Of Hugging Face's files: a token's text, or an object with it."""
    found = {name: fields.get(name) for name in TOKENS}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _object(content: bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}): copy it again from where the tokenizer came from") from error
    return fields if isinstance(fields, dict) else {}


# ------------------------------------------------------------------------------------------------- the environment


class _Generation(Extension):
    """The tag `{% generation %}`: what is within is rendered as it is, and its place told to who tracks."""

    tags = {"generation"}  # noqa: RUF012

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        environment.extend(tracking=self._tracking)
        # One environment renders in all threads of a process.
        self._tracked = threading.local()

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_within"), [], [], body).set_lineno(line)

    def _within(self, caller: Callable[[], str]) -> str:
        text = caller()
        begin = sum(map(len, self._tracked.blocks))
        self._tracked.spans.append((begin, begin + len(text)))
        return text

    @contextmanager
    def _tracking(self, blocks: list[str], spans: list[tuple[int, int]]) -> Iterator[None]:
        self._tracked.blocks, self._tracked.spans = blocks, spans
        yield


@lru_cache(maxsize=8)
def _compiled(text: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(text)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own escapes what HTML would read.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
