"""Finding damage in a checkpoint's files, and differences between two checkpoints."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import job_text

from raynium.checkpoint import compare
from raynium.checkpoint.catalog import choose_checkpoint
from raynium.checkpoint.compare import Comparison, differences
from raynium.checkpoint.format.batches import raw_bytes
from raynium.checkpoint.format.manifest import TensorEntry
from raynium.checkpoint.ref import CheckpointRef
from raynium.checkpoint.verify import verify_checkpoint
from raynium.config.load import parse_config
from raynium.errors import StoreError
from raynium.storage import verify as storage_verify
from raynium.storage.store import Store

CONFIG = parse_config(job_text())
UNIT = 4096


class Two(torch.nn.Module):
    """A large and a small parameter: 64 KiB and 512 bytes; on two ranks half of each."""

    def __init__(self, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.large = torch.nn.Parameter(torch.randn(128, 128, generator=generator))
        self.small = torch.nn.Parameter(torch.randn(128, generator=generator))


Save = Callable[..., Store]


@pytest.fixture
def ref(save_run: Save) -> CheckpointRef:
    """Saved by two ranks, in units of 4 KiB."""
    return choose_checkpoint(save_run(Two(), CONFIG, num_ranks=2, unit_bytes=UNIT))


def file_of(ref: CheckpointRef, shard: int) -> Path:
    return Path(ref.store.uri(ref.shard_key(shard)).removeprefix("file://"))


def entry(ref: CheckpointRef, name: str) -> TensorEntry:
    return next(each for each in ref.manifest.tensors if each.name == name)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


# ------------------------------------------------------------------------------------------------- verify


def test_a_whole_checkpoint_has_no_damage(ref: CheckpointRef) -> None:
    assert verify_checkpoint(ref, depth="stored") == verify_checkpoint(ref, depth="contents") == []


@pytest.mark.parametrize("name", ["model/large", "optimizer/exp_avg_sq/large", "model/small"])
def test_a_flipped_bit_is_found_with_its_tensor_and_bytes(ref: CheckpointRef, name: str) -> None:
    block = entry(ref, name).blocks[1]
    position = block.end - 1
    flip(file_of(ref, block.shard), position)
    assert verify_checkpoint(ref, depth="stored") == [], "a file system keeps no checksum to compare with"
    (damage,) = verify_checkpoint(ref, depth="contents")
    assert damage.uri == f"file://{file_of(ref, 1)}" and block.shard == 1
    assert damage.begin <= position < damage.end <= damage.begin + UNIT and damage.begin % UNIT == 0
    neighbours = {
        each.name
        for each in ref.manifest.tensors
        for block in each.blocks
        if block.shard == 1 and block.begin < damage.end and block.end > damage.begin
    }
    assert name in damage.tensors and set(damage.tensors) == neighbours
    assert f"bytes {damage.begin:,} to {damage.end:,} cannot be used, which hold {damage.tensors[0]}" in str(damage)
    assert f"{file_of(ref, 1)} is damaged in 1 unit(s) of 4,096 bytes (wrong CRC64NVME): bytes " in str(damage)


def test_a_flipped_bit_in_the_header_names_the_bytes_alone(ref: CheckpointRef) -> None:
    flip(file_of(ref, 0), 20)
    (damage,) = verify_checkpoint(ref, depth="contents")
    assert (damage.begin, damage.end, damage.tensors) == (0, UNIT, ())
    assert str(damage).endswith("bytes 0 to 4,096 cannot be used, which hold no tensor")


@pytest.mark.parametrize("depth", ["stored", "contents"])
def test_a_cut_file_is_lost_from_the_unit_that_is_not_whole(ref: CheckpointRef, depth) -> None:
    path, size = file_of(ref, 0), ref.manifest.shards[0].size
    small = entry(ref, "optimizer/exp_avg_sq/small").blocks[0]
    assert small.end == size, "the file's last tensor"
    path.write_bytes(path.read_bytes()[:-1])
    (damage,) = verify_checkpoint(ref, depth=depth)
    assert (damage.begin, damage.end) == ((size - 1) // UNIT * UNIT, size)
    assert "optimizer/exp_avg_sq/small" in damage.tensors and "model/large" not in damage.tensors
    assert f"has {size - 1:,} bytes instead of {size:,}" in str(damage)
    path.write_bytes(b"")
    (damage,) = verify_checkpoint(ref, depth=depth)
    assert (damage.begin, damage.end, len(damage.tensors)) == (0, size, 6)
    assert "optimizer/exp_avg_sq/large and 1 more" in str(damage)


def test_what_is_left_of_a_cut_file_is_read(ref: CheckpointRef) -> None:
    path = file_of(ref, 0)
    path.write_bytes(path.read_bytes()[: 3 * UNIT + 5])
    flip(path, UNIT)
    found = [(damage.begin, damage.end) for damage in verify_checkpoint(ref, depth="contents")]
    assert found == [(UNIT, 2 * UNIT), (3 * UNIT, ref.manifest.shards[0].size)]


def test_neighbouring_units_are_one_damage_also_where_reads_meet(
    ref: CheckpointRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_verify, "READ_BYTES", 2 * UNIT)
    size = ref.manifest.shards[1].size
    for unit in (1, 2, 3, 6, size // UNIT):
        flip(file_of(ref, 1), unit * UNIT)
    found = verify_checkpoint(ref, depth="contents")
    assert [(damage.begin // UNIT, damage.end) for damage in found] == [
        (1, 4 * UNIT), (6, 7 * UNIT), (size // UNIT, size),
    ]  # fmt: skip
    assert "is damaged in 3 unit(s) of 4,096 bytes" in str(found[0])


@pytest.mark.s3
def test_a_server_tells_what_it_holds_without_its_being_read(
    ref: CheckpointRef, s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(f"{s3_server.create_bucket('verify')}/runs/first", options=s3_server.options)
    for key in ref.store.list("checkpoints").sizes:
        store.replace(key, ref.store.read(key))
    remote = choose_checkpoint(store)
    assert verify_checkpoint(remote, depth="stored") == verify_checkpoint(remote, depth="contents") == []
    small = entry(ref, "model/small").blocks[1]
    data = bytearray(store.read(remote.shard_key(small.shard)))
    data[small.begin] ^= 1
    store.replace(remote.shard_key(small.shard), bytes(data))
    (located,) = verify_checkpoint(remote, depth="contents")
    assert "model/small" in located.tensors and located.end - located.begin <= UNIT
    monkeypatch.setattr(Store, "read_into", None)  # nothing may be read
    (damage,) = verify_checkpoint(remote, depth="stored")
    assert (damage.begin, damage.end) == (0, len(data)) and len(damage.tensors) == len(ref.manifest.tensors)
    assert re.search(r"is stored with CRC64NVME .* instead of .* \(verify --deep finds where\)", damage.reason)
    store.delete(remote.shard_key(0))
    assert verify_checkpoint(remote, depth="stored")[0].reason == "is missing"


@pytest.mark.parametrize("depth", ["stored", "contents"])
def test_a_missing_and_a_longer_file_are_lost_whole(ref: CheckpointRef, depth) -> None:
    file_of(ref, 0).unlink()
    with file_of(ref, 1).open("ab") as file:
        file.write(b"x")
    missing, longer = verify_checkpoint(ref, depth=depth)
    sizes = [shard.size for shard in ref.manifest.shards]
    assert (missing.begin, missing.end, missing.reason) == (0, sizes[0], "is missing")
    assert (longer.begin, longer.end) == (0, sizes[1])
    assert longer.reason == f"has {sizes[1] + 1:,} bytes instead of {sizes[1]:,}"
    assert len(missing.tensors) == len(longer.tensors) == len(ref.manifest.tensors)


def test_a_store_that_cannot_be_asked_is_no_damage(ref: CheckpointRef, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise StoreError("the network is down")

    monkeypatch.setattr(Store, "stored_checksum", broken)
    with pytest.raises(StoreError, match="the network is down"):
        verify_checkpoint(ref, depth="stored")


# ------------------------------------------------------------------------------------------------- compare


def found(first: CheckpointRef, second: CheckpointRef) -> dict[str, str]:
    return {each.name: each.text for each in differences(first, second)}


def test_another_layout_is_no_difference_and_another_number_is(ref: CheckpointRef, save_run: Save) -> None:
    model = Two()
    assert found(ref, choose_checkpoint(save_run(model, CONFIG, name="whole"))) == {}
    with torch.no_grad():
        model.large[3, 5:8] += 1
        model.small[7] = -0.0
    changed = choose_checkpoint(save_run(model, CONFIG, name="changed"))
    assert found(ref, changed) == {
        "model/large": "differs in 3 of 16,384 numbers",
        "model/small": "differs in 1 of 128 numbers",
    }


def test_numbers_are_compared_as_bits(save_run: Save) -> None:
    def saved(name: str, number: float) -> CheckpointRef:
        model = Two()
        with torch.no_grad():
            model.small[5] = number
        return choose_checkpoint(save_run(model, CONFIG, name=name))

    assert found(saved("nan", torch.nan), saved("nan-again", torch.nan)) == {}
    assert found(saved("zero", 0.0), saved("minus-zero", -0.0)) == {"model/small": "differs in 1 of 128 numbers"}


def test_names_shapes_and_dtypes_are_compared_first(ref: CheckpointRef, save_run: Save) -> None:
    other = Two()
    other.extra = torch.nn.Parameter(torch.ones(2))
    other.small = torch.nn.Parameter(torch.ones(2, 64))
    other.large = torch.nn.Parameter(other.large.detach().bfloat16())
    second = choose_checkpoint(save_run(other, CONFIG, name="other"))
    differing = found(ref, second)
    assert differing["model/extra"] == "is only in the second"
    assert found(second, ref)["model/extra"] == "is only in the first"
    assert differing["model/small"] == "is float32 [128] in the first and float32 [2, 64] in the second"
    assert differing["model/large"] == "is float32 [128, 128] in the first and bfloat16 [128, 128] in the second"


def test_many_batches_miss_nothing(ref: CheckpointRef, save_run: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "BATCH_BYTES", 1)
    second = choose_checkpoint(save_run(Two(seed=1), CONFIG, name="other"))
    assert found(ref, second).keys() == {"model/large", "model/small"}


class Layers(torch.nn.Module):
    """Four layers and a head. All of `seed`s numbers differ."""

    def __init__(self, seed: int = 0, *, num_layers: int = 4):
        super().__init__()
        self.layers = [Two(seed) for _ in range(num_layers)]
        self.blocks = torch.nn.ModuleList(self.layers)
        self.head = torch.nn.Parameter(torch.zeros(3))


def compared(save_run: Save, first: torch.nn.Module, second: torch.nn.Module) -> Comparison:
    return compare.compare(
        *(choose_checkpoint(save_run(each, CONFIG, name=f"r{id(each)}")) for each in (first, second))
    )


def test_layers_that_differ_alike_are_one_line_and_every_tensor_is_counted(save_run: Save) -> None:
    found = compared(save_run, Layers(), Layers(seed=1))
    assert found.lines() == [
        "model/blocks.[0-3].large differs in 16,384 of 16,384 numbers (all 4)",
        "model/blocks.[0-3].small differs in 128 of 128 numbers (all 4)",
    ]
    assert found.counts()["model"] == {"equal": 1, "different": 8, "only in the first": 0, "only in the second": 0}
    assert found.counts()["optimizer/exp_avg"]["equal"] == 9


def test_layers_that_differ_in_other_ways_have_lines_of_their_own(save_run: Save) -> None:
    other = Layers(num_layers=6)
    with torch.no_grad():
        other.head[1] = 1
        for layer, count in ((0, 2), (1, 1), (3, 7)):
            other.layers[layer].small[:count] += 1
    other.layers[2].small = torch.nn.Parameter(torch.ones(2, 64))
    found = compared(save_run, Layers(), other)
    ours = [line for line in found.lines() if line.startswith("model/")]
    assert ours == [
        "model/blocks.[0-1,3].small differs in 1 to 7 of 128 numbers (3 of 6)",
        "model/blocks.[2].small is float32 [128] in the first and float32 [2, 64] in the second (1 of 6)",
        "model/blocks.[4-5].large is only in the second (2 of 6)",
        "model/blocks.[4-5].small is only in the second (2 of 6)",
        "model/head differs in 1 of 3 numbers",
    ]
    assert found.counts()["model"] == {"equal": 4, "different": 5, "only in the first": 0, "only in the second": 4}
    assert sum(sum(counts.values()) for counts in found.counts().values()) == len(found.names)


def test_raw_bytes_are_those_of_the_values_in_order() -> None:
    tensor = torch.arange(6, dtype=torch.int16).reshape(2, 3).T
    assert bytes(raw_bytes(tensor)) == bytes(raw_bytes(tensor.contiguous())) == b"\0\0\3\0\1\0\4\0\2\0\5\0"
    assert bytes(raw_bytes(torch.tensor(1.0, dtype=torch.bfloat16))) == b"\x80\x3f"
