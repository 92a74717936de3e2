"""Documents packed into rows: what lies where, the index that says so, and rows against a plain reading of the text."""

import json
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raynium.config.schema import DataSection
from raynium.data import packed_index
from raynium.data.batch import IGNORED_LABEL
from raynium.data.build.store_build import build_store
from raynium.data.packed_index import Packable, ensure_index
from raynium.data.packing import packer
from raynium.data.packing.index import INDEX_NAME, PackedIndex, PartFacts, index_key
from raynium.data.packing.packer import PackedPart, TooLong, num_parts, pack_part
from raynium.data.packing.rows import PackedRows
from raynium.data.rows import open_rows, packable
from raynium.data.store import DocumentStore, open_store
from raynium.errors import DataError, StoreError
from raynium.storage.file_store import FileBackend
from raynium.storage.store import Store

END = 0


class Text:
    """A stream in memory."""

    def __init__(self, tokens: np.ndarray):
        self.tokens = tokens

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.tokens.dtype

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, length: int) -> np.ndarray:
        assert 0 <= start < start + length <= len(self.tokens)
        return self.tokens[start : start + length]

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        raise AssertionError("rows of documents are no windows")


def text_of(lengths: list[int]) -> Text:
    """Documents of so many tokens, their ends counted."""
    return Text(np.concatenate([np.r_[np.arange(1, length) % 500 + 1, END] for length in lengths]))


def pack(text: Text, seq_len: int, too_long: TooLong = "split") -> list[PackedPart]:
    numbers = range(num_parts(len(text), seq_len))
    return [pack_part(text, n, seq_len=seq_len, too_long=too_long, end_of_document=END) for n in numbers]


def rows_of(part: PackedPart) -> list[list[tuple[int, int]]]:
    return [[(a, n) for a, n in part.pieces[b:e].tolist()] for b, e in pairwise(part.row_begins.tolist())]


# ---- What lies in a row ----------------------------------------------------------------------------------------------


def test_a_document_goes_where_the_least_space_still_holds_it() -> None:
    """8 alone; 6 and 2; 5 and 3; the second 2 finds no space. In the order of the stream."""
    [part] = pack(text_of([2, 6, 5, 8, 3, 2]), seq_len=8)
    assert rows_of(part) == [[(0, 2), (2, 6)], [(8, 5), (21, 3)], [(13, 8)], [(24, 2)]]
    assert (part.documents, part.split, part.left_out, part.shortest) == (6, 0, 0, 2)


