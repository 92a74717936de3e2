"""Stores of records: flags that say what is learned, packed and single rows of them, and what a bad record costs."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from raynium.cli.data import _fields
from raynium.config.schema import DataSection
from raynium.data.batch import IGNORED_LABEL
from raynium.data.build.prepare import check_data
from raynium.data.build.show import describe
from raynium.data.build.store_build import build_store
from raynium.data.evaluation import evaluation_set
from raynium.data.packed_index import ensure_index
from raynium.data.packing.rows import PackedRows
from raynium.data.records.flags import begins_document, flagged, is_label, token_ids
from raynium.data.records.formats import FieldOf, Rendered
from raynium.data.records.registry import records_of
from raynium.data.records.template import CHATML
from raynium.data.rows import open_rows, packable
from raynium.data.store import DocumentStore
from raynium.data.tokenizer import Tokenizer
from raynium.errors import ConfigError, DataError


def chat(number: int, turns: int = 1) -> dict[str, Any]:
    messages = []
    for turn in range(turns):
        messages += [
            {"role": "user", "content": f"what is {number} and {turn}?"},
            {"role": "assistant", "content": f"it is {number + turn}"},
        ]
    return {"messages": messages}


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return path


def chats_store(folder: Path, records: list[dict[str, Any]] | None = None) -> DocumentStore:
    source = write_lines(folder / "chats.jsonl", records or [chat(number, 1 + number % 3) for number in range(60)])
    return build_store(
        folder / "store",
        source=str(source),
        vocab_size=400,
        heldout_fraction=0.2,
        records=records_of("chats", chat_template="chatml"),
    )


def section(store: DocumentStore, **fields: object) -> DataSection:
    return DataSection.model_validate({"path": str(store.path), "packing": "documents", "records": "chats", **fields})


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_flags_leave_the_tokens_as_they_are(dtype):
    tokens, labels = np.array([3, 0, 2**14 - 1, 7]), np.array([True, False, True, False])
    stored = flagged(tokens, labels, np.dtype(dtype))
    assert stored.dtype == np.dtype(dtype)
    assert token_ids(stored).tolist() == tokens.tolist()
    assert begins_document(stored).tolist() == [True, False, False, False]
    # The first token has nothing before it.
    assert is_label(stored).tolist() == [False, False, True, False]


def test_of_a_chat_what_the_assistant_says_is_learned(tmp_path):
    store = chats_store(tmp_path)
    tokenizer = store.tokenizer()
    stream = store.train_stream()
    stored = stream.read(0, len(stream))
    begins = [*np.flatnonzero(begins_document(stored)).tolist(), len(stored)]
    assert len(begins) - 1 == store.manifest.train.documents
    for begin, end in pairwise(begins[:3]):
        of_chat = stored[begin:end]
        text = tokenizer.decode(token_ids(of_chat))
        assert text.startswith("<|im_start|>user\nwhat is ")
        learned = tokenizer.decode(token_ids(of_chat)[is_label(of_chat)])
        assert learned.count("<|im_end|>") == text.count("<|im_start|>assistant")
        assert learned.startswith("it is ") and "what" not in learned


def test_packed_rows_hold_whole_chats_with_what_is_no_label_masked(tmp_path):
    store = chats_store(tmp_path)
    stream = store.train_stream()
    rows = open_rows(store, section(store, seq_len=96))
    columns = rows.read(np.arange(len(rows)))
    stored = stream.read(0, len(stream))
    num_labels = int(is_label(stored).sum())
    assert (columns["labels"] != IGNORED_LABEL).sum() == num_labels
    assert columns["tokens"].max() < store.manifest.vocab_size
    begin_of_turn = store.tokenizer().encode_markup(["<|im_start|>"])[0][0][0]
    for row in range(len(rows)):
        documents = columns["documents"][row]
        for document in range(documents.max() + 1):
            tokens, labels = (columns[name][row][documents == document] for name in ("tokens", "labels"))
            if (labels == IGNORED_LABEL).all():
                continue
            assert tokens[0] == begin_of_turn
            known = labels != IGNORED_LABEL
            assert (tokens[1:][known[:-1]] == labels[:-1][known[:-1]]).all()


def test_evaluation_counts_the_labels_of_held_out_chats(tmp_path):
    store = chats_store(tmp_path)
    held_out = evaluation_set(store, seq_len=32, batch_size=4, data_rank=0, data_size=1)
    stored = store.heldout_stream().read(0, len(store.heldout_stream()))
    assert held_out.num_tokens == int(is_label(stored).sum()) > 0
    counted = sum(int((batch.labels_BT != IGNORED_LABEL).sum()) for batch in held_out.batches)
    assert counted == held_out.num_tokens
    assert max(int(batch.tokens_BT.max()) for batch in held_out.batches) < store.manifest.vocab_size


@pytest.mark.parametrize(("too_long", "counted"), [("cut", "cut"), ("leave_out", "left_out"), ("split", "split")])
def test_chats_longer_than_a_row_are_counted(tmp_path, too_long, counted):
    store = chats_store(tmp_path)
    facts = ensure_index(packable(store), section(store, seq_len=64, too_long=too_long)).index.facts()
    assert facts[counted] > 0
    assert sum(facts[name] > 0 for name in ("cut", "left_out", "split")) == 1
    rows = open_rows(store, section(store, seq_len=64, too_long=too_long))
    assert isinstance(rows, PackedRows)
    # The first token of a chat is no label.
    num_labels = len(store.train_stream()) - store.manifest.train.documents
    gone = facts["cut_tokens"] + facts["left_out_tokens"] + facts["unlearned_tokens"]
    assert gone + rows.index.filled == num_labels


@pytest.mark.parametrize("too_long", ["cut", "split"])
def test_no_row_is_without_a_label_though_a_prompt_is_longer_than_it(tmp_path, too_long):
    """Of which nothing would be learned in a step that counts (TRL#3942)."""
    chats = [
        {
            "messages": [
                {"role": "user", "content": "say it " * (40 if n % 3 else 1)},
                {"role": "assistant", "content": "it " * n},
            ]
        }
        for n in range(1, 40)
    ]
    store = chats_store(tmp_path, chats)
    data = section(store, seq_len=32, too_long=too_long)
    rows = open_rows(store, data)
    labels = rows.read(np.arange(len(rows)))["labels"]
    assert (labels != IGNORED_LABEL).any(1).all()
    index = ensure_index(packable(store), data).index
    assert index.unlearned > 0 and f"{index.unlearned:,} pieces without a label left out" in index.in_words()
    documents, trained = index.documents, store.manifest.train.documents
    if too_long == "split":
        stored = store.train_stream().read(0, len(store.train_stream()))
        # Of each chat all labels are learned, but where it begins: the token before it is not in its document.
        assert (documents, int((labels != IGNORED_LABEL).sum())) == (trained, int(is_label(stored).sum()))
    else:
        assert 0 < documents < trained and index.cut <= documents
    with pytest.raises(DataError, match=r"no document of .* fits a row, .* and no piece of one has a label; set data"):
        open_rows(store, section(store, seq_len=4, too_long="cut"))


def test_a_chat_longer_than_a_row_is_refused_where_the_config_says_so(tmp_path):
    store = chats_store(tmp_path)
    with pytest.raises(DataError, match=r"data\.too_long is refuse; set data\.seq_len to"):
        open_rows(store, section(store, seq_len=64, too_long="refuse"))


def test_records_are_not_cut_into_windows(tmp_path):
    store = chats_store(tmp_path)
    with pytest.raises(DataError, match=r"data\.packing is stream, and .* holds chats"):
        open_rows(store, section(store, seq_len=64, packing="stream"))


# ---- formats ---------------------------------------------------------------------------------------------------------


def build(folder: Path, records: list[dict[str, Any]], name: str = "chats", **how: Any) -> DocumentStore:
    source = write_lines(folder / "records.jsonl", records)
    if name == "chats":
        how.setdefault("chat_template", "chatml")
    return build_store(
        folder / "store", source=str(source), vocab_size=400, heldout_fraction=0.2, records=records_of(name, **how)
    )


def learned_and_all(store: DocumentStore) -> list[tuple[str, str]]:
    stream = store.train_stream()
    stored = stream.read(0, len(stream))
    begins = [*np.flatnonzero(begins_document(stored)).tolist(), len(stored)]
    tokenizer = store.tokenizer()
    return [
        (
            tokenizer.decode(token_ids(stored[begin:end][is_label(stored[begin:end])])),
            tokenizer.decode(token_ids(stored[begin:end])),
        )
        for begin, end in pairwise(begins)
    ]


def test_completions_are_learned_with_their_end_and_prompts_are_not(tmp_path):
    store = build(tmp_path, [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(40)], "completions")
    for learned, whole in learned_and_all(store):
        prompt, answer = whole.split(" =")
        assert learned == f"{answer}" and int(answer.removesuffix("<|endoftext|>")) == int(prompt.split()[0]) + 1
    assert store.chat_template() is None


def test_instructions_are_chats_of_one_turn_by_the_columns_that_fields_names(tmp_path):
    records = [
        {"instruction": f"Add {n}.", "input": "to 1" if n % 2 else "", "output": f"{n + 1}", "more": 0}
        for n in range(40)
    ]
    fields = {"prompt": ["instruction", "input"], "completion": ["output"]}
    store = build(tmp_path, records, fields=fields)
    found = learned_and_all(store)
    wholes = {whole for _, whole in found}
    assert any("Add 2.<|im_end|>" in whole for whole in wholes) or any("Add 4.<|im_end|>" in each for each in wholes)
    assert any("\n\nto 1<|im_end|>" in whole for whole in wholes)
    assert all(learned.removesuffix("<|im_end|>").isdecimal() for learned, _ in found)
    assert store.manifest.recipe.records is not None
    assert store.manifest.recipe.records.fields["prompt"] == ["instruction", "input"]


def test_rows_of_a_table_are_the_records_that_lines_are(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    chats = [chat(number, 1 + number % 3) for number in range(60)]
    of_lines = chats_store(tmp_path, chats)
    (tmp_path / "table").mkdir()
    pq.write_table(pa.Table.from_pylist(chats), tmp_path / "table/chats.parquet")
    records = records_of("chats", chat_template="chatml")
    assert records is not None
    from raynium.data.text.documents import Document
    from raynium.data.text.sources import open_source

    texts = [
        [item.text for item in open_source(str(source), columns=records.columns).items() if isinstance(item, Document)]
        for source in (tmp_path / "chats.jsonl", tmp_path / "table/chats.parquet")
    ]
    assert [json.loads(text) for text in texts[0]] == [json.loads(text) for text in texts[1]] == chats
    assert of_lines.manifest.train.documents + of_lines.manifest.heldout.documents == len(chats)


def test_numbers_in_a_record_stay_what_they_are(tmp_path):
    call = {"function": {"name": "f", "arguments": {"count": 3, "share": 0.5, "large": 10**30}}}
    record = {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}
    from raynium.data.text.documents import Document
    from raynium.data.text.sources import open_source

    source = write_lines(tmp_path / "calls.jsonl", [record])
    records = records_of("chats", chat_template="chatml")
    assert records is not None
    [item] = open_source(str(source), columns=records.columns).items()
    assert isinstance(item, Document) and json.loads(item.text) == record


GOOD = chat(1)


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (
            {"messages": [{"role": "user", "content": "a"}]},
            "has no turn of the assistant, so there is nothing",
        ),
        (
            {"messages": [{"role": "bot", "content": "a"}]},
            r"the role \"bot\": it must be one of system, devel",
        ),
        ({"messages": []}, r"messages is \[\]: it must be a list of messages"),
        ({"messages": "hello"}, r"messages is \"hello\": it must be a list of messages"),
        (
            {"messages": [{"from": "human", "value": "a"}]},
            "is an object with from, value: it must be an object",
        ),
        ({"messages": ["a"]}, r"message 0 \(from 0\) is \"a\": it must be an object with role and content"),
        ({"messages": GOOD["messages"], "tools": "["}, "tools is a text that is not JSON"),
        ({"messages": GOOD["messages"], "tools": [1]}, r"tools is \[1\]: it must be a list of JSON schemas"),
        (
            {"messages": [{"role": "assistant"}]},
            "the chat template refuses it: .* has no attribute 'content'",
        ),
        (
            {"messages": [{"role": "user", "content": 5}, *GOOD["messages"]]},
            r"message 0 \(from 0\) has the content 5: it must be a text",
        ),
        ({"conversation": GOOD["messages"]}, "no field 'messages'; there are: 'conversation'"),
        ([1], "a list, and a document is an object with its text in 'messages'"),
    ],
)
def test_a_bad_chat_is_refused_with_its_line(tmp_path, bad, problem):
    with pytest.raises(DataError, match=rf"records\.jsonl, line 31: .*{problem}"):
        build(tmp_path, [*(chat(number) for number in range(30)), bad])
    assert not (tmp_path / "store/manifest.json").exists()


