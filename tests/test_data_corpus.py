"""Sources become named documents, and their names alone decide what is held out."""

import json
import sysconfig
from pathlib import Path

import pytest

from raynium.data.corpus import PYTHON_STDLIB, Document, Skipped, is_held_out, name_hash, read_documents
from raynium.errors import DataError

pytestmark = pytest.mark.quick


def test_standard_library_is_large_sorted_and_without_installed_packages():
    items = list(read_documents(PYTHON_STDLIB))
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
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "image.png").write_bytes(b"not text")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "notes.txt").write_text("hidden")
    assert list(read_documents(str(tmp_path))) == [
        Skipped("a.py", "empty"),
        Document("b.txt", "line\r\nends stay"),
        Skipped("c.txt", "undecodable"),
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
    assert list(read_documents(str(tmp_path))) == [
        Document("d.jsonl:1", "first"),
        Skipped("d.jsonl:2", "empty"),
        Document("d.jsonl:3", "dritte, überall"),
        Skipped("d.jsonl:4", "undecodable"),
        Skipped("d.jsonl:5", "undecodable"),
        Skipped("d.jsonl:6", "empty"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"d\.jsonl, line 2: not JSON"),
        ('{"content": "x"}', r'd\.jsonl, line 2: no "text" string'),
        ('{"text": 5}', r'line 2: no "text" string'),
        ('["x"]', r'line 2: no "text" string'),
    ],
)
def test_malformed_jsonl_is_refused_with_its_line(tmp_path: Path, line: str, message: str):
    (tmp_path / "d.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(DataError, match=message):
        list(read_documents(str(tmp_path)))


def test_missing_and_empty_folders_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"no such folder.*give an existing folder"):
        read_documents(str(tmp_path / "absent"))
    (tmp_path / "image.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no \.txt, \.py, \.md, \.jsonl file under"):
        read_documents(str(tmp_path))


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
