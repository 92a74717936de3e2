"""Chat templates: the same text and the same masks as transformers, or a refusal that says what to do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from raynium.data.records.chats import rendered_chat
from raynium.data.records.formats import RecordError
from raynium.data.records.template import CHATML, ChatTemplate, TemplateRefusal
from raynium.data.tokenizer import Tokenizer, beside
from raynium.errors import DataError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
SPECIAL = (
    *("<|endoftext|>", *TOKENS.values(), "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eot_id|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "[INST]", "[/INST]"),
)
# Written from their documented form.
WRITTEN = ("chatml", "llama2", "mistral", "smollm2", "zephyr")
# As TRL ships the originals, and with the marks that it adds to train on them.
ORIGINALS = ("llama3", "llama3_1", "phi3", "qwen2_5", "qwen3", "qwen3_instruct_2507", "gemma")
MARKED = ("llama3_training", "phi3_training", "qwen2_5_training", "qwen3_training", "qwen3_instruct_2507_training")
WITH_TOOLS = ("llama3_1", "qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen2_5_training", "qwen3_training")
WITHOUT_SYSTEM = ("mistral", "gemma")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'The weather of a <place> & "day"; é',
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich", "days": 3}}}


def template_text(name: str) -> str:
    if name in WRITTEN:
        return (Path(__file__).parent / f"fixtures/chat_templates/{name}.jinja").read_text(encoding="utf-8")
    trl = pytest.importorskip("trl")
    return (Path(trl.__file__).parent / f"chat_templates/{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A byte-level tokenizer with the special tokens of all families."""
    path = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(list(SPECIAL))
    (path / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **TOKENS}), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