def test_a_role_that_the_template_refuses_is_told_in_its_words(tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "{{ m.content }}|{% endfor %}",
        encoding="utf-8",
    )
    messages = [*GOOD["messages"], {"role": "tool", "content": "x"}]
    with pytest.raises(DataError, match="line 1: the chat template refuses it: no tools here"):
        build(tmp_path, [{"messages": messages}], chat_template=str(template))


PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("marks", ["", "{% generation %}{{ m.content }}{% endgeneration %}"])
def test_parts_that_a_template_of_texts_would_write_as_python_are_refused(tmp_path, marks):
    template = tmp_path / "template.jinja"
    shown = "{% if m.role == 'assistant' %}" + (marks or "{{ m.content }}") + "{% else %}{{ m.content }}{% endif %}"
    template.write_text("{% for m in messages %}" + shown + "|{% endfor %}", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1: message 0 \(from 0\) has a list of parts .* takes texts alone"):
        build(tmp_path, [{"messages": PARTS}], chat_template=str(template))


def test_parts_are_learned_where_the_template_takes_them(tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}|{% endfor %}",
        encoding="utf-8",
    )
    store = build(tmp_path, [{"messages": PARTS}] * 20, chat_template=str(template))
    assert {whole for _, whole in learned_and_all(store)} == {"a|b|"}


