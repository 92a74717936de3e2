"""A document store is whole or absent, says what it is, and names what is wrong with it."""

import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raynium.data.build import store_build
from raynium.data.build.fit import refuse_other_tokenizer
from raynium.data.build.lengths import LengthCounts
from raynium.data.build.store_build import build_from_recipe, build_store
from raynium.data.manifest import Recipe, StoreManifest, token_dtype_for
from raynium.data.runner import in_this_process
from raynium.data.store import DocumentStore, open_store
from raynium.data.text.documents import Document, is_held_out, name_hash
from raynium.data.text.sources import open_source
from raynium.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from raynium.data.verify import verify_store
from raynium.errors import DataError

pytestmark = pytest.mark.quick

# The source of most tests is cut into as many splits.
SPLIT_BYTES, NUM_SPLITS = 1200, 8


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for i in range(50):
        (folder / f"{i}.txt").write_text(f"Döcument {i}: {END_OF_DOCUMENT} is only text here, {i * 37}\n" * (i % 5 + 1))
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(b"\xff\xff")
    return folder


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> DocumentStore:
    return build(source, tmp_path_factory.mktemp("finished") / "store")


@pytest.fixture
def store(finished: DocumentStore, tmp_path: Path) -> DocumentStore:
    """A copy that a test may damage."""
    shutil.copytree(finished.path, tmp_path / "store")
    return open_store(tmp_path / "store")


def build(source: Path, path: Path, **changes: Any) -> DocumentStore:
    arguments = {
        "source": str(source),
        "vocab_size": 400,
        "heldout_fraction": 0.2,
        "split_bytes": SPLIT_BYTES,
        **changes,
    }
    return build_store(path, **arguments)


def fits(store: DocumentStore, *, vocab_size: int = 400, tokenizer_path: str | None = None) -> None:
    refuse_other_tokenizer(
        store.manifest, model_vocab_size=vocab_size, path=tokenizer_path, end_of_document=None, where="here"
    )


def edit_manifest(store: DocumentStore, **fields: Any) -> None:
    path = store.path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def with_shards(subset: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**subset, "shards": {**subset["shards"], **fields}}


SMALL = {"name": "x.json", "size_bytes": 1, "crc64nvme": "AAAAAAAAAAA="}


def test_store_holds_every_document_once(finished: DocumentStore, source: Path):
    tokenizer, manifest = finished.tokenizer(), finished.manifest
    texts = {item.name: item.text for item in open_source(str(source)).items() if isinstance(item, Document)}
    stream = finished.train_stream().read(0, manifest.train.tokens)
    ends = np.flatnonzero(stream == tokenizer.end_of_document_id)
    train_texts = [tokenizer.decode(piece[:-1]) for piece in np.split(stream, ends + 1)[:-1]]
    assert ends[-1] == len(stream) - 1 and len(manifest.train_shards) > 2

    heldout_stream = finished.heldout_stream()
    heldout = {
        document.name: tokenizer.decode(heldout_stream.read(document.offset, document.num_tokens))
        for document in finished.heldout_documents()
    }
    assert heldout == {name: texts[name] for name in heldout}
    assert train_texts == [text for name, text in texts.items() if name not in heldout]
    assert (manifest.train.documents, manifest.heldout.documents) == (len(train_texts), len(heldout))
    assert manifest.train.utf8_bytes == sum(len(text.encode()) for text in train_texts)
    assert manifest.heldout.utf8_bytes == sum(len(text.encode()) for text in heldout.values())
    assert manifest.heldout.tokens == sum(document.num_tokens for document in finished.heldout_documents())
    assert [(each.reason, each.number, each.first) for each in manifest.left_out] == [
        ("not utf-8", 1, "binary.txt"),
        ("empty", 1, "empty.txt"),
    ]
    assert manifest.token_dtype == "uint16" and manifest.tokenizer_sha256 == tokenizer.sha256
    assert np.array_equal(finished.train_token_counts(), np.bincount(stream, minlength=manifest.vocab_size))
    verify_store(finished.path)


