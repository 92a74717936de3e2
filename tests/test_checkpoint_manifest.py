"""Manifests that were damaged, or made to harm: refused by name, never another exception."""

import base64
import copy
import itertools
import json
import math
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raynium.checkpoint.format.blocks import Block, Blocks, Tensor, check_blocks, to_column
from raynium.checkpoint.format.boxes import Box
from raynium.checkpoint.format.manifest import (
    CheckpointTooNew,
    FileEntry,
    ImageInfo,
    Manifest,
    SavedBlock,
    SavedBlocks,
    ShardEntry,
    TensorEntry,
    Timing,
    manifest_from_bytes,
    manifest_to_bytes,
    step_of_folder,
)
from raynium.checkpoint.load import load_checkpoint, read_tensors
from raynium.checkpoint.ref import CheckpointRef
from raynium.checkpoint.state import Chunk
from raynium.errors import CheckpointDamaged, RayniumError
from raynium.storage.checksum import FileChecksums, checksum, checksum_units, from_text, list_to_text, to_text
from raynium.storage.store import Store

SHARD = bytes(4096) + bytes(range(96))  # two float32 tensors: (4, 3) at 4096, (12,) at 4144


def manifest() -> Manifest:
    return Manifest(
        step=7,
        generation="g1",
        parent_step=None,
        committed_unix=1.5e9,
        world_size=1,
        layout={"tensor": 1},
        state={"step": 7, "seeds": [1, 2]},
        metrics={"eval/loss": 2.5},
        timing=Timing(stall_seconds=0.1, upload_seconds=2.0, commit_seconds=0.5),
        shards=(
            FileEntry(
                key="g1/shard-00000.safetensors",
                size=len(SHARD),
                crc64nvme=to_text(checksum(SHARD)),
                unit_bytes=4096,
                unit_crc64nvme=list_to_text([checksum(SHARD[:4096]), checksum(SHARD[4096:])]),
            ),
        ),
        tensors=(
            TensorEntry(
                name="model/a",
                dtype="float32",
                global_shape=(4, 3),
                shards=to_column([0, 0]),
                offsets=(to_column([0, 2]), to_column(0)),
                shapes=(to_column(2), to_column(3)),
                begins=to_column([4096, 4120]),
            ),
            TensorEntry(
                name="model/b",
                dtype="float32",
                global_shape=(12,),
                shards=to_column([0]),
                offsets=(to_column(0),),
                shapes=(to_column(12),),
                begins=to_column(4144),
            ),
        ),
    )


GOOD = manifest_to_bytes(manifest())


def fields() -> dict[str, Any]:
    return json.loads(b"{" + GOOD.partition(b"\n")[2])


def sealed(rest: str | dict[str, Any], version: int = 1) -> bytes:
    """A manifest with these contents and a right checksum, made as FORMAT.md tells other programs to."""
    tail = (rest if isinstance(rest, str) else json.dumps(rest)).encode()[1:]
    crc = base64.b64encode(checksum(b"%d\n" % version + tail).to_bytes(8, "big")).decode()
    return b'{"format":"raynium-checkpoint","version":%d,"crc64nvme":"%s",\n' % (version, crc.encode()) + tail


def test_a_manifest_is_plain_json_and_comes_back_equal() -> None:
    for data in (GOOD, sealed(fields())):
        found = manifest_from_bytes(data, where="m")
        assert found == manifest() and manifest_to_bytes(found) == GOOD
    whole = json.loads(GOOD)
    assert (
        whole["version"] == 1
        and whole["tensors"][0]["begins"] == [4096, 4120]
        and whole["tensors"][1]["begins"] == 4144
    )
    assert list(manifest().tensors[0].blocks) == [
        Block(shard=0, offsets=(0, 0), shape=(2, 3), begin=4096, end=4120),
        Block(shard=0, offsets=(2, 0), shape=(2, 3), begin=4120, end=4144),
    ]
    with pytest.raises(IndexError):
        manifest().tensors[0].blocks[2]