def test_a_template_may_lie_at_a_url(tmp_path):
    text = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    (tmp_path / "template.jinja").write_text(text, encoding="utf-8")
    url = f"file://{tmp_path}/template.jinja"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    store = build(tmp_path, [{"messages": turns}] * 20, chat_template=url)
    assert {whole for _, whole in learned_and_all(store)} == {"a|b|"}
    with pytest.raises(DataError, match=rf"data\.chat_template = '{url}x' cannot be read"):
        records_of("chats", chat_template=f"{url}x")


def test_chatml_for_a_tokenizer_without_its_tokens_is_refused(tmp_path):
    source = write_lines(tmp_path / "chats.jsonl", [chat(number) for number in range(60)])
    data = {"path": str(tmp_path / "store"), "source": str(source), "packing": "documents", "records": "chats"}
    data |= {"tokenizer": str(tmp_path / "tokenizer.json"), "chat_template": "chatml", "heldout_fraction": 0.2}
    plain = Tokenizer.train(["it is"], vocab_size=300, special_tokens=["<|im_start|>"])
    (tmp_path / "tokenizer.json").write_text(plain.file_text, encoding="utf-8")
    told = r"has no token <\|im_end\|>: set model\.add_tokens to '<\|im_end\|>', or give a template"
    with pytest.raises(DataError, match=told):
        check_data(DataSection.model_validate(data), model_vocab_size=300, tell=print)
    whole = Tokenizer.train(["it is"], vocab_size=300, special_tokens=["<|im_start|>", "<|im_end|>"])
    (tmp_path / "tokenizer.json").write_text(whole.file_text, encoding="utf-8")
    assert check_data(DataSection.model_validate(data), model_vocab_size=300, tell=print) is not None


