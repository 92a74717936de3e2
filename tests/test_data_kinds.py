"""Every kind of file, packed or not, gives its documents once however it is cut; and damage is named."""

import json
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raynium.data.build.survey import survey
from raynium.data.text import readers, sources
from raynium.data.text.documents import Document
from raynium.data.text.left_out import LeftOut
from raynium.data.text.sources import open_source, plan_splits, probe, read_split
from raynium.errors import DataError

pytestmark = pytest.mark.quick

Texts = list[str | None]
TEXTS = st.lists(st.none() | st.text(max_size=30) | st.sampled_from(["x" * 300, "é\r\n😀", "﻿mark"]), max_size=25)


def packed(content: bytes, compression: str) -> bytes:
    if not compression:
        return content
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, {".gz": "gzip", ".zst": "zstd"}[compression]) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def lines(texts: Texts) -> bytes:
    return b"".join(
        json.dumps({"id": n, "text": text}, ensure_ascii=False).encode() + b"\n" for n, text in enumerate(texts)
    )


def one_array(texts: Texts) -> bytes:
    return json.dumps([{"text": text} for text in texts], indent=1).encode()


def pretty(texts: Texts) -> bytes:
    return "\n".join(json.dumps({"text": text}, indent=1) for text in texts).encode()


def table(texts: Texts, kind: pa.DataType | None = None) -> pa.Table:
    return pa.table({"id": list(range(len(texts))), "text": pa.array(texts, kind or pa.string())})


def parquet(texts: Texts) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table(texts), sink, row_group_size=3)
    return sink.getvalue().to_pybytes()


def arrow(texts: Texts) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table(texts).schema) as writer:
        writer.write_table(table(texts), max_chunksize=4)
    return sink.getvalue().to_pybytes()


def arrow_file(texts: Texts) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table(texts).schema) as writer:
        writer.write_table(table(texts), max_chunksize=4)
    return sink.getvalue().to_pybytes()


KINDS: list[tuple[str, Callable[[Texts], bytes]]] = [
    *((f".jsonl{compression}", lines) for compression in ("", ".gz", ".zst")),
    *((f".json{compression}", write) for compression in ("", ".gz", ".zst") for write in (one_array, pretty, lines)),
    *((".parquet", parquet), (".arrow", arrow), (".arrow", arrow_file)),
]


@settings(max_examples=300, deadline=None)
@given(
    files=st.lists(st.tuples(st.sampled_from(KINDS), TEXTS), min_size=1, max_size=3),
    most_bytes=st.sampled_from([1, 30, 200, 1000, 10**6]),
    window=st.sampled_from([1, 7, 65_536]),
)
def test_all_kinds_give_each_text_once_under_names_that_no_cut_changes(files: Any, most_bytes: int, window: int):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_JSON_BYTES", window)
        expected: list[tuple[int, str | None]] = []
        for number, ((ending, write), texts) in enumerate(files):
            Path(folder, f"{number}{ending}").write_bytes(packed(write(texts), re.sub(r"^\.[a-z]+", "", ending)))
            # A file without a record is told as one that is empty.
            expected += [(number, text) for text in texts or [""]]
        source = open_source(folder)
        whole = [item for split in plan_splits(source) for item in read_split(split)]
        cut = [item for split in plan_splits(source, most_bytes=most_bytes) for item in read_split(split)]
    assert cut == whole and len({item.name for item in whole}) == len(whole)
    for item, (number, text) in zip(whole, expected, strict=True):
        assert item.name.startswith(f"{number}.")
        if isinstance(item, Document):
            assert item.text == text
        else:
            assert item.reason == ("null" if text is None else "empty") and text in (None, "")