def test_heldout_documents_come_by_hash_of_name_with_their_sizes(finished: DocumentStore, source: Path):
    documents = finished.heldout_documents()
    assert [document.name for document in documents] == sorted((d.name for d in documents), key=name_hash)
    assert finished.heldout_documents(3) == documents[:3]
    for document in documents:
        text = (source / document.name).read_bytes()
        assert (document.utf8_bytes, document.zlib_bytes) == (len(text), len(zlib.compress(text, 9)))


def test_equal_documents_give_equal_bytes(finished: DocumentStore, source: Path, tmp_path: Path):
    again = build(source, tmp_path / "again")
    for name in os.listdir(finished.path):
        assert (again.path / name).read_bytes() == (finished.path / name).read_bytes(), name


def test_tokenizer_learns_from_training_documents_only(source: Path, tmp_path: Path):
    marked = tmp_path / "marked"
    shutil.copytree(source, marked)
    store = build(source, tmp_path / "plain")
    for document in store.heldout_documents():
        (marked / document.name).write_text("zqzqzqzq " * 400)
    assert build(marked, tmp_path / "with-marks").manifest.tokenizer_sha256 == store.manifest.tokenizer_sha256


def test_tokenizer_sample_is_capped(finished: DocumentStore, source: Path, tmp_path: Path):
    capped = build(source, tmp_path / "capped", tokenizer_sample_bytes=1)  # one document, the first by hash
    assert capped.manifest.vocab_size < finished.manifest.vocab_size


def test_given_tokenizer_is_used_as_it_is(finished: DocumentStore, source: Path, tmp_path: Path):
    mine = tmp_path / "mine.json"
    mine.write_text(Tokenizer.train(["other text " * 9], vocab_size=300).file_text)
    store = build(source, tmp_path / "store", tokenizer_path=str(mine))
    assert (store.path / "tokenizer.json").read_text() == mine.read_text()
    assert store.manifest.vocab_size == Tokenizer.load(mine).vocab_size


def test_large_vocabularies_take_wider_shards(source: Path, tmp_path: Path):
    fields = json.loads(Tokenizer.train(["some text"], vocab_size=257).file_text)
    fields["added_tokens"].append({**fields["added_tokens"][0], "id": 70_000, "content": "<|far|>"})
    fields["model"]["vocab"]["<|far|>"] = 70_000
    (tmp_path / "wide.json").write_text(json.dumps(fields))
    store = build(source, tmp_path / "store", tokenizer_path=str(tmp_path / "wide.json"), vocab_size=80_000)
    assert store.manifest.token_dtype == "uint32" and store.manifest.vocab_size == 70_001
    first = store.heldout_documents(1)[0]
    text = store.tokenizer().decode(store.heldout_stream().read(first.offset, first.num_tokens))
    assert text.encode() == (source / first.name).read_bytes()


def test_token_type_is_the_smallest_that_holds_the_vocabulary():
    assert [token_dtype_for(size) for size in (1, 2**16, 2**16 + 1, 2**32)] == ["uint16", "uint16", "uint32", "uint32"]
    with pytest.raises(DataError, match="use a smaller tokenizer"):
        token_dtype_for(2**32 + 1)


