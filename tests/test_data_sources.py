"""Sources become named documents, and their names alone decide what is held out."""

import gzip
import json
import os
import pickle
import re
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raynium.data.build.store_build import build_store
from raynium.data.build.survey import Survey, survey
from raynium.data.store import open_store
from raynium.data.text import readers
from raynium.data.text.documents import Document, is_held_out, name_hash
from raynium.data.text.left_out import LeftOut, LeftOutGroup, Tally
from raynium.data.text.listing import PYTHON_STDLIB
from raynium.data.text.readers import PIECE_BYTES
from raynium.data.text.sources import open_source, plan_splits, read_split
from raynium.errors import DataError, spelled

pytestmark = pytest.mark.quick


def test_standard_library_is_large_sorted_and_without_installed_packages():
    items = list(open_source(PYTHON_STDLIB).items())
    documents = [item for item in items if isinstance(item, Document)]
    names = [document.name for document in documents]
    assert sum(len(document.text.encode()) for document in documents) > 10_000_000
    assert names == sorted(names)
    assert "json/decoder.py" in names
    assert not any("site-packages" in name or "dist-packages" in name for name in names)
    source_file = Path(sysconfig.get_paths()["stdlib"]) / "json/decoder.py"
    assert documents[names.index("json/decoder.py")].text.encode() == source_file.read_bytes()


def test_folder_gives_documents_in_name_order_and_counts_what_is_none(tmp_path: Path):
    (tmp_path / "b.txt").write_bytes(b"line\r\nends stay")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.md").write_text("# title")
    (tmp_path / "a.py").write_text("")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfd\x00")
    (tmp_path / "image.png").write_bytes(b"not text")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "notes.txt").write_text("hidden")
    assert list(open_source(str(tmp_path)).items()) == [
        LeftOut(".git", "hidden"),
        LeftOut("image.png", "other kind", 8),
        LeftOut("a.py", "empty"),
        Document("b.txt", "line\r\nends stay"),
        LeftOut("c.txt", "not utf-8", 3),
        Document("sub/a.md", "# title"),
    ]


def test_jsonl_lines_are_documents_of_their_own(tmp_path: Path):
    lines = [
        json.dumps({"text": "first", "id": 7}).encode(),
        b"",
        json.dumps({"text": "dritte, überall"}, ensure_ascii=False).encode(),
        b'{"text": "half a pair: \\ud800"}',
        b'{"text": "\xff"}',
        b'{"text": ""}',
    ]
    (tmp_path / "d.jsonl").write_bytes(b"\n".join(lines))
    assert list(open_source(str(tmp_path)).items()) == [
        Document("d.jsonl:0", "first"),
        LeftOut("d.jsonl:27", "empty"),
        Document("d.jsonl:28", "dritte, überall"),
        LeftOut("d.jsonl:57", "not utf-8", 32),
        LeftOut("d.jsonl:89", "not utf-8", 14),
        LeftOut("d.jsonl:103", "empty"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"d\.jsonl, line 2: not JSON"),
        ('{"content": "x", "id": 1}', r"d\.jsonl, line 2: no field 'text'; there are: 'content', 'id'"),
        ('{"text": 5}', r"line 2: 'text' is a number, not a text"),
        ('{"text": [true]}', r"line 2: 'text' is a list, not a text"),
        ('["x"]', r"line 2: a list, and a document is an object with its text in 'text'"),
    ],
)
def test_malformed_jsonl_is_refused_with_its_line(tmp_path: Path, line: str, message: str):
    (tmp_path / "d.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(DataError, match=message):
        list(open_source(str(tmp_path)).items())


def test_missing_and_empty_folders_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"no such folder or file.*give an existing folder"):
        open_source(str(tmp_path / "absent"))
    (tmp_path / "image.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no file of a kind that is read \(\.txt, .* under .*; there is image\.png"):
        open_source(str(tmp_path))


def test_held_out_documents_are_the_stated_share_and_stay_held_out():
    names = [f"package/module_{i}.py" for i in range(20_000)]
    held_out = {fraction: {name for name in names if is_held_out(name, fraction)} for fraction in (0.0, 0.05, 0.2, 1.0)}
    assert held_out[0.0] == set()
    assert held_out[1.0] == set(names)
    assert held_out[0.05] < held_out[0.2]
    assert 0.04 < len(held_out[0.05]) / len(names) < 0.06
    # frozen: another value would silently move documents between the splits of existing stores
    assert [i for i in range(60) if is_held_out(f"{i}.txt", 0.1)] == [14, 48]
    assert name_hash("json/decoder.py") == 2101820494204920077


