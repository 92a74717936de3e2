"""Stores of records: flags that say what is learned, packed and single rows of them, and what a bad record costs."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from raynium.config.schema import DataSection
from raynium.data.batch import IGNORED_LABEL
from raynium.data.build.store_build import build_store
from raynium.data.evaluation import evaluation_set
from raynium.data.packed_index import ensure_index
from raynium.data.packing.rows import PackedRows
from raynium.data.records.flags import begins_document, flagged, is_label, token_ids
from raynium.data.records.registry import records_of
from raynium.data.rows import open_rows, packable
from raynium.data.store import DocumentStore
from raynium.errors import DataError


def chat(number: int, turns: int = 1) -> dict[str, object]:
    messages = []
    for turn in range(turns):
        messages += [
            {"role": "user", "content": f"what is {number} and {turn}?"},
            {"role": "assistant", "content": f"it is {number + turn}"},
        ]
    return {"messages": messages}


def write_lines(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return path


def chats_store(folder: Path, records: list[dict[str, object]] | None = None) -> DocumentStore:
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
    assert facts["cut_tokens"] + facts["left_out_tokens"] + rows.index.filled == num_labels


def test_a_chat_longer_than_a_row_is_refused_where_the_config_says_so(tmp_path):
    store = chats_store(tmp_path)
    with pytest.raises(DataError, match=r"data\.too_long is refuse; set data\.seq_len to"):
        open_rows(store, section(store, seq_len=64, too_long="refuse"))


def test_records_are_not_cut_into_windows(tmp_path):
    store = chats_store(tmp_path)
    with pytest.raises(DataError, match=r"data\.packing is stream, and .* holds chats"):
        open_rows(store, section(store, seq_len=64, packing="stream"))
