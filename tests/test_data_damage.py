"""A bit that flips in a document store is found before anything is computed from it."""

import json
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import loader_of

from raynium.data import tokens
from raynium.data.baselines import compute_baselines
from raynium.data.build.store_build import build_store
from raynium.data.evaluation import evaluation_set
from raynium.data.manifest import StoreManifest
from raynium.data.rows import StreamRows
from raynium.data.store import DocumentStore, open_store
from raynium.data.verify import verify_store
from raynium.errors import DataError
from raynium.storage.checksum import num_units

UNIT = 64  # bytes: the stores of this file are small
SEQ_LEN = 16
NUM_FLIPS = 40


@pytest.fixture(scope="module", params=[10**6, 1000], ids=["one shard", "many shards"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DocumentStore:
    folder = tmp_path_factory.mktemp("damage")
    (folder / "source").mkdir()
    for i in range(60):
        (folder / "source" / f"{i}.txt").write_text(f"document {i} says {i * i} and then {i**3}\n" * (i % 7 + 1))
    return build_store(
        folder / "store",
        source=str(folder / "source"),
        vocab_size=300,
        heldout_fraction=0.2,
        split_bytes=request.param,
        unit_bytes=UNIT,
    )


@pytest.fixture
def copy(whole: DocumentStore, tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    return shutil.copytree(whole.path, tmp_path / "store")


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def uses(folder: Path) -> list[Callable[[DocumentStore], Any]]:
    """All that a run does with a store, one after the other."""

    def train(store: DocumentStore) -> list[torch.Tensor]:
        loader = loader_of(store, seq_len=SEQ_LEN, global_batch_size=2)
        batches = []
        try:
            for step in range(1, len(StreamRows(store, SEQ_LEN)) + 1):
                batches.append(loader.batch(step).tokens_BT)
        except DataError as error:
            raise DataError(f"after {len(batches)}: {error}") from error
        return batches

    return [
        train,
        lambda store: evaluation_set(store, seq_len=SEQ_LEN, batch_size=2, data_rank=0, data_size=1),
        lambda store: compute_baselines([store]),
        lambda store: store.tokenizer(),
    ]


def test_each_flipped_bit_is_found_before_its_first_use(whole: DocumentStore, copy: Path):
    """In shards, indexes, tokenizer and manifest, in proportion to nothing: each file gets its share of the flips."""
    chance = random.Random(5)
    good = [use(whole) for use in uses(whole.path)]
    names = sorted(file.name for file in whole.path.iterdir() if file.is_file())
    for number in range(NUM_FLIPS):
        path = copy / names[number % len(names)]
        bit = chance.randrange(8 * path.stat().st_size)
        flip(path, bit)
        if path.name == "manifest.json":
            with pytest.raises(DataError, match="manifest"):
                open_store(copy)
            with pytest.raises(DataError, match="manifest"):
                verify_store(copy)
            flip(path, bit)
            continue
        store = open_store(copy)  # sizes are right
        found = []
        for use, expected in zip(uses(copy), good, strict=True):
            try:
                result = use(store)
            except DataError as error:
                found.append(str(error))
            else:
                assert same(result, expected), f"bit {bit} of {path.name} is in what was read"
        unit = bit // 8 // UNIT
        assert found, f"bit {bit} of {path.name}"
        if path.suffix == ".crc":
            assert all(f"{path} is damaged: its checksums do not combine to that of" in text for text in found)
            with pytest.raises(DataError, match=rf"{path.name} is missing or damaged: .* cannot be verified"):
                verify_store(copy)
            flip(path, bit)
            continue
        for text in found:
            assert f"{path} is damaged in unit {unit}, bytes {unit * UNIT:,} to " in text
            assert f"`raynium data verify {copy}`" in text
        end = min((unit + 1) * UNIT, path.stat().st_size)
        with pytest.raises(DataError, match=rf"{path.name} is damaged .*: bytes {unit * UNIT:,} to {end:,}\n"):
            verify_store(copy)
        flip(path, bit)
    assert verify_store(copy) == whole.manifest


def same(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(map(torch.equal, one, other))
    if hasattr(one, "batches"):
        return all(torch.equal(a.labels_BT, b.labels_BT) for a, b in zip(one.batches, other.batches, strict=True))
    return one.sha256 == other.sha256 if hasattr(one, "sha256") else one == other


def test_batches_before_the_damage_are_those_of_the_whole_store(whole: DocumentStore, copy: Path):
    shards = whole.manifest.train_shards
    flip(copy / shards[len(shards) // 2].name, 8 * 300)
    damaged, good = (loader_of(open_store(path), seq_len=SEQ_LEN, global_batch_size=1) for path in (copy, whole.path))
    given_out, num_rows = 0, len(StreamRows(whole, SEQ_LEN))
    for step in range(1, num_rows + 1):
        try:
            batch = damaged.batch(step)
        except DataError:
            continue
        given_out += 1
        assert torch.equal(batch.tokens_BT, good.batch(step).tokens_BT)
    assert 0 < given_out < num_rows


def test_each_unit_is_verified_once_by_however_many_streams_and_threads(
    whole: DocumentStore, monkeypatch: pytest.MonkeyPatch
):
    verified: list[tuple[str, int]] = []
    check_unit = tokens.check_unit

    def recording(path: Path, content: memoryview, expected: Any, unit: int) -> None:
        verified.append((path.name, unit))
        check_unit(path, content, expected, unit)

    monkeypatch.setattr(tokens, "check_unit", recording)
    store, length = open_store(whole.path), whole.manifest.train.tokens
    store.train_stream().read(0, 1)
    assert verified == [("train-00000.bin", 0)]
    store.train_stream().gather(np.arange(0, length - SEQ_LEN, 7), SEQ_LEN)
    store.train_stream().read(0, length)
    units = sum(num_units(file.size_bytes, UNIT) for file in whole.manifest.train_shards)
    assert len(set(verified)) == len(verified) == units

    other = open_store(whole.path)
    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: results.append(other.train_stream().read(0, length).tobytes()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [store.train_stream().read(0, length).tobytes()] * 4


def test_the_command_verifies_a_folder_and_exits_with_1_if_it_is_damaged(
    whole: DocumentStore, copy: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("RAYNIUM_HOME", raising=False)
    monkeypatch.chdir(copy.parent)
    command = [str(Path(sys.executable).parent / "raynium"), "data", "verify", "./store"]
    good = subprocess.run(command, capture_output=True, text=True)
    assert good.returncode == 0 and "all checksums right" in good.stdout and whole.manifest.identity in good.stdout
    flip(copy / "tokenizer.json", 100)
    (copy / "heldout-documents.json").unlink()
    bad = subprocess.run(command, capture_output=True, text=True)
    assert bad.returncode == 1 and bad.stdout == "" and "Traceback" not in bad.stderr
    assert "\n  - tokenizer.json is damaged in 1 unit(s) of 64 bytes (wrong CRC64NVME): bytes 0 to 64\n" in bad.stderr
    assert "\n  - heldout-documents.json is missing: bytes 0 to" in bad.stderr


# ---- manifests -------------------------------------------------------------------------------------------------------


def refused_or_valid(content: bytes) -> StoreManifest | None:
    try:
        manifest = StoreManifest.parse(content, "here")
    except DataError as error:
        assert "here" in str(error)
        return None
    assert StoreManifest.parse(manifest.to_json(), "there") == manifest
    return manifest


@settings(max_examples=300, deadline=2000)
@given(data=st.data())
def test_a_manifest_with_other_bytes_is_refused_or_the_same(whole: DocumentStore, data: st.DataObject):
    content = bytearray(whole.manifest.to_json())
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(content) - 1))
        end = data.draw(st.integers(begin, min(begin + 40, len(content))))
        content[begin:end] = data.draw(st.binary(max_size=20) | st.sampled_from([b"{", b"]", b"1e999", b"NaN", b"\\u"]))
    assert refused_or_valid(bytes(content)) in (None, whole.manifest)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**19, 10**400) | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=2000)
@given(data=st.data())
def test_a_manifest_with_other_fields_is_refused(whole: DocumentStore, data: st.DataObject):
    fields = json.loads(whole.manifest.to_json())
    place: Any = fields
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    before, place[key] = place[key], data.draw(JSON)
    found = refused_or_valid(json.dumps(fields).encode())
    assert found is None or (place[key] == before and found == whole.manifest)


@settings(max_examples=100, deadline=2000)
@given(sizes=st.lists(st.integers(0, 2**61), min_size=3, max_size=3), unit_bytes=st.integers(0, 2**31))
def test_sizes_that_no_file_has_take_no_time_and_no_memory(whole: DocumentStore, sizes: list[int], unit_bytes: int):
    fields = json.loads(whole.manifest.to_json())
    tokens = fields["train"]["shards"]["tokens"]
    tokens[:3] = sizes[: len(tokens)]
    assert refused_or_valid(json.dumps(fields | {"unit_bytes": unit_bytes}).encode()) is None