def test_a_state_that_looks_like_a_tensor_comes_back_as_it_was() -> None:
    """Columns become arrays while JSON is read, when nothing is known of where they stand."""
    state = {
        "begins": [1, 2],
        "shards": [[3], True, 1.5],
        "offsets": [[4, 5], [], 6, "x"],
        "shapes": None,
        "inner": [{"begins": [2**70], "shards": [], "offsets": [[True]]}, {"begins": [7], "shapes": 8}],
    }
    data = sealed(fields() | {"state": state, "layout": state, "metrics": {"begins": 3}})
    found = manifest_from_bytes(data, where="m")
    assert json.dumps(found.state) == json.dumps(found.layout) == json.dumps(state) and found.metrics == {"begins": 3}


def test_what_ranks_tell_of_their_blocks_comes_back_equal_and_is_checked() -> None:
    rows = [
        SavedBlock(name="model/a", dtype="float32", global_shape=(4, 3), offsets=(2, 0), shape=(2, 3), begin=4096),
        SavedBlock(name="step", dtype="int64", global_shape=(), offsets=(), shape=(), begin=4120),
    ]
    saved = SavedBlocks.of(rows)
    assert [row.end for row in rows] == [4120, 4128]
    assert (
        list(SavedBlocks.from_json(saved.to_json()).rows()) == rows and SavedBlocks.from_json(saved.to_json()) == saved
    )
    good = json.loads(saved.to_json())
    for changes, message in [
        ({"names": ["model/a"]}, "a column has 2 values instead of 1"),
        ({"dims": [2]}, "a column has 1 values instead of 2"),
        ({"dims": 2}, "a column has 1 values instead of 2"),
        ({"shapes": [2]}, "a column has 1 values instead of 2"),
        ({"dims": [2**59] * 2}, "a block has more than 32 dims"),
        ({"dtypes": ["int64", "int"]}, "dtype 'int' is not one of"),
        ({"names": ["model/a", "../x"]}, "should match pattern"),
        ({"begins": [4096, -1]}, "begins: .*integer is not"),
    ]:
        with pytest.raises(CheckpointDamaged, match=message):
            SavedBlocks.from_json(json.dumps(good | changes))


# ---- bytes that changed -------------------------------------------------------------------------------------------


@given(position=st.integers(0, len(GOOD) - 1), bit=st.integers(0, 7))
@settings(max_examples=300, deadline=None)
def test_any_flipped_bit_is_damage(position: int, bit: int) -> None:
    data = bytearray(GOOD)
    data[position] ^= 1 << bit
    with pytest.raises(CheckpointDamaged, match="s3://b/m"):
        manifest_from_bytes(bytes(data), where="s3://b/m")


@given(start=st.integers(0, len(GOOD)), length=st.integers(0, 40), insert=st.binary(max_size=20))
def test_any_cut_or_insertion_is_damage(start: int, length: int, insert: bytes) -> None:
    data = GOOD[:start] + insert + GOOD[start + length :]
    if data != GOOD:
        with pytest.raises(CheckpointDamaged):
            manifest_from_bytes(data, where="m")


@given(data=st.binary(max_size=300))
def test_any_other_bytes_are_damage(data: bytes) -> None:
    with pytest.raises(CheckpointDamaged):
        manifest_from_bytes(data, where="m")
    for record in (ImageInfo, ShardEntry, Manifest):
        with pytest.raises(CheckpointDamaged, match=record.__name__):
            record.from_json(data)


# ---- contents made to harm ----------------------------------------------------------------------------------------


def refused(message: str, **changes: Any) -> None:
    """`changes`: dotted path with _ for . → value."""
    data = fields()
    for path, value in changes.items():
        *route, last = path.split("__")
        target: Any = data
        for name in route:
            target = target[int(name) if name.isdigit() else name]
        target[int(last) if last.isdigit() else last] = value
    with pytest.raises(CheckpointDamaged, match=message):
        manifest_from_bytes(sealed(data), where="m")