@pytest.mark.parametrize("ending", [".txt.gz", ".txt.zst", ".md.GZ"])
def test_packed_text_is_cut_into_the_same_pieces_as_unpacked(tmp_path: Path, ending: str):
    text = "".join(f"Line {n} of a book, dear reader.\n" for n in range(5_000))
    (tmp_path / "book.txt").write_text(text)
    (tmp_path / f"book{ending}").write_bytes(packed(text.encode(), ending[ending.rindex(".") :].lower()))
    pieces = [list(open_source(str(path)).items()) for path in sorted(tmp_path.iterdir())]
    assert len(pieces[0]) > 5 and [item[1] for item in pieces[0]] == [item[1] for item in pieces[1]]
    [document, same] = open_source(str(tmp_path)).items()
    assert document[1] == same[1] == text


def test_names_are_files_lines_by_offset_and_rows(tmp_path: Path):
    (tmp_path / "a.jsonl.zst").write_bytes(packed(lines(["one", "two"]), ".zst"))
    (tmp_path / "b.json").write_text('[{"text": "one"}, {"text": null}]')
    (tmp_path / "c.parquet").write_bytes(parquet(["one", "two", "three", "four"]))
    assert list(open_source(str(tmp_path)).items()) == [
        Document("a.jsonl.zst:0", "one"),
        Document("a.jsonl.zst:25", "two"),
        Document("b.json:0", "one"),
        LeftOut("b.json:1", "null", 14),
        *(Document(f"c.parquet:{row}", text) for row, text in enumerate(["one", "two", "three", "four"])),
    ]


def test_undecodable_text_costs_its_own_document_only(tmp_path: Path):
    bad = pa.array([b"fine", b"\xff", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    (tmp_path / "b.json").write_bytes(b'[{"text": "fine"}, {"text": "\xff"}, {"text": "\\ud800"}]')
    (tmp_path / "c.json").write_bytes('{"text": "utf-16"}'.encode("utf-16"))
    assert list(open_source(str(tmp_path)).items()) == [
        Document("a.parquet:0", "fine"),
        LeftOut("a.parquet:1", "not utf-8", 1),
        Document("a.parquet:2", "fine"),
        Document("b.json:0", "fine"),
        LeftOut("b.json:1", "not utf-8", 13),
        LeftOut("b.json:2", "not utf-8", 18),
        LeftOut("c.json", "utf-16", 38),
    ]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_text_of_every_arrow_type_is_read(tmp_path: Path, kind: pa.DataType):
    pq.write_table(table(["one", None, "two"], kind), tmp_path / "a.parquet")
    assert [item[1] for item in open_source(str(tmp_path)).items()] == ["one", "null", "two"]


def test_a_column_within_columns_is_read_by_dotted_name_also_where_its_parent_is_null(tmp_path: Path):
    rows = [{"a": {"b": "one"}}, {"a": None}, {"a": {"b": None}}, {"a": {"b": "two"}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [item[:2] for item in open_source(str(tmp_path), text_field="a.b").items()]
    assert found == [("a.parquet:0", "one"), ("a.parquet:1", "null"), ("a.parquet:2", "null"), ("a.parquet:3", "two")]
    pq.write_table(pa.table({"a.b": ["a name with a dot"]}), tmp_path / "a.parquet")
    assert [item[1] for item in open_source(str(tmp_path), text_field="a.b").items()] == ["a name with a dot"]


def test_too_long_a_text_of_a_table_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 100)
    (tmp_path / "a.parquet").write_bytes(parquet(["x" * 101, "fine"]))
    assert list(open_source(str(tmp_path)).items()) == [
        LeftOut("a.parquet:0", "too long", 101),
        Document("a.parquet:1", "fine"),
    ]


def test_too_long_a_value_of_json_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 100)
    texts = ["x" * 86, "x" * 91, "ü" * 60, "fine"]
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts], ensure_ascii=False))
    assert list(open_source(str(tmp_path)).items()) == [
        Document("a.json:0", texts[0]),
        LeftOut("a.json:1", "too long", 103),
        LeftOut("a.json:2", "too long", 132),
        Document("a.json:3", "fine"),
    ]