PLAIN = [
    say("system", "Be brief."),
    say("user", "  Hello, 世界!\n"),
    say("assistant", "Hi 👋"),
    say("user", "2 + 2?"),
    say("assistant", "4."),
]
THINKING = [
    say("user", "Which is larger?"),
    say("assistant", "<think>\nwell\n</think>\n\nThe first.", reasoning_content=None),
    say("user", "Why?"),
    say("assistant", "It is.", reasoning_content="Hm."),
]
USING_TOOLS = [
    say("system", "Use tools."),
    say("user", "Weather?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    say("tool", '{"sky": "grey"}', name="weather"),
    say("assistant", "Grey."),
    say("user", "Thanks"),
    say("assistant", "Bye"),
]


def fitting(name: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for each in messages if not (name in WITHOUT_SYSTEM and each["role"] == "system")]


@pytest.mark.parity
@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("chat", ["plain", "thinking", "tools"])
@pytest.mark.parametrize("name", [*WRITTEN, *ORIGINALS, *MARKED])
def test_the_text_is_that_of_transformers(name, chat, add_generation_prompt, folder, theirs):
    if chat == "tools" and name not in WITH_TOOLS:
        pytest.skip("a family without tools")
    messages = fitting(name, {"plain": PLAIN, "thinking": THINKING, "tools": USING_TOOLS}[chat])
    tools = TOOLS if chat == "tools" else None
    text = template_text(name)
    ours = ChatTemplate({"default": text}, TOKENS).render(messages, tools, add_generation_prompt=add_generation_prompt)
    asked = {"chat_template": text, "add_generation_prompt": add_generation_prompt, "tools": tools}
    assert ours == theirs.apply_chat_template(messages, tokenize=False, **asked)
    [(ids, _)] = Tokenizer.load(folder).encode_markup([ours])
    assert ids.tolist() == theirs.apply_chat_template(messages, **asked)["input_ids"]


def labels_of(tokenizer: Tokenizer, template: ChatTemplate, messages: Any, tools: Any) -> list[int]:
    rendered = rendered_chat(template, messages, tools, "all")
    [(_, places)] = tokenizer.encode_markup([rendered.text])
    labels = np.zeros(len(places), bool)
    for begin, end in rendered.labels:
        labels |= (places[:, 0] < end) & (places[:, 1] > begin)
    return labels.astype(int).tolist()


@pytest.mark.parity
@pytest.mark.parametrize("chat", ["plain", "thinking", "tools"])
@pytest.mark.parametrize("name", MARKED)
def test_the_masks_of_a_marked_template_are_those_of_transformers(name, chat, folder, theirs):
    if chat == "tools" and name not in WITH_TOOLS:
        pytest.skip("a family without tools")
    messages = {"plain": PLAIN, "thinking": THINKING, "tools": USING_TOOLS}[chat]
    tools = TOOLS if chat == "tools" else None
    text = template_text(name)
    known = theirs.apply_chat_template(
        messages, chat_template=text, tools=tools, return_assistant_tokens_mask=True, return_dict=True
    )["assistant_masks"]
    assert labels_of(Tokenizer.load(folder), ChatTemplate({"default": text}, TOKENS), messages, tools) == known


CONTENTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@st.composite
def conversations(draw) -> list[dict[str, Any]]:
    messages = [say("system", draw(CONTENTS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages += [say("user", draw(CONTENTS)), say("assistant", draw(CONTENTS))]
    return messages


@pytest.mark.parity
@settings(max_examples=60, deadline=None)
@given(messages=conversations(), name=st.sampled_from(("chatml", "llama3_training", "qwen2_5_training")))
def test_any_conversation_has_the_text_and_masks_of_transformers(messages, name, folder, theirs):
    text = CHATML if name == "chatml" else template_text(name)
    template = ChatTemplate({"default": text}, TOKENS)
    found = theirs.apply_chat_template(
        messages, chat_template=text, return_assistant_tokens_mask=True, return_dict=True
    )
    [(ids, _)] = Tokenizer.load(folder).encode_markup([template.render(messages)])
    assert ids.tolist() == found["input_ids"]
    assert labels_of(Tokenizer.load(folder), template, messages, None) == found["assistant_masks"]


@pytest.mark.parametrize("name", ["chatml", "llama2", "mistral", "smollm2", "zephyr", "llama3", "qwen2_5"])
def test_without_marks_the_labels_are_what_each_turn_adds(name, folder):
    messages = fitting(name, PLAIN)
    rendered = rendered_chat(ChatTemplate({"default": template_text(name)}, TOKENS), messages, None, "all")
    learned = [rendered.text[begin:end] for begin, end in rendered.labels]
    assert len(learned) == 2
    assert "Hi 👋" in learned[0] and "4." in learned[1]
    assert not any(word in "".join(learned) for word in ("Hello", "2 + 2", "brief", "user", "INST"))
    last = rendered_chat(ChatTemplate({"default": template_text(name)}, TOKENS), messages, None, "last")
    assert last.labels == rendered.labels[1:]


def test_a_template_that_leaves_out_earlier_thinking_is_refused_with_the_remedy(folder):
    template = ChatTemplate({"default": template_text("qwen3")}, TOKENS)
    with pytest.raises(RecordError, match=r"renders the chat up to message 1 .* otherwise .* data\.train_on to last"):
        rendered_chat(template, THINKING, None, "all")
    rendered = rendered_chat(template, THINKING, None, "last")
    [(begin, end)] = rendered.labels
    assert rendered.text[begin:end] == "<think>\nHm.\n</think>\n\nIt is.<|im_end|>\n"


def test_a_template_that_asks_otherwise_than_it_renders_is_refused():
    text = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}[go]{% endif %}"
    )
    with pytest.raises(RecordError, match=r"renders message 1 .* otherwise than it asks for it"):
        rendered_chat(ChatTemplate({"default": text}, {}), [say("user", "a"), say("assistant", "b")], None, "all")


def test_marks_that_miss_what_the_assistant_says_are_refused():
    text = "{% for m in messages %}{{ m.content }}{% else %}{% generation %}x{% endgeneration %}{% endfor %}"
    with pytest.raises(RecordError, match="none around what this chat's assistant says"):
        rendered_chat(ChatTemplate({"default": text}, {}), [say("user", "a"), say("assistant", "b")], None, "all")


def test_of_a_marked_template_the_last_turn_alone_may_be_learned():
    rendered = rendered_chat(ChatTemplate({"default": CHATML}, {}), PLAIN, None, "last")
    assert [rendered.text[begin:end] for begin, end in rendered.labels] == ["4.<|im_end|>"]


def test_a_template_runs_in_a_sandbox():
    for text in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}"):
        with pytest.raises(TemplateRefusal):
            ChatTemplate({"default": text}, {}).render([say("user", "a")])


def test_a_folder_says_its_template_in_either_file_and_by_name(folder, tmp_path):
    read, _ = beside(tmp_path)
    assert ChatTemplate.load(read, "here") is None
    config = {"chat_template": "{{ bos_token }}one", "bos_token": {"content": "<s>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    template = ChatTemplate.load(read, "here")
    assert template is not None and template.render([]) == "<s>one"
    listed = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}), encoding="utf-8")
    template = ChatTemplate.load(read, "here")
    assert template is not None
    assert (template.render([]), template.render([], TOOLS)) == ("plain", "tools")
    (tmp_path / "chat_template.jinja").write_text("from the file", encoding="utf-8")
    template = ChatTemplate.load(read, "here")
    assert template is not None and template.render([]) == "from the file"
    # As a store and a run keep it.
    (tmp_path / "chat-template.json").write_bytes(ChatTemplate({"default": "kept"}, {}).to_json())
    template = ChatTemplate.load(read, "here")
    assert template is not None and template.render([]) == "kept"


def test_several_templates_and_no_default_are_refused():
    with pytest.raises(
        DataError, match=r"chat templates rag, tool_use, and none that is the default: .*data\.chat_temp"
    ):
        ChatTemplate({"tool_use": "a", "rag": "b"}, {}).render([])


def test_a_damaged_tokenizer_config_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"here/tokenizer_config\.json is not JSON"):
        ChatTemplate.load(beside(tmp_path)[0], "here")