def test_wrong_fields_are_named() -> None:
    refused("m is damaged: surprise: Extra inputs", surprise=1)
    refused(r"generation: .*should match pattern", generation="../g")
    refused(r"step: .*valid integer", step="7")
    refused(r"step: .*valid integer", step=7.0)
    refused(r"step: .*valid integer", step=True)
    refused(r"world_size: .*greater than or equal to 1", world_size=0)
    for wrong in (-1, 2**60, 2**70, 10**30):
        refused(r"tensors.0.begins: .*integer is not", tensors__0__begins=[4096, wrong])
    for wrong in (True, [4096, True], [4096, 4120.0], "4096", [[4096, 4120]], None, {}, [4096, None], 4096.0):
        refused(r"tensors.0.begins: .*not a valid integer, or list of integers", tensors__0__begins=wrong)
    refused(r"NaN is not JSON", committed_unix=math.nan)
    refused(r"NaN is not JSON", tensors__0__begins=[4096, math.nan])
    refused(r"tensors.1.dtype: .*dtype 'complex64' is not one of", tensors__1__dtype="complex64")
    refused(r"model/b: byte 4142 is no place for its elements", tensors__1__begins=4142)
    refused(r"model/b: byte 8 is no place", tensors__1__begins=8)
    refused(r"model/b: bytes 8192-8240 lie outside its shard", tensors__1__begins=8192)
    refused(r"model/b: bytes 4160-4208 lie outside its shard", tensors__1__begins=[4160])
    refused(r"model/a and model/b share bytes of g1/shard-00000", tensors__1__begins=4140)
    refused("model/b: shard 1 of 1", tensors__1__shards=[1])
    refused("tensors: two have the same name", tensors__1__name="model/a")
    refused("tensors.1.name: .*should match pattern", tensors__1__name="../../etc/passwd")
    refused(r"model/a: block \(3, 0\) \+ \(2, 3\) lies outside", tensors__0__offsets=[[0, 3], 0])
    refused(r"model/a: blocks .* overlap", tensors__0__offsets=[[0, 1], 0])
    refused(r"model/a: blocks cover 12 of 15 elements", tensors__0__global_shape=[5, 3])
    refused(r"model/a: .* another number of dims", tensors__0__offsets=[[0, 2]])
    refused(r"model/a: .* another number of dims", tensors__0__global_shape=[4])
    refused(r"model/a: a block is empty", tensors__0__shapes=[[0, 2], 3])
    refused(r"model/a: a block of shape .* is too large", tensors__0__shapes=[2**40, 2**40])
    refused(r"model/a: a block of shape .* is too large", tensors__0__shapes=[2**59, 1])  # 4 bytes each
    refused(r"tensors.0: .*shards is not a list", tensors__0__shards=[])
    refused(r"tensors.0: .*shards is not a list", tensors__0__shards=0)
    refused(r"tensors.0: .*a column has 1 numbers for 2 blocks", tensors__0__begins=[4096])
    refused(r"tensors.0: .*a column has 3 numbers for 2 blocks", tensors__0__offsets=[0, [0, 2, 4]])
    refused(r"shards: two have the same key", shards=[fields()["shards"][0]] * 2)
    refused(r"1 unit checksums for 4192 bytes", shards__0__unit_crc64nvme="AAAAAAAAAAA=")
    refused(r"do not combine to that of the whole", shards__0__crc64nvme="AAAAAAAAAAA=")
    refused(r"'AAAA' is not the base64 of 8 bytes", shards__0__crc64nvme="AAAA")
    refused(r"'A' is not base64", shards__0__crc64nvme="A")
    refused(r"shards.0.unit_bytes: .*multiple of 4096", shards__0__unit_bytes=4097)
    refused(r"'AAAA' is not the base64 of a list of 8-byte numbers", shards__0__unit_crc64nvme="AAAA")
    refused(r"'A' is not base64", shards__0__unit_crc64nvme="A")
    refused(r"shard-00000.* is not of generation g2", generation="g2")
    refused(r"metrics.eval/loss: .*valid number", metrics={"eval/loss": "low"})
    refused(r"timing.stall_seconds: .*greater than or equal to 0", timing__stall_seconds=-1.0)


@pytest.mark.parametrize(
    "key",
    [
        "../../secret",
        "/etc/passwd",
        "g1/../../x",
        "g1/shard-00000.safetensors/..",
        "s3://other/g1/shard-00000.safetensors",
        "g1\\shard-00000.safetensors",
        "g1/shard-00000.safetensors\n",
        "shard-00000.safetensors",
        "g1/SHARD-00000.safetensors",
    ],
)
def test_shards_outside_the_checkpoint_are_refused(key: str) -> None:
    refused(r"shards.0.key: .*should match pattern", shards__0__key=key)