# ---- what is left out, by reason -------------------------------------------------------------------------------------


def surveyed(folder: Path, **changes: Any) -> Survey:
    options = {"heldout_fraction": 0.2, "max_left_out": 0.1, "tell": lambda line: None, **changes}
    return survey(str(folder), **options)


@pytest.fixture
def half_lost(tmp_path: Path) -> Path:
    """60 text files of which 30 are Latin-1, shards of unread kinds, a linked folder, and a pipe."""
    folder, elsewhere = tmp_path / "d", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    for i in range(60):
        text = f"café number {i}, and more words\n"
        (folder / f"{i}.txt").write_bytes(text.encode("latin-1" if i % 2 else "utf-8"))
    (folder / "part-1.csv.gz").write_bytes(gzip.compress(b"text\na compressed document\n"))
    (folder / "part-2.orc").write_bytes(b"ORC")
    (elsewhere / "a.jsonl").write_text('{"text": "in a linked folder"}\n')
    (folder / "linked").symlink_to(elsewhere)
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.txt")
    (folder / "README.TXT").write_text("upper case\n")
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbfwith a byte order mark\n")
    return folder


def test_half_a_corpus_that_would_be_lost_is_refused_with_reasons_first_names_and_share(half_lost: Path):
    with pytest.raises(DataError) as caught:
        surveyed(half_lost)
    message = str(caught.value)
    for part in (
        "30 not UTF-8 (first: 1.txt)",
        "1 .csv.gz, which is not read (first: part-1.csv.gz)",
        "1 .orc, which is not read (first: part-2.orc)",
        "1 linked folders, which are not followed (first: linked)",
        "2 pipes, sockets, devices or broken links (first: gone.txt)",
        "more than data.max_left_out = 0.1",
        "iconv",
    ):
        assert part in message, message
    share = re.search(r"would lose (\d+) % .* set data\.max_left_out=(0\.\d+) ", message)
    assert share is not None and 45 < int(share[1]) <= 100 * float(share[2]) < 60
    found = surveyed(half_lost, max_left_out=float(share[2]))
    assert len(found.train_bytes) + found.heldout_documents == 32


def test_capital_endings_are_read_and_a_byte_order_mark_is_no_text(half_lost: Path):
    texts = {item.name: item.text for item in open_source(str(half_lost)).items() if isinstance(item, Document)}
    assert texts["README.TXT"] == "upper case\n" and texts["bom.txt"] == "with a byte order mark\n"


def test_a_byte_order_mark_within_a_file_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(readers, "PIECE_BYTES", 7)
    (tmp_path / "a.txt").write_bytes("\ufeffone\n\ufefftwo\n".encode())
    pieces = [item for item in open_source(str(tmp_path / "a.txt")).items() if isinstance(item, Document)]
    assert [piece.text for piece in pieces] == ["one\n", "\ufefftwo\n"]


def test_a_source_in_utf_16_is_told_so(tmp_path: Path):
    for i in range(9):
        (tmp_path / f"{i}.txt").write_bytes(f"text {i}".encode("utf-16"))
    (tmp_path / "a.jsonl").write_bytes('{"text": "x"}\n{"text": "y"}\n'.encode("utf-16"))
    with pytest.raises(DataError, match=r"lose 100 % of its text: 10 UTF-16, not UTF-8 .*iconv -f UTF-16") as caught:
        surveyed(tmp_path)
    with pytest.raises(DataError, match=r"gives 0 training and 0 held-out documents .* and leaves out 100 %"):
        surveyed(tmp_path, max_left_out=1.0)
    assert "first: 0.txt" in str(caught.value)


def test_lines_whose_text_is_null_are_counted_and_only_many_are_refused(tmp_path: Path):
    good = "".join(json.dumps({"text": f"document {n} says hello again and again"}) + "\n" for n in range(40))
    (tmp_path / "a.jsonl").write_text(good + '{"text": null}\n')
    [group] = surveyed(tmp_path).left_out
    assert (group.reason, group.number, group.num_bytes, group.first) == ("null", 1, 15, "a.jsonl:2030")
    (tmp_path / "a.jsonl").write_text(good + '{"text": null, "content": "lost"}\n' * 40)
    with pytest.raises(DataError, match=r"40 whose text is null \(first: a\.jsonl:2030\)"):
        surveyed(tmp_path)