def test_a_record_of_which_nothing_is_learned_is_refused(tmp_path):
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "template.jinja").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1: of its 1 tokens none is learned"):
        build(
            tmp_path,
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}] * 20,
            chat_template=str(tmp_path / "template.jinja"),
        )


def test_texts_alone_are_joined_to_a_prompt(tmp_path):
    fields = {"prompt": ["instruction", "input"], "completion": ["output"]}
    with pytest.raises(DataError, match="line 1: 'input' is a number, and only texts are joined to a prompt"):
        build(tmp_path, [{"instruction": "a", "input": 1, "output": "b"}], fields=fields)


@pytest.mark.parametrize(
    ("records", "how", "problem"),
    [
        ("chats", {}, r"the tokenizer has no chat template .* give the file of one as data\.chat_template, or chatml"),
        ("chat", {}, r"data\.records is 'chat': did you mean chats\?"),
        ("chats", {"chat_template": "/no/such.jinja"}, r"data\.chat_template = '/no/such\.jinja' cannot be read"),
        ("completions", {"chat_template": "chatml"}, r"data\.chat_template is for chats, and data\.records is complet"),
        ("completions", {"fields": {"messages": ["a"]}}, "data.fields names messages, which completions do not have"),
        ("text", {"fields": {"prompt": ["a"]}}, r"data\.fields is for records, and data\.records is text"),
        ("json:JSONDecoder", {}, "has no fields, render, sequences: see docs/tasks.md"),
    ],
)
def test_records_that_cannot_be_had_are_refused(records, how, problem):
    with pytest.raises((ConfigError, DataError), match=problem):
        records_of(records, **how)