@pytest.mark.parametrize("size", [2, 65_535, 65_536, 65_537])
@pytest.mark.parametrize("behind", ["", "\n", "\r\n" * 70_000])
def test_white_space_behind_an_array_is_none_of_it_wherever_reads_end(tmp_path: Path, size: int, behind: str):
    array = '[{"text": "x"}' + " " * (size - 15) + "]"
    (tmp_path / "a.json").write_bytes((array + behind).encode())
    assert list(open_source(str(tmp_path)).items()) == [Document("a.json:0", "x")]
    (tmp_path / "a.json").write_bytes((array + behind + "x").encode())
    with pytest.raises(DataError, match="text after the array's end"):
        list(open_source(str(tmp_path)).items())


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "x"}', r"a\.json, row 1 \(from 0\): the file ends within an array"),
        ('[{"text": "x"}, {"text": "y', r"row 1 \(from 0\): not JSON \(Unterminated string"),
        ('[{"text": "x"}] {"text": "y"}', r"row 1 \(from 0\): text after the array's end"),
        ('{"text": "x"} 5', r"row 1 \(from 0\): a number, and a document is an object with its text in 'text'"),
        ('[{"content": "x"}]', r"row 0 \(from 0\): no field 'text'; there are: 'content'"),
        ('{"text": {"a": 1}}', r"row 0 \(from 0\): 'text' is an object, not a text"),
        (
            "[" * 100_000,
            r"row 0 \(from 0\): not JSON \(maximum recursion .* longer than 200 characters; give many .* as lines",
        ),
        ('{"text": "' + "x" * 300, r"row 0 \(from 0\): not JSON \(Unterminated"),
    ],
)
def test_malformed_json_is_refused_with_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str
):
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 200)
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        list(open_source(str(tmp_path)).items())


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (
            "text",
            r"a\.parquet: there is no column 'text'; the columns of text are 'body', 'title', of all 'body', 'id'",
        ),
        ("id", r"column 'id' is int64, not text; the columns of text are 'body', 'title'"),
        ("meta", r"column 'meta' is struct<.*>, not text"),
        ("meta.url", r"there is no column 'url' in 'meta'; .* of all 'source'"),
        ("id.x", r"column 'id' is int64, and holds no columns"),
    ],
)
@pytest.mark.parametrize("write", [pq.write_table, "arrow"])
def test_a_wrong_column_is_told_with_those_that_are_text(tmp_path: Path, write: Any, field: str, message: str):
    rows = pa.Table.from_pylist([{"body": "x", "id": 1, "title": "y", "meta": {"source": 5}}])
    if write == "arrow":
        with pa.ipc.new_stream(tmp_path / "a.arrow", rows.schema) as writer:
            writer.write_table(rows)
        message = message.replace("parquet", "arrow")
    else:
        write(rows, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        probe(open_source(str(tmp_path), text_field=field))


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_zstd_with_a_window_above_128_mib_is_refused_with_what_to_do(tmp_path: Path, window_log: int):
    content = b"text of a frame\n"
    # A magic number, flags, the window's exponent, and the length of a last block that is stored as it is.
    header = b"\x28\xb5\x2f\xfd\0" + bytes([(window_log - 10) << 3])
    (tmp_path / "a.txt.zst").write_bytes(header + (len(content) << 3 | 1).to_bytes(3, "little") + content)
    source = open_source(str(tmp_path))
    if window_log == 27:
        assert list(source.items()) == [Document("a.txt.zst", content.decode())]
    else:
        with pytest.raises(
            DataError, match=r"a\.txt\.zst was packed with a window above 128 MiB .*`zstd -dc --long=31"
        ):
            list(source.items())


WHOLE = [(".jsonl.gz", lines), (".json.zst", one_array), (".txt.gz", lines), (".parquet", parquet), (".arrow", arrow)]


@pytest.mark.parametrize("kept", [0.3, 0.7, 0.99])
@pytest.mark.parametrize(("ending", "write"), WHOLE)
def test_a_file_that_was_cut_off_is_named(tmp_path: Path, ending: str, write: Any, kept: float):
    texts = [f"document {n} with words of its own {n * n * 7919 % 10007}" for n in range(3_000)]
    content = packed(write(texts), re.sub(r"^\.[a-z]+", "", ending))
    (tmp_path / f"a{ending}").write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DataError, match=rf"a\{ending} (is cut off or damaged \(.*, before byte [\d,]+ of|has no end)"):
        list(open_source(str(tmp_path)).items())