def test_a_document_that_is_too_long_is_cut_or_left_out_as_one_says() -> None:
    text = text_of([3, 20, 4])
    [cut] = pack(text, seq_len=8)
    assert rows_of(cut) == [[(0, 3)], [(3, 8)], [(11, 8)], [(19, 4), (23, 4)]]
    assert (cut.documents, cut.split, cut.left_out) == (3, 1, 0)
    [left] = pack(text, 8, "leave_out")
    assert rows_of(left) == [[(0, 3), (23, 4)]]
    assert (left.documents, left.split, left.left_out, left.left_out_tokens) == (2, 0, 1, 20)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packer, "window_tokens", lambda seq_len: 64)
    monkeypatch.setattr(packer, "PART_TOKENS", 192)
    monkeypatch.setattr(packer, "_CHUNK_TOKENS", 50)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=60), st.integers(1, 40), st.sampled_from(["split", "leave_out"])
)
def test_every_token_is_a_label_once_and_no_row_is_empty_or_too_long(
    lengths: list[int], seq_len: int, too_long: TooLong
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        small_windows.__wrapped__(patch)  # pyright: ignore[reportFunctionMemberAccess]
        parts = pack(text_of(lengths), seq_len, too_long)
    labels = [0] * sum(lengths)
    for part in parts:
        for row in rows_of(part):
            assert 0 < sum(length for _, length in row) <= seq_len
            assert row == sorted(row)
            windows = {begin_of(lengths, place) // 64 for place, _ in row}
            assert len(windows) == 1, "documents of one window only"
            for place, length in row:
                for token in range(place, place + length):
                    labels[token] += 1
    kept = [too_long == "split" or length <= seq_len for length in lengths]
    assert labels == [int(keep) for length, keep in zip(lengths, kept, strict=True) for _ in range(length)]
    assert sum(part.documents for part in parts) == sum(kept)
    assert sum(part.left_out for part in parts) == len(kept) - sum(kept)


def begin_of(lengths: list[int], place: int) -> int:
    begins = np.cumsum([0, *lengths])
    return int(begins[np.searchsorted(begins, place, side="right") - 1])


def test_rows_are_almost_full() -> None:
    """Of documents as text has them, from a tenth of a row to several, and none is cut but the too long ones."""
    lengths = np.maximum(np.random.default_rng(1).lognormal(6, 1.2, 3000).astype(int), 1)
    for seq_len in (512, 2048, 8192):
        parts = pack(text_of(lengths.tolist()), seq_len)
        rows = sum(len(part.row_begins) - 1 for part in parts)
        assert lengths.sum() / (rows * seq_len) > 0.99
        assert sum(part.split for part in parts) == (lengths > seq_len).sum()


# ---- Rows of a store -------------------------------------------------------------------------------------------------


def source(folder: Path) -> str:
    (folder / "source").mkdir()
    for i in range(120):
        (folder / "source" / f"{i:03}.txt").write_text(f"document {i} says {i * i} and then {i**3}\n" * (i % 9 + 1))
    return str(folder / "source")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DocumentStore:
    folder = tmp_path_factory.mktemp("packing")
    return build_store(folder / "store", source=source(folder), vocab_size=300, heldout_fraction=0.1)


def section(store: DocumentStore, seq_len: int = 64, too_long: TooLong = "split") -> DataSection:
    return DataSection(path=str(store.path), seq_len=seq_len, packing="documents", too_long=too_long)


def packed(store: DocumentStore, data: DataSection) -> PackedRows:
    rows = open_rows(store, data)
    assert isinstance(rows, PackedRows)
    return rows


def documents_of(store: DocumentStore) -> list[list[int]]:
    """Each with its end."""
    stream, end = store.train_stream(), store.manifest.end_of_document_id
    documents: list[list[int]] = [[]]
    for token in stream.read(0, len(stream)).tolist():
        documents[-1].append(token)
        if token == end:
            documents.append([])
    return documents[:-1]


@pytest.mark.parametrize("seq_len", [7, 64, 1000])
def test_rows_hold_each_document_whole_with_every_token_a_label_once(store: DocumentStore, seq_len: int) -> None:
    """No document that fits is wrapped into the next row (TRL#3067, TRL#1230)."""
    rows, end = packed(store, section(store, seq_len)), store.manifest.end_of_document_id
    columns = rows.read(np.arange(len(rows)))
    assert {name: (str(each.dtype), each.shape) for name, each in columns.items()} == {
        "tokens": ("int64", (len(rows), seq_len)),
        "labels": ("int64", (len(rows), seq_len)),
        "documents": ("int32", (len(rows), seq_len)),
    }
    found: list[list[int]] = []
    cut: dict[int, list[int]] = {}
    for tokens, labels, numbers in zip(*(each.tolist() for each in columns.values()), strict=True):
        assert numbers == sorted(numbers) and set(numbers) == set(range(numbers[-1] + 1))
        assert labels[0] != IGNORED_LABEL, "no row has all its labels masked (TRL#3942)"
        for number in set(numbers):
            here = [place for place, each in enumerate(numbers) if each == number]
            its_tokens, its_labels = [tokens[i] for i in here], [labels[i] for i in here]
            if its_labels[0] == IGNORED_LABEL:
                assert set(its_labels) == {IGNORED_LABEL} and here[-1] == seq_len - 1 and set(its_tokens) == {end}
                continue
            assert its_tokens[1:] == its_labels[:-1], "each token but the last is the label before it"
            if its_tokens[0] == end and its_labels[-1] == end:
                found.append(its_labels)
            else:
                cut.setdefault(its_tokens[0], []).extend(its_labels)
    whole = documents_of(store)
    assert sorted(found) == sorted(document for document in whole if len(document) <= seq_len)
    assert sorted(token for each in cut.values() for token in each) == sorted(
        token for document in whole if len(document) > seq_len for token in document
    )
    assert rows.index.filled == sum(map(len, whole)) == (columns["labels"] != IGNORED_LABEL).sum()


def test_a_later_piece_of_a_long_document_begins_on_the_token_before_it(store: DocumentStore) -> None:
    rows, stream = packed(store, section(store, seq_len=7)), store.train_stream()
    columns = rows.read(np.arange(len(rows)))
    row_begins, pieces = rows._part(0)
    checked = 0
    for row in range(len(rows)):
        for place, length in pieces[row_begins[row] : row_begins[row + 1]].tolist():
            if length == 7 and place:
                assert columns["tokens"][row].tolist() == stream.read(place - 1, 7).tolist()
                checked += 1
    assert checked > 100


def test_rows_do_not_depend_on_how_a_store_is_cut_into_files(store: DocumentStore, tmp_path: Path) -> None:
    cut = build_store(
        tmp_path / "store", source=source(tmp_path), vocab_size=300, heldout_fraction=0.1, split_bytes=300
    )
    assert cut.manifest.identity == store.manifest.identity and len(cut.manifest.train_shards) > 10
    whole, rows = packed(store, section(store)), packed(cut, section(cut))
    expected = whole.read(np.arange(len(whole)))
    assert len(rows) == len(whole)
    for name, column in rows.read(np.arange(len(rows))).items():
        assert np.array_equal(column, expected[name]), name


def test_rows_may_be_asked_for_in_any_order_and_twice_and_from_any_part(
    store: DocumentStore, tmp_path: Path, small_windows: None
) -> None:
    again = build_store(tmp_path / "store", source=source(tmp_path), vocab_size=300, heldout_fraction=0.1)
    rows = packed(again, section(again))
    assert len(rows.index.rows) > 5
    whole = rows.read(np.arange(len(rows)))
    wanted = np.array([len(rows) - 1, 3, 0, 3, len(rows) // 2])
    for name, column in packed(again, section(again)).read(wanted).items():
        assert np.array_equal(column, whole[name][wanted])


def test_the_span_of_rows_is_all_that_they_are_read_from(
    store: DocumentStore, tmp_path: Path, small_windows: None
) -> None:
    again = build_store(tmp_path / "store", source=source(tmp_path), vocab_size=300, heldout_fraction=0.1)
    rows = packed(again, section(again))
    assert len(rows.index.rows) > 5 and rows.span(0, len(rows)) == (0, again.manifest.train.tokens)
    stream = packable(again).stream
    asked: list[tuple[int, int]] = []

    class Asked:
        dtype = stream.dtype

        def __len__(self) -> int:
            return len(stream)

        def read(self, start: int, length: int) -> np.ndarray:
            asked.append((start, start + length))
            return stream.read(start, length)

    index = ensure_index(packable(again), section(again))
    watched = PackedRows(Asked(), index, end_of_document=again.manifest.end_of_document_id)
    for first, end in ((0, 1), (5, 30), (len(rows) - 1, len(rows))):
        asked.clear()
        watched.read(np.arange(first, end))
        assert rows.span(first, end) == (min(begin for begin, _ in asked), max(end for _, end in asked))


def test_rows_on_both_sides_of_a_part_without_any_have_a_span(tmp_path: Path, small_windows: None) -> None:
    text = text_of([5, 600, 5])
    known = Packable(text, END, "some identity", "a store", None, [str(tmp_path)])
    rows = PackedRows(text, ensure_index(known, DataSection(path="a store", seq_len=16)), end_of_document=END)
    assert 0 in rows.index.rows[:-1] and rows.span(0, len(rows)) == (0, 610)
    assert rows.span(len(rows) - 2, len(rows)) == (5 + 36 * 16 - 1, 610)


# ---- The index -------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_an_index_is_made_once_for_each_length_and_policy_and_is_the_same_bytes_again(store: DocumentStore) -> None:
    said: list[str] = []
    made = ensure_index(packable(store), section(store, 48), tell=said.append)
    folder = store.path / "packed" / index_key(store.manifest.identity, section(store, 48))
    assert made.folder.local_path == folder and len(said) == 1
    before = contents(folder)
    assert before.keys() == {INDEX_NAME, "part-00000.bin"}
    assert ensure_index(packable(store), section(store, 48), tell=said.append).index == made.index and len(said) == 1
    assert contents(folder) == before

    (folder / INDEX_NAME).unlink()
    (folder / "part-00000.bin").write_bytes(b"half of it")
    again = ensure_index(packable(store), section(store, 48))
    assert again.index == made.index, "one that was broken off is made again"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {n: b for n, (b, _) in before.items()}
    others = [section(store, 47), section(store, 48, "leave_out")]
    assert len({ensure_index(packable(store), each).folder.url for each in others} | {made.folder.url}) == 3
    assert open_store(store.path) is not None, "and the store is none the worse for it"


def test_an_index_that_was_broken_off_goes_on_with_the_parts_that_are_whole(
    store: DocumentStore, tmp_path: Path, small_windows: None
) -> None:
    known = packable(store)._replace(homes=[str(tmp_path)])
    folder = ensure_index(known, section(store, 28)).folder.local_path
    assert folder is not None
    whole = contents(folder)
    assert len(whole) > 5
    (folder / INDEX_NAME).unlink()
    (folder / "part-00001.bin").unlink()
    flip(folder / "part-00002.bin")
    ensure_index(known, section(store, 28))
    now = contents(folder)
    assert {name: content for name, (content, _) in now.items()} == {n: b for n, (b, _) in whole.items()}
    assert {name for name in now if now[name] != whole[name]} == {INDEX_NAME, "part-00001.bin", "part-00002.bin"}


def packed_is_a_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir()
    (home / "packed").write_text("in the way")


def the_disk_is_full(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the last file is written."""
    put = FileBackend.put

    def full(self: FileBackend, key: str, data: bytes, *, exclusive: bool) -> None:
        if self.root.is_relative_to(home) and key == INDEX_NAME:
            raise StoreError(f"{self.root}/{key} cannot be written: No space left on device")
        put(self, key, data, exclusive=exclusive)

    monkeypatch.setattr(FileBackend, "put", full)


@pytest.mark.parametrize(
    ("spoil", "said"), [(packed_is_a_file, "exists|Not a directory"), (the_disk_is_full, "No space left on device")]
)
def test_where_the_index_cannot_lie_beside_the_store_the_next_place_has_it_and_else_an_error_names_them(
    spoil: Callable[[Path, pytest.MonkeyPatch], None],
    said: str,
    store: DocumentStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beside, run = tmp_path / "store", tmp_path / "run"
    spoil(beside, monkeypatch)
    there = packable(store)._replace(homes=[str(beside), str(run)])
    told: list[str] = []
    found = ensure_index(there, section(store, 29), tell=told.append)
    assert found.folder.local_path == run / "packed" / index_key(there.identity, section(store, 29))
    assert re.search(f"index of rows cannot be kept beside {beside}: .*({said})", "\n".join(told))
    assert not (beside / "packed").is_dir() or not list((beside / "packed").iterdir()), (
        "what does not fit takes no room"
    )
    told.clear()
    assert ensure_index(there, section(store, 29), tell=told.append).index == found.index and not told

    shutil.rmtree(run)
    spoil(run, monkeypatch)
    with pytest.raises(DataError, match=f"(?s)written to any of its places: .*{beside}.*({said}).*{run}.*({said})"):
        ensure_index(there, section(store, 29))


def test_where_the_scratch_folder_cannot_be_written_no_index_is_made(
    store: DocumentStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").write_text("in the way")
    monkeypatch.setattr(packed_index, "scratch_folder", lambda: tmp_path)
    with pytest.raises(DataError, match=f"{tmp_path}/data/packed, where this node keeps .* cannot be written"):
        ensure_index(packable(store), section(store, 27))


def test_what_was_packed_is_told(store: DocumentStore) -> None:
    index = ensure_index(packable(store), section(store, 64)).index
    long = [len(document) for document in documents_of(store) if len(document) > 64]
    assert index.in_words() == (
        f"{index.documents:,} documents packed into {index.num_rows:,} rows of 64, "
        f"{100 * index.efficiency:.1f} % of their positions filled, {len(long)} longer ones split"
    )
    assert 0.9 < index.efficiency <= 1
    index = ensure_index(packable(store), section(store, 64, "leave_out")).index
    assert index.facts() == {
        "rows": index.num_rows,
        "efficiency": pytest.approx(index.efficiency, abs=1e-6),
        "documents": len(documents_of(store)) - len(long),
        "split": 0,
        "left_out": len(long),
        "left_out_tokens": sum(long),
        "cut": 0,
        "cut_tokens": 0,
        "unlearned": 0,
        "unlearned_tokens": 0,
    }
    assert index.in_words().endswith(f", {len(long)} longer ones left out ({sum(long):,} tokens)")


def test_a_row_that_no_document_fits_is_an_error_that_says_the_shortest(store: DocumentStore) -> None:
    shortest = min(map(len, documents_of(store)))
    message = (
        f"data.seq_len = 3: no document of .* fits a row, the shortest has {shortest} tokens with its end; set "
        f"data.seq_len to {shortest} or more, or data.too_long to split"
    )
    with pytest.raises(DataError, match=message):
        packed(store, section(store, 3, "leave_out"))
    assert len(packed(store, section(store, 3))) > 0


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def other_counts(path: Path) -> None:
    fields = json.loads(path.read_text())
    fields["rows"][0] += 1
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("part-00000.bin", flip),
        ("part-00000.bin", Path.unlink),
        ("part-00000.bin", lambda path: path.write_bytes(b"")),
        (INDEX_NAME, other_counts),
        (INDEX_NAME, lambda path: path.write_text("{")),
    ],
)
def test_a_damaged_index_gives_out_no_row_and_says_what_to_delete(
    name: str, damage: Callable[[Path], Any], store: DocumentStore, tmp_path: Path
) -> None:
    homes = [str(tmp_path)]
    folder = ensure_index(packable(store, *homes), section(store, 33)).folder.local_path
    assert folder is not None
    damage(folder / name)
    with pytest.raises(DataError, match=f"{folder / name} is damaged.*delete .*{folder}, and it is made again"):
        open_rows(store, section(store, 33), *homes).read(np.array([0]))


def test_an_index_of_many_parts_opens_without_reading_them(tmp_path: Path) -> None:
    """A trillion tokens are 15,000 parts."""
    part = PartFacts(1000, 3000, 900, 0, 0, 0, 0, 0, 0, 0, 1, 3, 0, 7)
    index = PackedIndex.of([part] * 15_000, identity="", seq_len=4096, too_long="split")
    (tmp_path / INDEX_NAME).write_text(index.model_dump_json())
    assert PackedIndex.read(Store(tmp_path)) == index and index.num_rows == 15_000_000