def test_a_file_of_records_without_one_is_empty(tmp_path: Path):
    for name, content in {"a.json": "", "b.json": "[]", "c.json": " \n", "d.jsonl": "", "e.ndjson": ""}.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(b""))
    items = list(open_source(str(tmp_path)).items())
    assert items == [LeftOut(file.name, "empty") for file in sorted(tmp_path.iterdir())]


def test_integers_of_any_length_are_read_over(tmp_path: Path):
    record = '{"text": "x", "id": ' + "9" * 5000 + "}"
    (tmp_path / "a.jsonl").write_text(record)
    (tmp_path / "b.json").write_text(f"[{record}]")
    items = [Document("a.jsonl:0", "x"), Document("b.json:0", "x")]
    assert list(open_source(f"{tmp_path}/*").items()) == items


def test_a_line_that_is_only_a_byte_order_mark_is_empty(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf\n{"text": "x"}\n')
    assert list(open_source(str(tmp_path)).items()) == [LeftOut("a.jsonl:0", "empty"), Document("a.jsonl:4", "x")]


def test_a_line_that_only_python_cannot_read_is_refused_with_file_and_line(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "x", "m": ' + "[" * 100_000 + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: not JSON"):
        surveyed(tmp_path)


def test_a_name_that_is_no_utf_8_names_a_document(tmp_path: Path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(9):
        (text / f"{number}.txt").write_text(f"text {number}")
    name = os.fsdecode(b"caf\xe9.txt")
    (text / name).write_text("hello")
    (text / os.fsdecode(b"\xe9.txt")).write_text("")
    store = build_store(tmp_path / "store", source=str(text), vocab_size=300, heldout_fraction=0.9)
    assert name in {document.name for document in store.heldout_documents()}
    assert [each.first for each in open_store(store.path).manifest.left_out if each.reason == "empty"] == [r"\xe9.txt"]


def test_names_reach_neither_terminal_nor_manifest_with_bytes_that_these_obey_or_refuse(tmp_path: Path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    for name in ("x\x1b[31m.txt", "caf\u00e9.txt", os.fsdecode(b"b.\xff\xfe\x07" + b"\xfc" * 9 + b".gz")):
        (tmp_path / name).write_text("")
    tally = Tally()
    for item in open_source(str(tmp_path)).items():
        if isinstance(item, LeftOut):
            tally.add(item)
    words = {group.reason: group.in_words() for group in tally.groups()}
    assert set(words) == {"empty", "unread kind"}
    assert words["unread kind"].startswith(r"1 .\xff\xfe\x07\xfc\xf.gz, which is not read (first: b.\xff\xfe\x07\xfc")
    assert words["empty"] == "2 empty (first: caf\u00e9.txt)"
    escape = LeftOutGroup(reason="empty", kind="", number=1, num_bytes=0, first="x\x1b[31m.txt")
    assert escape.in_words() == LeftOutGroup.of(LeftOut(escape.first, "empty")).in_words()
    assert escape.in_words() == r"1 empty (first: x\x1b[31m.txt)"
    (tmp_path / "x\x1b[31m.jsonl").write_text("[")
    with pytest.raises(DataError, match=r"x\\x1b\[31m\.jsonl, line 1: not JSON"):
        list(open_source(f"{tmp_path}/*.jsonl").items())
    (tmp_path / "only").mkdir()
    (tmp_path / "only/x\x1b[31m.csv").write_text("")
    with pytest.raises(DataError, match=r"there is x\\x1b\[31m\.csv \(unread kind\)"):
        open_source(f"{tmp_path}/only")


def test_any_text_can_be_spelled():
    assert spelled("a\udc80b\ud800c\x1b\udfff\udcc3\udca9") == "a\\x80b\\ud800c\\x1b\\udfffé"
    assert spelled("Ärger 日本") == "Ärger 日本"


def test_one_file_is_a_source(tmp_path: Path):
    lines = tmp_path / "a.JSONL"
    lines.write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(40)))
    assert len(surveyed(lines).train_bytes) > 20
    text = tmp_path / "book.txt"
    text.write_text("".join(f"Line {n} of a book, dear reader.\n" for n in range(10_000)))
    pieces = [item for item in open_source(str(text)).items() if isinstance(item, Document)]
    assert [piece.name for piece in pieces[:2]] == ["book.txt:0", f"book.txt:{len(pieces[0].text)}"]
    assert "".join(piece.text for piece in pieces) == text.read_text()
    assert all(piece.text.endswith("\n") and len(piece.text) < PIECE_BYTES + 100 for piece in pieces)
    (tmp_path / "a.parquet.gz").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"a file that ends in \.gz is not read; give one of \.txt, \.md"):
        open_source(str(tmp_path / "a.parquet.gz"))


@pytest.mark.parametrize("bucket", ["buc*", "b?cket", "[ab]ucket", "*"])
def test_a_wildcard_in_the_name_of_a_bucket_is_refused_before_s3_is_asked(bucket: str):
    for source in (f"s3://{bucket}/x", f"s3://{bucket}"):
        with pytest.raises(DataError, match=rf"the bucket's name '{re.escape(bucket)}' has a wildcard, and one bucket"):
            open_source(source)


def test_what_is_no_file_is_no_source(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.txt")
    for place, problem in [(tmp_path / "pipe.txt", "it is a pipe"), ("/dev/zero", "it is a device"), ("a\0b", "null")]:
        with pytest.raises(DataError, match=problem):
            open_source(str(place))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.md.gz"])
def test_a_file_without_text_that_is_a_source_by_itself_is_counted(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    assert list(open_source(str(tmp_path / name)).items()) == [LeftOut(name, "empty")]


def test_a_document_that_is_too_long_is_left_out_and_never_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 100)
    (tmp_path / "a.txt").write_text("x" * 101)
    (tmp_path / "b.jsonl").write_text('{"text": "' + "x" * 300 + '"}\n{"text": "fine"}\n')
    assert list(open_source(str(tmp_path)).items()) == [
        LeftOut("a.txt", "too long", 101),
        LeftOut("b.jsonl:0", "too long", 313),
        Document("b.jsonl:313", "fine"),
    ]


def test_a_file_that_goes_away_or_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    opened = open_source(str(tmp_path))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt cannot be read: No such file.*take it out of data\.source"):
        list(opened.items())


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("x")

    def denied(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match="cannot be read: Permission denied; give this user permission"):
        open_source(str(tmp_path))


# ---- mutated inputs --------------------------------------------------------------------------------------------------

JSONL = b"".join(json.dumps({"text": f"d\u00f6cument {n}", "id": n}).encode() + b"\n" for n in range(4))
CHANGES = st.lists(
    st.tuples(
        st.integers(0, len(JSONL)),
        st.integers(0, 5),
        st.binary(max_size=4)
        | st.sampled_from([b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 5000, b"\\ud800", b"\n\n", b"null"]),
    ),
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(changes=CHANGES, ending=st.sampled_from([".jsonl", ".txt", ".md"]), alone=st.booleans())
def test_whatever_a_file_holds_it_gives_documents_counts_or_one_error(changes: Any, ending: str, alone: bool):
    content = JSONL
    for position, length, inserted in changes:
        content = content[:position] + inserted + content[position + length :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a{ending}")
        path.write_bytes(content)
        try:
            items = list(open_source(str(path) if alone else folder).items())
        except DataError as error:
            assert re.search(r"a\.jsonl, line \d+: ", str(error))
            return
    assert len({item.name for item in items}) == len(items)
    for item in items:
        assert item.text.encode() if isinstance(item, Document) else item.num_bytes <= len(content)
    if ending != ".jsonl" and not alone:
        [item] = items
        assert not isinstance(item, Document) or item.text.encode() == content.removeprefix(b"\xef\xbb\xbf")


# ---- splits ----------------------------------------------------------------------------------------------------------

# Pieces so small that a few hundred bytes have many, and lines as long as several of them.
SMALL_PIECES = 16
CONTENTS = st.lists(
    st.sampled_from(
        [b"", b"x", "\u00e9\U0001f600".encode() * 9, b"a line of some words", b"\xff\xfd", b"\xef\xbb\xbf"]
    ),
    max_size=20,
).map(b"\n".join)
RECORDS = st.lists(
    st.sampled_from(
        [b"", b'{"text": "x"}', b'{"text": null}', b'{"text": "%s"}' % ("\u00e9" * 70).encode(), b'{"text": "\xff"}']
    ),
    max_size=20,
).map(b"\n".join)


@settings(max_examples=300, deadline=None)
@given(
    files=st.lists(
        st.tuples(CONTENTS | RECORDS | st.sampled_from([b"\xff\xfea\0"]), st.booleans()), min_size=1, max_size=4
    ),
    alone=st.booleans(),
    most_bytes=st.sampled_from([1, 2, 7, 16, 17, 50, 1000]),
)
def test_splits_of_any_size_give_each_document_once_in_the_order_of_the_source(
    files: Any, alone: bool, most_bytes: int
):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PIECE_BYTES", SMALL_PIECES)
        for number, (content, small) in enumerate(files[:1] if alone else files):
            records = all(line.startswith(b"{") or not line for line in content.split(b"\n"))
            path = Path(folder, f"{number}{'.jsonl' if records and small else '.txt'}")
            path.write_bytes(content)
        source = open_source(str(path) if alone else folder)
        whole = [item for split in plan_splits(source) for item in read_split(split)]
        splits = plan_splits(source, most_bytes=most_bytes)
        assert [item for split in splits for item in read_split(split)] == whole
        assert len({item.name for item in whole}) == len(whole)
        if alone and path.suffix == ".txt" and all(isinstance(item, Document) for item in whole):
            text = "".join(item.text for item in whole if isinstance(item, Document))
            assert text == content.decode("utf-8-sig")
        assert pickle.loads(pickle.dumps(splits)) == splits


def test_small_files_share_splits_and_large_ones_are_cut_into_equal_parts(tmp_path: Path):
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("x" * 100)
    (tmp_path / "5.jsonl").write_text('{"text": "a line"}\n' * 100)
    planned = plan_splits(open_source(str(tmp_path)), most_bytes=500)
    shape = [[(part.file.name, part.end - part.begin) for part in split.parts] for split in planned]
    assert shape == [
        [(f"{number}.txt", 100) for number in range(5)],
        *([("5.jsonl", 475)] for _ in range(4)),
        [(f"{number}.txt", 100) for number in range(5, 10)],
    ]


def test_a_file_that_changed_since_it_was_listed_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    opened = open_source(str(tmp_path))
    (tmp_path / "a.txt").write_text("xy")
    with pytest.raises(DataError, match=r"a\.txt has 2 bytes, and had 1 when its folder was listed: let nothing write"):
        list(opened.items())
    opened = open_source(str(tmp_path))
    status = (tmp_path / "a.txt").stat()
    (tmp_path / "a.txt").write_text("yx")
    # A clock may be too coarse to tell two writes in one test.
    os.utime(tmp_path / "a.txt", ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    with pytest.raises(DataError, match=r"a\.txt was written to after its folder was listed: let nothing write"):
        list(opened.items())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": {"text": "x"}}', r"line 3: no field 'b' in 'a'; there are: 'text'"),
        ('{"a": "x"}', r"line 3: 'a' is a text, and holds no field 'b'"),
        ('{"text": "x"}', r"line 3: no field 'a'; there are: 'text'"),
        ("{}", r"line 3: no field 'a'; there are: none"),
    ],
)
def test_a_field_by_dotted_name_is_read_and_its_absence_told(tmp_path: Path, line: str, message: str):
    path = tmp_path / "d.jsonl"
    path.write_text('{"a": {"b": "first"}}\n{"a": null}\n')
    assert list(open_source(str(path), text_field="a.b").items()) == [
        Document("d.jsonl:0", "first"),
        LeftOut("d.jsonl:22", "null", 12),
    ]
    path.write_text(path.read_text() + line)
    with pytest.raises(DataError, match=message):
        list(open_source(str(path), text_field="a.b").items())
    path.write_text('{"a.b": "a name with a dot"}\n')
    assert list(open_source(str(path), text_field="a.b").items()) == [Document("d.jsonl:0", "a name with a dot")]


@given(
    st.lists(st.sampled_from(["not utf-8", "null", "unread kind", "empty"]), min_size=1, max_size=12),
    st.integers(0, 12),
)
def test_tallies_of_parts_add_up_to_the_tally_of_the_whole(reasons: Any, cut: int):
    items = [LeftOut(f"{n:03}", reason, n, ".csv" * (reason == "unread kind")) for n, reason in enumerate(reasons)]
    whole, parts, sums = Tally(), [Tally(), Tally()], Tally()
    for number, item in enumerate(items):
        whole.add(item)
        parts[number >= cut].add(item)
    for part in parts:
        for group in part.groups():
            sums.add(group)
    assert sums.groups() == whole.groups()