def test_a_packed_file_without_a_byte_and_one_that_is_none_are_refused(tmp_path: Path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.jsonl\.gz is cut off or damaged \(it is empty\)"):
        list(open_source(str(tmp_path)).items())
    (tmp_path / "a.jsonl.gz").write_bytes(b'{"text": "not packed"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl\.gz is cut off or damaged \(zlib inflate failed: incorrect header"):
        list(open_source(str(tmp_path)).items())


def test_a_bad_line_of_a_packed_file_is_told_with_its_number(tmp_path: Path):
    (tmp_path / "a.jsonl.gz").write_bytes(packed(lines(["one", "two"]) + b'{"content": "x"}\n', ".gz"))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz, line 3: no field 'text'; there are: 'content'"):
        list(open_source(str(tmp_path)).items())


def test_a_bad_line_far_into_a_file_is_told_by_its_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "COUNTED_BYTES", 20)
    (tmp_path / "a.jsonl").write_bytes(lines(["one", "two"]) + b"{}\n")
    with pytest.raises(DataError, match=r"a\.jsonl, the line at byte 50: no field 'text'"):
        list(open_source(str(tmp_path)).items())


@pytest.mark.parametrize(
    ("ending", "write"), [(".parquet", parquet), (".arrow", arrow), (".arrow", arrow_file), (".jsonl.gz", lines)]
)
def test_damaged_bytes_give_other_documents_or_one_error_and_end_no_process(tmp_path: Path, ending: str, write: Any):
    dice = random.Random(0)
    texts = [*(f"document {n}" for n in range(40)), None, ""]
    whole = packed(write(texts), re.sub(r"^\.[a-z]+", "", ending))
    path, refused = tmp_path / f"a{ending}", 0
    for _ in range(250):
        content = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            content[dice.randrange(len(content))] = dice.randrange(256)
        path.write_bytes(content)
        try:
            list(open_source(str(tmp_path)).items())
        except DataError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 100


def test_a_probe_reads_the_first_documents_of_each_kind_only(tmp_path: Path):
    good = [f"document {n}" for n in range(100)]
    (tmp_path / "a.jsonl").write_bytes(lines(good) + b"not JSON\n")
    (tmp_path / "b.jsonl").write_bytes(lines(good))
    (tmp_path / "c.jsonl").write_text('{"content": "in the third file"}\n')
    probe(open_source(str(tmp_path)))
    (tmp_path / "z.jsonl.gz").write_bytes(packed(b'{"content": "x"}\n', ".gz"))
    with pytest.raises(DataError, match=r"z\.jsonl\.gz, line 1: no field 'text'"):
        probe(open_source(str(tmp_path)))


def test_json_beside_text_is_settings_unless_a_glob_names_it(tmp_path: Path):
    (tmp_path / "main.py").write_text("print()")
    (tmp_path / "package.json").write_text('{"name": "x"}')
    assert open_source(str(tmp_path)).left_out == [LeftOut("package.json", "beside text", 13, ".json")]
    assert names(f"{tmp_path}/*.json") == ["package.json"]
    with pytest.raises(
        DataError, match=r"1 \.json beside files of text, read only where a glob .*: give a glob, such as"
    ):
        survey(str(tmp_path), heldout_fraction=0.5, max_left_out=0.1, tell=lambda line: None)
    (tmp_path / "main.py").unlink()
    assert names(str(tmp_path)) == ["package.json"]


# ---- globs and saved datasets ----------------------------------------------------------------------------------------


def names(source: str) -> list[str]:
    return [file.name for file in open_source(source).files]


def test_a_glob_takes_the_files_that_it_matches_and_tells_of_kinds_that_are_not_read(tmp_path: Path):
    for name in (
        "a.txt",
        "b.md",
        "web/1.txt",
        "web/2.txt",
        "web/deep/3.txt",
        "web/.hidden/4.txt",
        "web/x.csv",
        "[odd].txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert names(f"{tmp_path}/*.txt") == ["[odd].txt", "a.txt"]
    assert names(f"{tmp_path}/**/*.txt") == ["[odd].txt", "a.txt", "web/1.txt", "web/2.txt", "web/deep/3.txt"]
    assert names(f"file://{tmp_path}/web/[!1].txt") == ["2.txt"]
    assert names(f"{tmp_path}/w?b/**") == ["web/1.txt", "web/2.txt", "web/deep/3.txt"]
    assert names(f"{tmp_path}/*/deep/*.txt") == ["web/deep/3.txt"]
    # What is there by that very name is no glob.
    assert names(f"{tmp_path}/[odd].txt") == ["[odd].txt"]
    assert open_source(f"{tmp_path}/web/*").left_out == [LeftOut("x.csv", "unread kind", 1, ".csv")]
    for glob, message in (
        ("*.jsonl", r"no file under .* matches '\*\.jsonl' and is of a kind that is read"),
        ("web/*.csv", r"matches '\*\.csv' and .*; there is x\.csv \(unread kind\)"),
        ("absent/*.txt", "cannot be read: No such file"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(f"{tmp_path}/{glob}")


def test_a_glob_tells_of_linked_folders_and_broken_links_that_it_would_take(tmp_path: Path):
    for name in ("elsewhere/2.txt", "text/real/1.txt", "text/real/deep/3.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "text/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "text/.link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "text/real/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "text/real/broken.txt").symlink_to(tmp_path / "nowhere")

    def told(glob: str) -> list[tuple[str, str]]:
        return [(each.name, each.reason) for each in open_source(f"{tmp_path}/text/{glob}").left_out]

    linked, deeper = ("link", "linked folder"), ("real/link", "linked folder")
    broken = ("real/broken.txt", "no file")
    assert told("*/*.txt") == [linked, broken]
    assert told("**/*.txt") == told("**") == [linked, broken, deeper]
    assert told("re*/**/*.txt") == [broken, deeper]
    assert told("*/deep/*.txt") == [linked]
    # What a linked folder would hold is asked for by name.
    assert [file.name for file in open_source(f"{tmp_path}/text/link/*.txt").files] == ["2.txt"]


def test_a_saved_dataset_is_the_files_that_its_state_names(tmp_path: Path):
    (tmp_path / "data-00000-of-00002.arrow").write_bytes(arrow(["one", "two"]))
    (tmp_path / "data-00001-of-00002.arrow").write_bytes(arrow(["three"]))
    (tmp_path / "cache-0123.arrow").write_bytes(arrow(["a map's result"]))
    (tmp_path / "dataset_info.json").write_text("{}")
    files = [{"filename": f"data-0000{n}-of-00002.arrow"} for n in range(2)]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": files}))
    assert [item[1] for item in open_source(str(tmp_path)).items()] == ["one", "two", "three"]
    (tmp_path / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"lacks data-00001-of-00002\.arrow, which its state\.json names: copy"):
        open_source(str(tmp_path))
    (tmp_path / "state.json").write_text("[]")
    with pytest.raises(DataError, match=r"state\.json holds no JSON object"):
        open_source(str(tmp_path))


def test_a_dataset_of_several_splits_is_refused_with_their_names(tmp_path: Path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=rf"several splits: give one of them, {tmp_path}/train, {tmp_path}/test"):
        open_source(str(tmp_path))


def test_a_hub_id_is_told_what_to_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for source in ("HuggingFaceFW/fineweb-edu", f"{tmp_path}/HuggingFaceFW/fineweb-edu"):
        with pytest.raises(DataError, match=r"`hf download HuggingFaceFW/fineweb-edu --repo-type dataset --local-dir"):
            open_source(source)
    for source in (f"{tmp_path}/absent", "texts/a.txt"):
        with pytest.raises(DataError, match="there is no such folder or file") as caught:
            open_source(source)
        assert "hf download" not in str(caught.value)
