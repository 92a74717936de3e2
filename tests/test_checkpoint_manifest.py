"""Manifests that were damaged, or made to harm: refused by name, never another exception."""

import base64
import copy
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raynium.checkpoint.boxes import Box, intersect, tiling_problem
from raynium.checkpoint.catalog import CheckpointRef
from raynium.checkpoint.checksum import FileChecksums, checksum, combine, from_text, list_to_text, to_text
from raynium.checkpoint.load import load_checkpoint, read_tensors
from raynium.checkpoint.manifest import (
    Block,
    CheckpointTooNew,
    FileEntry,
    ImageInfo,
    Manifest,
    ShardEntry,
    TensorEntry,
    Timing,
    manifest_from_bytes,
    manifest_to_bytes,
    step_of_folder,
)
from raynium.checkpoint.state import Chunk
from raynium.checkpoint.store import Store
from raynium.errors import CheckpointDamaged, RayniumError

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
                blocks=(
                    Block(shard=0, offsets=(0, 0), shape=(2, 3), begin=4096, end=4120),
                    Block(shard=0, offsets=(2, 0), shape=(2, 3), begin=4120, end=4144),
                ),
            ),
            TensorEntry(
                name="model/b",
                dtype="float32",
                global_shape=(12,),
                blocks=(Block(shard=0, offsets=(0,), shape=(12,), begin=4144, end=4192),),
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
    assert manifest_from_bytes(GOOD, where="m") == manifest() == manifest_from_bytes(sealed(fields()), where="m")
    whole = json.loads(GOOD)
    assert whole["version"] == 1 and whole["tensors"][1]["blocks"][0]["begin"] == 4144


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
    refused(r"tensors.0.blocks.1.begin: .*greater than or equal to 0", tensors__0__blocks__1__begin=-1)
    refused(r"NaN is not JSON", committed_unix=math.nan)
    refused(r"NaN is not JSON", tensors__0__blocks__0__end=math.nan)
    refused(r"tensors.1: .*dtype 'complex64' is not one of", tensors__1__dtype="complex64")
    refused(r"bytes 4144-4188 do not fit a float32 block of shape \(12,\)", tensors__1__blocks__0__end=4188)
    refused(r"byte 4142 is no place for a float32", tensors__1__blocks__0__begin=4142, tensors__1__blocks__0__end=4190)
    refused(r"byte 8 is no place", tensors__1__blocks__0__begin=8, tensors__1__blocks__0__end=56)
    refused(
        r"model/b: bytes 8192-8240 lie outside its shard",
        tensors__1__blocks__0__begin=8192,
        tensors__1__blocks__0__end=8240,
    )
    refused(
        r"model/a and model/b share bytes of g1/shard-00000",
        tensors__1__blocks__0__begin=4140,
        tensors__1__blocks__0__end=4188,
    )
    refused("model/b: shard 1 of 1", tensors__1__blocks__0__shard=1)
    refused("tensors: two have the same name", tensors__1__name="model/a")
    refused("tensors.1.name: .*should match pattern", tensors__1__name="../../etc/passwd")
    refused(r"model/a: block \(3, 0\) \+ \(2, 3\) lies outside", tensors__0__blocks__1__offsets=[3, 0])
    refused(r"model/a: blocks .* overlap", tensors__0__blocks__1__offsets=[1, 0])
    refused(r"model/a: blocks cover 12 of 15 elements", tensors__0__global_shape=[5, 3])
    refused(r"model/a: .* another number of dims", tensors__0__blocks__1__offsets=[2])
    refused(
        r"model/a: a block is empty",
        tensors__0__blocks__0={"shard": 0, "offsets": [0, 0], "shape": [0, 3], "begin": 4096, "end": 4096},
    )
    refused(r"tensors.0.blocks: .*at least 1 item", tensors__0__blocks=[])
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
    assert (tiling_problem(shape, boxes) is None) == (not outside and set(counts.values()) == {1})


def test_checking_a_large_tensor_does_not_compare_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = [Box((row * 8, column * 8), (8, 8)) for row in range(64) for column in range(64)]  # 64 × 64 ranks
    comparisons: list[tuple[Box, Box]] = []

    def counted(first: Box, second: Box) -> Box | None:
        comparisons.append((first, second))
        return intersect(first, second)

    monkeypatch.setattr("raynium.checkpoint.boxes.intersect", counted)
    assert tiling_problem((512, 512), boxes) is None
    assert len(comparisons) < len(boxes) * 64  # all pairs: 8 million
    assert "overlap" in str(tiling_problem((512, 512), [*boxes, boxes[77]]))


def test_checksums_are_those_of_s3() -> None:
    assert to_text(checksum(b"123456789")) == "rosUhgp5mIg="  # the published check value ae8b14860a799888
    data = bytes(range(256)) * 100
    parts = [data[start : start + 1000] for start in range(0, len(data), 1000)]
    assert combine([checksum(part) for part in parts], [len(part) for part in parts]) == checksum(data)
    assert FileChecksums(0, 1000, ()).crc == checksum(b"") == 0
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
