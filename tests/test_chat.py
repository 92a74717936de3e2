"""Conversations with a run's model: a real checkpoint and template; what the model answers is scripted at its head."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Ended, run_command
from tiny import job_text

from raynium import find_run
from raynium.config.load import parse_config
from raynium.convert.description import KEPT_NAME
from raynium.data.records.template import CHATML, CHATML_TOKENS, OWN_NAME, ChatTemplate
from raynium.data.tokenizer import Tokenizer
from raynium.errors import ConfigError
from raynium.generation import chat as module
from raynium.generation.chat import Chat, open_chat
from raynium.generation.drawing import Drawing
from raynium.generation.sampler import Sampler
from raynium.models.decoder import Decoder
from raynium.storage.store import Store

END = CHATML_TOKENS[1]
TEXT = "def main(arguments): return arguments\n" * 20
TOKENIZER = Tokenizer.train([TEXT], vocab_size=290, special_tokens=CHATML_TOKENS)
TEMPLATE = ChatTemplate({"default": CHATML}, {})
ONE_TURN = "{% if messages | length > 2 %}{{ raise_exception('no more') }}{% endif %}{{ messages[-1].content }}"


@pytest.fixture
def store(save_run: Callable[..., Store]) -> Store:
    config = parse_config(job_text({"model.vocab_size": 320, "model.max_seq_len": 128, "data.seq_len": 16}))
    torch.manual_seed(0)
    store = save_run(Decoder(config.model), config)
    TOKENIZER.keep(store)
    store.replace(OWN_NAME, TEMPLATE.to_json())
    return store


def tokens_of(text: str) -> list[int]:
    return TOKENIZER.encode_markup([text])[0][0].tolist()


def scripted(sampler: Sampler, answers: str) -> list[int]:
    """Has the model say this, whatever it reads; returns how many tokens it reads each time."""
    tokens: Iterator[int] = iter(tokens_of(answers))
    seen: list[int] = []

    def say(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(out).index_fill(-1, torch.tensor(next(tokens)), 1.0)

    sampler.model.head.register_forward_hook(say)
    sampler.model.embedding.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    return seen


def talk(store: Store, answers: str, **drawing: Any) -> tuple[Chat, list[int]]:
    chat = open_chat(store.url, Drawing(temperature=0, **drawing), system="Be brief.")
    return chat, scripted(chat.sampler, answers)


def test_an_answer_is_streamed_and_is_read_with_the_next_question(store: Store) -> None:
    chat, seen = talk(store, f"return 🎉 x{END}naïve{END}")
    pieces = list(chat.say("def?"))
    assert "".join(pieces) == "return 🎉 x" and len(pieces) > 2 and not any("\ufffd" in piece for piece in pieces)
    assert chat.ended == "stop"
    assert "".join(chat.say("main?")) == "naïve"
    assert chat.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "def?"},
        {"role": "assistant", "content": "return 🎉 x"},
        {"role": "user", "content": "main?"},
        {"role": "assistant", "content": "naïve"},
    ]
    # The second time it reads what came after what it has read and said; its own last token, too, which it never read.
    first, second = (tokens_of(TEMPLATE.render(chat.messages[:n], add_generation_prompt=True)) for n in (2, 4))
    said = len(tokens_of(f"return 🎉 x{END}"))
    assert seen == [len(first), *[1] * (said - 1), len(second) - len(first) - said + 1, *[1] * len(tokens_of("naïve"))]
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]


def test_an_answer_that_nobody_waits_for_is_what_was_said(store: Store) -> None:
    chat, _ = talk(store, f"return x{END}")
    pieces = chat.say("def?")
    said = next(pieces)
    pieces.close()
    assert (chat.messages[-1], chat.ended) == ({"role": "assistant", "content": said}, "interrupted")
    pieces = chat.say("more?")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    chat.sampler.model.embedding.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(pieces)
    # Nothing was said, so nothing was asked.
    assert chat.messages[-1] == {"role": "assistant", "content": said}


def test_a_chat_that_outgrows_the_model_is_told_and_not_cut(store: Store) -> None:
    chat, _ = talk(store, "x" * 500)
    question = "a?" * 10
    asked = [*chat.messages, {"role": "user", "content": question}]
    room = 128 - len(tokens_of(TEMPLATE.render(asked, add_generation_prompt=True)))
    assert "".join(chat.say(question)) == "x" * room and chat.ended == "full"
    before = chat.messages
    with pytest.raises(ConfigError, match=r"the chat has \d+ tokens with this turn, and the model reads 128 with its"):
        next(chat.say("and?"))
    assert chat.messages == before
    chat.reset()
    chat, _ = talk(store, "x" * 500, max_new_tokens=3)
    assert "".join(chat.say("a?")) == "xxx" and chat.ended == "length"


def test_what_a_template_puts_after_an_answer_ends_one() -> None:
    assert TEMPLATE.answer_end() == END
    assert (
        ChatTemplate({"default": "{% for m in messages %}[{{ m.content }}]\nnext {% endfor %}"}, {}).answer_end() == "]"
    )
    assert ChatTemplate({"default": "{{ messages[-1].content }}"}, {}).answer_end() == ""


def test_a_turn_that_the_template_refuses_is_told(store: Store) -> None:
    chat = Chat(
        open_chat(store.url, Drawing()).sampler, ChatTemplate({"default": ONE_TURN}, {}), Drawing(2, temperature=0)
    )
    scripted(chat.sampler, "xxxx")
    assert list(chat.say("a")) == ["x", "x"]
    with pytest.raises(ConfigError, match="the run's chat template refuses this turn: no more"):
        next(chat.say("b"))
    assert len(chat.messages) == 2


def test_a_run_without_a_template_cannot_be_talked_to(store: Store) -> None:
    store.delete(OWN_NAME)
    with pytest.raises(ConfigError, match="has no chat template, so how a chat is written for its model is not known"):
        open_chat(store.url, Drawing())
    # That of an imported model.
    kept = {"config.json": "{}", "chat_template.jinja": "{{ messages[-1].content }}"}
    store.replace(KEPT_NAME, json.dumps(kept).encode())
    chat = open_chat(store.url, Drawing(2, temperature=0))
    scripted(chat.sampler, "xx")
    assert list(chat.say("a")) == ["x", "x"]


def test_bytes_that_are_no_text_are_refused(store: Store) -> None:
    chat, _ = talk(store, "")
    with pytest.raises(ConfigError, match="holds bytes that are no UTF-8; check the locale"):
        next(chat.say("d\udcff"))
    assert len(chat.messages) == 1


def test_the_sdk_talks(store: Store, tmp_path: Path) -> None:
    chat = find_run("first", tmp_path / "runs").chat(system="Hi.", temperature=0, max_new_tokens=1)
    scripted(chat.sampler, "x")
    assert list(chat.say("a")) == ["x"] and chat.messages[0]["content"] == "Hi."


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def typed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """`raynium chat first` with these lines typed and these answers."""
    monkeypatch.chdir(tmp_path)

    def run(lines: str, answers: str, *options: str, interrupt_after: int | None = None) -> Ended:
        def open_scripted(*arguments: Any, **named: Any) -> Chat:
            chat = open_chat(*arguments, **named)
            seen = scripted(chat.sampler, answers)

            def interrupt(*_: Any) -> None:
                nonlocal interrupt_after
                if len(seen) == interrupt_after:
                    interrupt_after = None
                    raise KeyboardInterrupt

            chat.sampler.model.embedding.register_forward_pre_hook(interrupt)
            return chat

        monkeypatch.setattr(module, "open_chat", open_scripted)
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return run_command("chat", "first", "--temperature", "0", *options, monkeypatch=monkeypatch, capsys=capsys)

    return run


def test_a_chat_at_the_terminal(typed: Callable[..., Ended], tmp_path: Path) -> None:
    lines = (
        "def?\n\n/system Be kind.\n /x is text\n/save talk.jsonl\n/reset\n/save talk.jsonl\n/nonsense\n/help\n/save\n"
    )
    ended = typed(lines, f"return{END}naïve{END}", "--system", "Be brief.")
    assert (ended.code, ended.err) == (0, "")
    shown = ended.out.splitlines()
    assert shown[:5] == [
        "first@4, which reads 128 tokens; /help says what you can do",
        "return",
        "(the system says that from now on)",
        "naïve",
        "(appended to talk.jsonl)",
    ]
    assert shown[5:7] == ["(a new chat)", "(appended to talk.jsonl)"]
    assert shown[7] == "'/nonsense' is no command." and sum(line.startswith("/save FILE") for line in shown) == 3
    first, second = (json.loads(line) for line in (tmp_path / "talk.jsonl").read_text().splitlines())
    assert [each["content"] for each in first["messages"]] == ["Be kind.", "def?", "return", " /x is text", "naïve"]
    assert [each["content"] for each in second["messages"]] == ["Be kind."]


def test_an_interrupt_ends_the_answer_and_not_the_chat(typed: Callable[..., Ended]) -> None:
    ended = typed("def?\nmain?\n", f"xyz{END}", interrupt_after=2)
    assert ended.code == 0
    assert ended.out.splitlines()[1:] == ["xy", "(interrupted)", "z"]


def test_what_goes_wrong_in_a_chat_is_told_and_the_chat_goes_on(typed: Callable[..., Ended]) -> None:
    ended = typed(f"{'a?' * 80}\n/save no/where\nb?\n", "x" * 500, "--max-new-tokens", "2")
    assert "with its answer: begin a new one" in ended.err and "no/where cannot be written: No such file" in ended.err
    assert ended.out.splitlines()[1:] == ["xx", "(cut off: --max-new-tokens makes answers longer)"]
    ended = typed("b?\n", "x" * 500)
    assert (
        ended.out.splitlines()[2] == "(cut off: the chat has the 128 tokens that the model reads; /reset begins anew)"
    )
    ended = typed("b?\n", "x" * 500, "--top-p", "0")
    assert ended.code == 2 and "top_p is 0.0" in ended.err