def test_json_tricks_are_refused() -> None:
    text = json.dumps(fields())
    for trick, message in [
        (text.replace('"step": 7, "gen', '"step": 7, "step": 8, "gen'), "a field is given twice"),
        (text.replace('"seeds": [1, 2]', '"seeds": ' + "[" * 100_000 + "]" * 100_000), "recursion"),
        (text.replace('"seeds": [1, 2]', '"seeds": ' + "[" * 700 + "]" * 700), ""),
        (text.replace('"seeds": [1, 2]', '"seeds": 1e999'), "state: .*not JSON compliant"),
        (text.replace('"step": 7, "gen', '"step": ' + "7" * 5000 + ', "gen'), "digits"),
        (text.replace('"step": 7, "gen', '"step": ' + "7" * 4000 + ', "gen'), "step"),
        (text[:-1] + ", ", "damaged"),
        ("{" + "[]}", "damaged"),
    ]:
        assert trick != text
        try:
            manifest_from_bytes(sealed(trick), where="m")
            assert message == "", trick[:100]
        except CheckpointDamaged as error:
            assert message.split(".*")[-1] in str(error), error


def test_a_newer_format_is_refused_as_newer_and_an_impossible_one_as_damaged() -> None:
    with pytest.raises(CheckpointTooNew, match="m has format version 2, this Raynium reads up to 1: upgrade"):
        manifest_from_bytes(sealed({"whatever": []}, version=2), where="m")
    with pytest.raises(CheckpointDamaged, match="format version 0, which never existed"):
        manifest_from_bytes(sealed(fields(), version=0), where="m")
    with pytest.raises(CheckpointDamaged):  # a flipped bit in the version is not a newer format
        manifest_from_bytes(GOOD.replace(b'"version":1', b'"version":3'), where="m")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


nasty = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 10),
    st.sampled_from(
        [4095, 4096, 4100, 2**31, 2**53 + 1, 2**63, 10**30, 0.5, -0.0, 1e308, "", "..", "float64", "A" * 999]
    ),
    st.lists(st.integers(-1, 5), max_size=4),
    st.just({}),
)


@given(where=st.sampled_from([path for path in places(fields()) if path]), value=nasty, drop=st.booleans())
@settings(max_examples=400, deadline=None)
def test_any_changed_field_is_refused_or_harmless(where: tuple[Any, ...], value: Any, drop: bool) -> None:
    """With a right checksum, as an attacker would write it. Loading reads what is described or says why not."""
    data = copy.deepcopy(fields())
    target: Any = data
    for key in where[:-1]:
        target = target[key]
    if drop:
        del target[where[-1]]
    else:
        target[where[-1]] = value
    store = MemoryStore()
    try:
        ref = CheckpointRef(store, manifest_from_bytes(sealed(data), where="m"))  # pyright: ignore[reportArgumentType]
        load_checkpoint(ref, [Chunk("model/a", (4, 3), (0, 0), torch.zeros(4, 3), saved_here=True)])
        read_tensors(ref)
    except RayniumError:
        return
    one_unit_anyway = where == ("shards", 0, "unit_bytes")  # the shard is shorter than that
    harmless = (
        "step",
        "parent_step",
        "committed_unix",
        "world_size",
        "layout",
        "state",
        "metrics",
        "timing",
        "tensors",
    )
    assert one_unit_anyway or where[0] in harmless


class MemoryStore:
    """Holds the one shard, whatever it is called."""

    url = "memory"

    def uri(self, key: str) -> str:
        return f"memory/{key}"

    def size(self, key: str) -> int:
        return len(SHARD)

    def read_into(self, key: str, start: int, *buffers: memoryview) -> None:
        for buffer in buffers:
            buffer[:] = SHARD[start : start + len(buffer)]
            start += len(buffer)


# ---- tiling and checksums -----------------------------------------------------------------------------------------


@given(st.data())
def test_tiling_agrees_with_counting_every_element(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3)))
    dims = [st.tuples(st.integers(0, size - 1), st.integers(1, size)) for size in shape]
    boxes = [
        Box(tuple(start for start, _ in spans), tuple(length for _, length in spans))
        for spans in data.draw(st.lists(st.tuples(*dims), max_size=6))
    ]
    counts = dict.fromkeys(itertools.product(*(range(size) for size in shape)), 0)
    outside = False
    for box in boxes:
        for place in itertools.product(*(range(o, o + n) for o, n in zip(*box, strict=True))):
            outside |= place not in counts
            counts[place] = counts.get(place, 0) + 1
    assert (problem_of(shape, boxes) is None) == (not outside and set(counts.values()) == {1})


