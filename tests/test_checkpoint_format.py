"""FORMAT.md is enough: a reader made of its words alone, without a line of Raynium's, reads what Raynium writes."""

import base64
import json
import math
import struct
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from awscrt.checksums import crc64nvme
from checkpoints import SMALL_UNIT, rows_of, split, stage

from raynium.checkpoint.commit import commit_checkpoint
from raynium.checkpoint.state import Chunk
from raynium.checkpoint.upload import upload_shard
from raynium.storage.checksum import UNIT_BYTES
from raynium.storage.store import Store

FORMAT = Path(__file__).parents[1] / "platform" / "raynium" / "checkpoint" / "FORMAT.md"
ITEM_BYTES = {"float64": 8, "int64": 8, "float32": 4, "bfloat16": 2, "uint8": 1, "bool": 1}
MANIFEST_FIELDS = [
    "step",
    "generation",
    "parent_step",
    "committed_unix",
    "world_size",
    "layout",
    "state",
    "metrics",
    "timing",
    "shards",
    "tensors",
]


class Reader:
    """Reads <run>/checkpoints/step-000000007 as FORMAT.md says."""

    def __init__(self, run: Path):
        self.folder = run / "checkpoints" / "step-000000007"
        first_line, rest = (self.folder / "manifest.json").read_bytes().split(b"\n", 1)
        head = json.loads(first_line[:-1] + b"}")
        assert list(head) == ["format", "version", "crc64nvme"]
        assert first_line == (
            b'{"format":"raynium-checkpoint","version":1,"crc64nvme":"%s",' % head["crc64nvme"].encode()
        )
        assert base64.b64decode(head["crc64nvme"]) == struct.pack(">Q", crc64nvme(b"1\n" + rest))
        self.manifest: dict[str, Any] = json.loads(b"{" + rest)

    def read(self, shard: dict[str, Any], begin: int, end: int) -> bytes:
        """Bytes [begin, end), of whole units that were checked."""
        size = shard["unit_bytes"]
        crcs = base64.b64decode(shard["unit_crc64nvme"])
        units = range(begin // size, math.ceil(end / size))
        data = b""
        with (self.folder / shard["key"]).open("rb") as file:
            for unit in units:
                file.seek(unit * size)
                bytes_of_unit = file.read(size)
                [expected] = struct.unpack_from(">Q", crcs, 8 * unit)
                assert crc64nvme(bytes_of_unit) == expected
                data += bytes_of_unit
        skipped = begin - units.start * size
        return data[skipped : skipped + end - begin]

    def blocks(self, entry: dict[str, Any]) -> list[dict[str, Any]]:
        """The columns of a tensor, block by block."""

        def numbers(column: int | list[int]) -> list[int]:
            return column if isinstance(column, list) else [column] * len(entry["shards"])

        dims = range(len(entry["global_shape"]))
        found = [
            {
                "shard": shard,
                "begin": numbers(entry["begins"])[index],
                "offsets": [numbers(entry["offsets"][dim])[index] for dim in dims],
                "shape": [numbers(entry["shapes"][dim])[index] for dim in dims],
            }
            for index, shard in enumerate(entry["shards"])
        ]
        for block in found:
            block["end"] = block["begin"] + math.prod(block["shape"]) * ITEM_BYTES[entry["dtype"]]
        return found

    def tensor(self, entry: dict[str, Any]) -> bytes:
        """All elements in C order, put together from the blocks."""
        item_bytes, shape = ITEM_BYTES[entry["dtype"]], entry["global_shape"]
        whole = bytearray(math.prod(shape) * item_bytes)
        for block in self.blocks(entry):
            data = self.read(self.manifest["shards"][block["shard"]], block["begin"], block["end"])
            for number, place in enumerate(product(*map(range, block["shape"]))):
                position = 0
                for size, offset, index in zip(shape, block["offsets"], place, strict=True):
                    position = position * size + offset + index
                element = data[number * item_bytes : (number + 1) * item_bytes]
                whole[position * item_bytes : (position + 1) * item_bytes] = element
        return bytes(whole)

    def header(self, shard: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """The safetensors header of a data file, and where tensor data begins."""
        data = (self.folder / shard["key"]).read_bytes()
        [length] = struct.unpack("<Q", data[:8])
        return json.loads(data[8 : 8 + length]), 8 + length


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(37, 60, generator=generator)
    return {
        "model/w": weights,
        "model/half": weights.bfloat16(),
        "optimizer/step": torch.tensor(3.5, dtype=torch.float64),
        "rng/rank-00000": torch.arange(200).to(torch.uint8),
        "model/mask": weights > 0,
    }


@pytest.fixture(scope="module", params=[SMALL_UNIT, UNIT_BYTES])
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tensors: Any) -> Reader:
    """Of a checkpoint by two ranks; one tensor is cut by columns too."""
    folder = tmp_path_factory.mktemp("format")
    cut = {name: tensor for name, tensor in tensors.items() if tensor.dim() and name != "model/half"}
    per_rank = [rows_of(cut, rank, 2) for rank in range(2)]
    quarters = split("model/half", tensors["model/half"], ((0, 11), (0, 23)))
    per_rank[0] += [*quarters[::2], Chunk("optimizer/step", (), (), tensors["optimizer/step"], saved_here=True)]
    per_rank[1] += quarters[1::2]
    store = Store(folder / "run")
    entries = [
        upload_shard(store, stage(folder, rank, chunks, 7), generation="g1", rank=rank, unit_bytes=request.param)
        for rank, chunks in enumerate(per_rank)
    ]
    commit_checkpoint(
        store,
        step=7,
        generation="g1",
        entries=entries,
        state={"step": 7, "name": "é"},
        world_size=2,
        layout={"data": 2},
        metrics={"eval/loss": 2.5},
        upload_seconds=0.25,
    )
    return Reader(folder / "run")


def test_every_tensor_is_read_with_the_documents_words_alone(reader: Reader, tensors: dict[str, torch.Tensor]) -> None:
    found = {entry["name"]: reader.tensor(entry) for entry in reader.manifest["tensors"]}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), name