def test_lossy_tokenizer_is_warned_about(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    fields = json.loads(Tokenizer.train(["some text"], vocab_size=257).file_text)
    (tmp_path / "lossy.json").write_text(json.dumps({**fields, "normalizer": {"type": "Lowercase"}}))
    with caplog.at_level(logging.WARNING):
        store = build(source, tmp_path / "store", tokenizer_path=str(tmp_path / "lossy.json"))
    heldout = store.manifest.heldout.documents
    assert f"does not give back the text of {heldout} of {heldout} held-out documents" in caplog.text


# ---- building: absent or whole ---------------------------------------------------------------------------------------


def test_finished_store_is_used_not_built(finished: DocumentStore, source: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_build, "_build", None)
    assert build(source, finished.path).manifest == finished.manifest
    assert build(source, finished.path, vocab_size=4000).manifest == finished.manifest  # spare rows do no harm


@pytest.mark.parametrize("dies_at", ["train-00002.bin", "train-00001.crc", "00003-", "tokenizer.json", "manifest.json"])
def test_killed_build_leaves_no_store_and_the_next_one_goes_on(
    finished: DocumentStore, source: Path, tmp_path: Path, dies_at: str, monkeypatch: pytest.MonkeyPatch
):
    """SIGKILL at the moment the named file, or the part of split 3, is opened for writing."""
    path = tmp_path / "store"
    script = (
        "import os, signal, sys\n"
        "from raynium.data.build.store_build import build_store\n"
        "def kill(event, arguments):\n"
        "    if event == 'open' and arguments[1] == 'x':\n"
        f"        if {dies_at!r} in os.path.basename(str(arguments[0])):\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.addaudithook(kill)\n"
        f"build_store({str(path)!r}, source={str(source)!r}, vocab_size=400, heldout_fraction=0.2, "
        f"split_bytes={SPLIT_BYTES})\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    with pytest.raises(DataError, match=r"no document store: it has no manifest\.json; set data\.source"):
        open_store(path)
    before = {file.name for file in (path / "building/parts").glob("*.json")}
    done: list[int] = []
    tokenise_split = store_build.tokenise_split
    monkeypatch.setattr(
        store_build, "tokenise_split", lambda work, each: done.append(each.number) or tokenise_split(work, each)
    )
    store = build(source, path)
    verify_store(store.path)
    assert store.manifest == finished.manifest
    assert done == [
        number for number in range(NUM_SPLITS) if not any(part.startswith(f"{number:05d}") for part in before)
    ]
    assert len(before) == {"train-00002.bin": 2, "train-00001.crc": 1, "00003-": 3}.get(dies_at, NUM_SPLITS)
    files = store.manifest.files
    on_disk = {file.name for file in path.iterdir() if not file.name.startswith(".")}
    assert on_disk == {name for file in files for name in (file.name, file.units_name)} | {"manifest.json"}


def test_what_a_build_of_other_text_has_left_is_not_used(finished: DocumentStore, source: Path, tmp_path: Path):
    """Neither its parts nor its shards: a source that changed between two runs is not mixed into the old parts."""
    path, changed = tmp_path / "store", tmp_path / "changed"
    shutil.copytree(source, changed)
    (changed / "7.txt").write_text("another text, of another length\n")
    build_from = partial(build, tokenizer_path=str(finished.path / "tokenizer.json"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_build, "finish", lambda *_, **__: 1 / 0)
        for text, fewer in ((source, 300), (changed, SPLIT_BYTES)):
            with pytest.raises(ZeroDivisionError):
                build_from(text, path, split_bytes=fewer)
    (changed / "7.txt").write_bytes((source / "7.txt").read_bytes())
    store = build_from(changed, path)
    expected = build_from(changed, tmp_path / "expected")
    assert store.manifest == expected.manifest and store.manifest.identity == finished.manifest.identity
    verify_store(store.path)


def build_and_report(source: Path, path: Path, barrier: Any, results: Any) -> None:
    built = []
    build_for_real = store_build._build
    store_build._build = lambda *arguments, **more: built.append(1) or build_for_real(*arguments, **more)
    barrier.wait()
    store = build(source, path)
    verify_store(store.path)
    results.put((len(built), store.manifest.model_dump_json()))


def test_of_two_builders_one_builds_and_the_other_uses_it(source: Path, tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    arguments = (source, tmp_path / "store", barrier, results)
    processes = [context.Process(target=build_and_report, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    reports = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(builds for builds, _ in reports) == [0, 0, 1]
    assert len({manifest for _, manifest in reports}) == 1


def test_unusable_sources_are_refused_and_leave_no_store(source: Path, tmp_path: Path):
    with pytest.raises(DataError, match="no such folder or file"):
        build(tmp_path / "absent", tmp_path / "store")
    only_empty = tmp_path / "only-empty"
    only_empty.mkdir()
    (only_empty / "a.txt").write_text("")
    with pytest.raises(
        DataError, match=r"gives 0 training and 0 held-out documents with data\.heldout_fraction = 0\.2"
    ):
        build(only_empty, tmp_path / "store")
    with pytest.raises(DataError, match="0 training and 50 held-out documents"):
        build(source, tmp_path / "store", heldout_fraction=1 - 1e-9)
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_a_source_of_which_nothing_is_held_out_is_told_the_fraction_that_would(source: Path, tmp_path: Path):
    """By a run, which reads all before it builds, and by a build, which adds up what its tasks say."""
    recipe = Recipe(sources=[str(source)], text_field="text", heldout_fraction=1e-9, dedup="none")
    tokenizer = Tokenizer.train(["number"], vocab_size=300)
    how = {"runner": in_this_process, "tell": lambda line: None}
    told = []
    for attempt in (
        lambda: build(source, tmp_path / "store", heldout_fraction=1e-9),
        lambda: build_from_recipe(tmp_path / "other", recipe, tokenizer, **how),
    ):
        with pytest.raises(DataError, match="50 training and 0 held-out documents") as caught:
            attempt()
        told += re.findall(r"or set data\.heldout_fraction=([0-9.e-]+), which holds one out", str(caught.value))
    assert len(told) == 2 and told[0] == told[1]
    assert build(source, tmp_path / "store", heldout_fraction=float(told[0])).manifest.heldout.documents == 1


def test_path_that_cannot_be_written_is_refused(source: Path, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot be built: .*check permissions and free space"):
        build(source, tmp_path / "file" / "store")


def test_full_disk_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot be built: .*No space left on device"):
        build(source, tmp_path / "store")
    assert not (tmp_path / "store" / "manifest.json").exists()


# ---- fit: store against config ---------------------------------------------------------------------------------------


def test_store_built_from_something_else_is_refused(finished: DocumentStore, source: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"built with data\.heldout_fraction = 0\.2, the config says 0\.1; set it back"):
        build(source, finished.path, heldout_fraction=0.1)
    with pytest.raises(DataError, match=r"built with data\.source = .*the config says 'python-stdlib'"):
        build_store(finished.path, source="python-stdlib", vocab_size=400, heldout_fraction=0.2)


def test_another_tokenizer_is_refused_with_both_hashes(finished: DocumentStore, source: Path, tmp_path: Path):
    other = Tokenizer.train(["other"], vocab_size=257)
    (tmp_path / "other.json").write_text(other.file_text)
    for refuse in (
        lambda path: fits(finished, tokenizer_path=path),
        lambda path: build(source, finished.path, tokenizer_path=path),
    ):
        with pytest.raises(DataError, match=r"remove data\.tokenizer to use the store's own") as caught:
            refuse(str(tmp_path / "other.json"))
        assert other.sha256 in str(caught.value) and finished.manifest.tokenizer_sha256 in str(caught.value)
    fits(finished, tokenizer_path=str(finished.path / "tokenizer.json"))


def test_the_end_of_a_document_is_the_one_that_was_asked_for(finished: DocumentStore, source: Path, tmp_path: Path):
    fields = json.loads(finished.tokenizer().file_text)
    fields["added_tokens"].append({**fields["added_tokens"][0], "id": 400, "content": "<|im_end|>"})
    fields["model"]["vocab"]["<|im_end|>"] = 400
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(fields))
    arguments = {"vocab_size": 401, "tokenizer_path": str(path), "end_of_document": "<|im_end|>"}
    store = build(source, tmp_path / "store", **arguments)
    assert store.manifest.end_of_document_id == store.tokenizer().end_of_document_id == 400
    assert (store.train_stream().read(0, store.manifest.train.tokens) == 400).sum() == store.manifest.train.documents
    with pytest.raises(DataError, match=r"data\.end_of_document = '<\|endoftext\|>' .* end with id 400; remove"):
        build(source, tmp_path / "store", **arguments | {"end_of_document": END_OF_DOCUMENT})
    assert build(source, tmp_path / "store", **arguments | {"end_of_document": None}).manifest == store.manifest


def test_model_vocabulary_smaller_than_the_tokenizers_is_refused(finished: DocumentStore, source: Path, tmp_path: Path):
    size = finished.manifest.vocab_size
    fits(finished, vocab_size=size)
    fits(finished, vocab_size=size + 1)
    with pytest.raises(DataError, match=rf"model\.vocab_size = {size - 1}: .*set model\.vocab_size to {size} or more"):
        fits(finished, vocab_size=size - 1)
    with pytest.raises(DataError, match=rf"tokenizer '.*' has token ids up to {size - 1}"):  # before tokenising
        build(source, tmp_path / "s", vocab_size=size - 1, tokenizer_path=str(finished.path / "tokenizer.json"))


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_truncated_and_missing_files_are_named_all_at_once_and_when_they_are_read(store: DocumentStore):
    shard = store.manifest.train_shards[1]
    os.truncate(store.path / shard.name, 98)
    (store.path / "tokenizer.json").unlink()
    opened = open_store(store.path)
    with pytest.raises(DataError, match=r"is damaged: train-00001\.bin \(98 bytes, expected .*; delete the folder"):
        opened.train_stream().read(0, store.manifest.train.tokens)
    with pytest.raises(DataError, match=r"is damaged: tokenizer\.json \(missing, expected .*; delete the folder"):
        opened.tokenizer()
    with pytest.raises(DataError, match=r"is damaged: .*; delete the folder") as caught:
        opened.check_sizes()
    assert f"train-00001.bin (98 bytes, expected {shard.size_bytes} bytes)" in str(caught.value)
    assert "tokenizer.json (missing, expected" in str(caught.value)
    assert "train-00000.bin" not in str(caught.value)


def test_checksums_of_units_that_are_not_those_of_the_file_are_not_used(store: DocumentStore):
    units = store.path / "train-00001.crc"
    content = units.read_bytes()
    for damaged in (content[:-8], content[1:] + content[:1], None):
        units.unlink() if damaged is None else units.write_bytes(damaged)
        message = (
            r"train-00001\.crc is damaged: its checksums do not combine to that of train-00001\.bin in manifest\.json"
        )
        with pytest.raises(DataError, match=message):
            open_store(store.path).train_stream().read(0, store.manifest.train.tokens)
        with pytest.raises(
            DataError, match=r"train-00001\.crc is missing or damaged: train-00001\.bin cannot be verified"
        ):
            verify_store(store.path)


def test_lengths_are_counted_to_two_percent_and_add_up():
    counts, whole = [LengthCounts(), LengthCounts()], LengthCounts()
    lengths = [int(1.01**i) for i in range(2000)]
    for i, length in enumerate(lengths):
        counts[i % 2].add(length)
    for part in counts:
        whole.update(LengthCounts(part.pairs()))
    found = whole.quantiles()
    exact = {"least": 0, "p10": 199, "p50": 999, "p90": 1799, "p99": 1979, "most": 1999}
    for name, place in exact.items():
        assert lengths[place] <= getattr(found, name) <= 1.02 * lengths[place] + 1e-9, name


def test_flipped_bit_is_found_by_verify(store: DocumentStore):
    for name in ("heldout-00000.bin", "train-00002.bin"):
        content = bytearray((store.path / name).read_bytes())
        content[len(content) // 2] ^= 0x10
        (store.path / name).write_bytes(content)
    reopened = open_store(store.path)  # sizes are right
    with pytest.raises(
        DataError, match=r"is damaged:\n  - train-00002\.bin is damaged in 1 unit\(s\) .*\n  - heldout-0"
    ):
        verify_store(reopened.path)


def test_manifest_of_another_format_is_refused_as_such(store: DocumentStore):
    edit_manifest(store, format_version=5, something_new=[])
    with pytest.raises(DataError, match="has format 5, this Raynium reads 4; upgrade Raynium"):
        open_store(store.path)
    edit_manifest(store, format_version=1)
    with pytest.raises(DataError, match=r"has format 1, of an older Raynium, .* build the store again \(a run"):
        open_store(store.path)


@pytest.mark.parametrize("content", ["", "{", "\x00\x00", "[]", "null", "5", "9" * 5000, "[" * 100_000])
def test_manifest_that_is_none_is_refused(store: DocumentStore, content: str):
    (store.path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json is damaged: .*; delete the folder and build"):
        open_store(store.path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": "400"}, "vocab_size: Input should be a valid integer"),
        ({"format_version": "2"}, "format_version: Input should be 4"),
        ({"token_dtype": "int64"}, "token_dtype: Input should be 'uint16' or 'uint32'"),
        ({"train": lambda train: {**train, "tokens": 7}}, r"train\.shards\.tokens do not add up to 7"),
        ({"vocab_size": 65_537}, "vocab_size 65537 does not fit token_dtype uint16"),
        ({"end_of_document_id": 400}, "end_of_document_id 400 is outside the vocabulary"),
        ({"train": lambda train: with_shards(train, numbers=train["shards"]["numbers"][::-1])}, "numbers do not rise"),
        (
            {"train": lambda train: with_shards(train, numbers=[0])},
            r"columns of train\.shards are 1, \d+ and \d+ long",
        ),
        (
            {"train": lambda train: with_shards(train, crc64nvme="AAAA")},
            "is not the base64 of a list of 8-byte numbers",
        ),
        ({"train": {"documents": 1}}, r"train\.tokens: Field required"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"small_files": [{**SMALL, "name": "../x"}]}, r"small_files\.0\.name: String should match"),
        ({"small_files": [{**SMALL, "crc64nvme": ""}]}, r"small_files\.0\.crc64nvme: String should match"),
        ({"small_files": [SMALL] * 2}, "two files have the same name"),
        ({"unit_bytes": 262_142}, "unit_bytes: Input should be a multiple of 8"),
        ({"recipe": lambda recipe: {**recipe, "sources": ["elsewhere"]}}, "its crc64nvme does not match its contents"),
    ],
)
def test_manifest_with_wrong_fields_is_refused_by_name(store: DocumentStore, fields: dict[str, Any], message: str):
    now = json.loads((store.path / "manifest.json").read_text())
    edit_manifest(store, **{name: value(now[name]) if callable(value) else value for name, value in fields.items()})
    with pytest.raises(DataError, match=message):
        open_store(store.path)


def test_identity_ignores_where_the_data_lies_but_no_token_and_no_tokenizer(
    finished: DocumentStore, source: Path, tmp_path: Path
):
    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    copy = build(changed, tmp_path / "copy", unit_bytes=64).manifest
    assert copy.identity == finished.manifest.identity and copy.recipe != finished.manifest.recipe
    tokenizer_path = str(finished.path / "tokenizer.json")
    identities = {copy.identity}
    for held_out in (False, True):
        [first, *_] = [name for name in sorted(os.listdir(source)) if is_held_out(name, 0.2) == held_out]
        (changed / first).write_text((source / first).read_text().replace("only", "ylno"))
        identities.add(build(changed, tmp_path / f"{held_out}", tokenizer_path=tokenizer_path).manifest.identity)
    fields = json.loads(Path(tokenizer_path).read_text())
    (tmp_path / "other.json").write_text(json.dumps({**fields, "normalizer": {"type": "Lowercase"}}))
    lossy = build(source, tmp_path / "lossy", tokenizer_path=str(tmp_path / "other.json"))
    assert len(identities | {lossy.manifest.identity}) == 4


def test_identity_ignores_how_the_tokens_are_cut_into_shards(finished: DocumentStore, source: Path, tmp_path: Path):
    other = build(source, tmp_path / "other", split_bytes=10**6).manifest
    assert len(other.train_shards) == 1 < len(finished.manifest.train_shards)
    assert other.identity == finished.manifest.identity


def test_manifest_survives_its_own_json(finished: DocumentStore):
    assert StoreManifest.parse(finished.manifest.to_json(), "here") == finished.manifest


def test_path_without_a_store_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(DataError, match="is no document store"):
            open_store(path)


def test_building_and_reading_stores_loads_no_torch():
    """The driver and the CLI do it, and torch takes seconds to import."""
    script = "import sys, raynium.data.remote, raynium.data.build.store_build; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