def problem_of(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """What is said of blocks at these places, each in a file of its own."""
    if not boxes:
        return "none"
    columns = [[to_column(list(column)) for column in zip(*places, strict=True)] for places in zip(*boxes, strict=True)]
    blocks = Blocks.of(
        1, shards=to_column(list(range(len(boxes)))), offsets=columns[0], shapes=columns[1], begins=to_column(4096)
    )
    try:
        check_blocks([Tensor("t", tuple(shape), blocks)], files=[(f"f{index}", 2**50) for index in range(len(boxes))])
    except ValueError as error:
        return str(error)
    return None


def test_a_block_in_the_place_of_another_is_seen_though_the_volume_is_right() -> None:
    """Grids, and a pinwheel, which is no grid: one block moved on top of others, with as many elements as before."""
    pinwheel = [Box((0, 0), (1, 2)), Box((0, 2), (2, 1)), Box((2, 1), (1, 2)), Box((1, 0), (2, 1)), Box((1, 1), (1, 1))]
    assert problem_of((3, 3), pinwheel) is None
    assert (
        problem_of((3, 3), [*pinwheel[:4], Box((0, 0), (1, 1))])
        == "t: blocks (0, 0) + (1, 2) and (0, 0) + (1, 1) overlap"
    )
    assert problem_of((3, 3), [*pinwheel[:4], Box((2, 2), (1, 1))]) is not None
    large = [Box((row * 8, column * 8), (8, 8)) for row in range(64) for column in range(64)]
    assert problem_of((512, 512), large) is None
    assert "overlap" in str(problem_of((512, 512), [*large[:-1], large[77]]))
    assert "cover 262,080 of 262,144" in str(problem_of((512, 512), large[:-1]))
    # Neither overlaps its neighbour in the order of offsets
    assert problem_of((2, 4), [Box((0, 0), (2, 1)), Box((0, 1), (1, 3)), Box((1, 0), (1, 3))]) == "t: blocks overlap"
    assert problem_of((), [Box((), ())]) is None
    assert "overlap" in str(problem_of((), [Box((), ())] * 2))


def test_what_a_column_of_one_number_says_takes_no_memory() -> None:
    """Else a small manifest could ask for much: here 2 bytes a block, and 64 columns."""
    count = 100_000
    tensor = fields()["tensors"][0] | {
        "shards": [0] * count,
        "global_shape": [1] * 32,
        "offsets": [0] * 32,
        "shapes": [1] * 32,
        "begins": 4096,
    }
    data = sealed(fields() | {"tensors": [tensor]})
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointDamaged, match=r"model/a: blocks .* overlap"):
            manifest_from_bytes(data, where="m")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60 * len(data), f"{peak:,} bytes for a manifest of {len(data):,}"  # all columns: 180 times


def test_checksums_are_those_of_s3() -> None:
    assert to_text(checksum(b"123456789")) == "rosUhgp5mIg="  # the published check value ae8b14860a799888
    data = bytes(range(256)) * 100
    parts = [data[start : start + 1000] for start in range(0, len(data), 1000)]
    assert FileChecksums(len(data), 1000, tuple(map(checksum, parts))).crc == checksum(data)
    for size in (0, 1, 8, 9, 255, 256, 257, 263, 8 * 40, 8 * 67, 8 * 128 + 3):  # one unit or none, odd numbers, pairs
        assert checksum_units(data[:size], 8).crc == checksum(data[:size])
    for bad in ("", "AAAAAAAAAAA", "AAAAAAAAAAB=", "é", "AAAAAAAAAAAA"):
        with pytest.raises(ValueError, match="base64"):
            from_text(bad)


def test_step_folders() -> None:
    assert (
        step_of_folder("checkpoints/step-000000012") == 12
        and step_of_folder("checkpoints/step-1234567890") == 1234567890
    )
    for other in ("checkpoints/step-12", "checkpoints/step-0000000012", "checkpoints/x", "other/step-000000012"):
        assert step_of_folder(other) is None
    assert isinstance(Store(Path("x")).url, str)