def test_the_manifest_has_the_documented_fields(reader: Reader) -> None:
    manifest, text = reader.manifest, FORMAT.read_text()
    assert set(manifest) == set(MANIFEST_FIELDS)
    assert manifest["state"] == {"step": 7, "name": "é"} and manifest["metrics"] == {"eval/loss": 2.5}
    assert set(manifest["timing"]) == {"stall_seconds", "upload_seconds", "commit_seconds"}
    for field in (*MANIFEST_FIELDS, *manifest["timing"]):
        assert f"`{field}`" in text, f"FORMAT.md does not explain {field}"
    kinds = (manifest["shards"][0], manifest["tensors"][0])
    for field in {name for kind in kinds for name in kind}:
        assert f"`{field}`" in text, f"FORMAT.md does not explain {field}"
    assert str(UNIT_BYTES) in text


def test_data_files_are_as_documented(reader: Reader) -> None:
    for number, shard in enumerate(reader.manifest["shards"]):
        data = (reader.folder / shard["key"]).read_bytes()
        assert len(data) == shard["size"]
        assert base64.b64decode(shard["crc64nvme"]) == struct.pack(">Q", crc64nvme(data))
        header, begin = reader.header(shard)
        assert begin % 4096 == 0 and int(header.pop("__metadata__")["step"]) == 7
        documented = {
            f"{entry['name']}@{','.join(map(str, block['offsets']))}": [block["begin"] - begin, block["end"] - begin]
            for entry in reader.manifest["tensors"]
            for block in reader.blocks(entry)
            if block["shard"] == number
        }
        assert {name: each["data_offsets"] for name, each in header.items()} == documented