class TwoOfOne:
    sequences = 1
    fields = (FieldOf("a", True),)

    def render(self, record):
        return [Rendered("x y", ((1, 3),), markup=False, ends=False)] * 2


def test_a_format_that_makes_more_than_it_says_is_refused():
    from raynium.data.build.recorded import render
    from raynium.data.text.documents import Document, Part, SourceFile, Split

    file = SourceFile("a.json", "a.json", 1, "json", "", "")
    with pytest.raises(DataError, match=r"a\.json, row 0 \(from 0\): the format makes 2 documents of it, and says 1"):
        render(TwoOfOne(), Document("a.json:0", "{}"), Split((Part(file, 0, 1),), (), None))


def test_data_show_marks_what_is_learned(tmp_path):
    rows = describe(str(chats_store(tmp_path).path))
    samples = [value for name, value in rows if name == "sample"]
    assert samples and all("assistant\\n[[it is" in sample and "<|im_end|>]]" in sample for sample in samples)
    assert ("recipe", "chats (messages from messages, tools from tools), all answers learned") in [
        (name, value.partition(", 0.2")[0]) for name, value in rows
    ]


def test_a_store_of_another_template_or_other_turns_is_refused_by_the_field_that_differs(tmp_path):
    store = chats_store(tmp_path)
    data = {"path": str(store.path), "source": str(tmp_path / "chats.jsonl"), "packing": "documents"}
    data |= {"records": "chats", "heldout_fraction": 0.2}
    for changed, told in [
        (
            {"chat_template": "chatml", "train_on": "last"},
            r"built with data\.train_on = 'all', the config says 'last'; set",
        ),
        (
            {"chat_template": str(write_template(tmp_path))},
            r"data\.chat_template = 'a template with the sha256 \w{12}…', the config says 'a template with the sha256",
        ),
    ]:
        with pytest.raises(DataError, match=told):
            check_data(DataSection.model_validate(data | changed), model_vocab_size=400, tell=print)


def write_template(folder: Path) -> Path:
    (folder / "template.jinja").write_text("{{ messages[-1].content }}", encoding="utf-8")
    return folder / "template.jinja"


@pytest.mark.ray
def test_the_command_builds_a_store_of_chats(tmp_path):
    from raynium.launch.data.build import build_data

    source = write_lines(tmp_path / "talk.jsonl", [{"talk": chat(number)["messages"]} for number in range(60)])
    tokenizer = chats_store(tmp_path).tokenizer()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer.file_text, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    told: list[str] = []
    how: dict[str, Any] = {"records": "chats", "fields": {"messages": ["talk"]}, "tell": told.append}
    place = str(tmp_path / "built")
    manifest = build_data(place, sources=[str(source)], tokenizer=str(folder), heldout_fraction=0.2, **how)
    assert manifest.flagged and manifest.recipe.records is not None
    assert manifest.recipe.records.fields["messages"] == ["talk"]
    with pytest.raises(DataError, match="was built with records ="):
        build_data(place, sources=[str(source)], tokenizer=str(folder), heldout_fraction=0.2, train_on="last", **how)


def test_a_field_of_the_command_is_a_name_and_its_columns():
    assert _fields(["prompt=instruction,input", "completion=output"]) == {
        "prompt": ["instruction", "input"],
        "completion": ["output"],
    }
    with pytest.raises(typer.BadParameter, match="'prompt' is no NAME=COLUMN"):
        _fields(["prompt"])
