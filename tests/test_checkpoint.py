"""Saving and committing: the image, what makes a checkpoint, and what damage and contradiction look like."""

import logging
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    SMALL_UNIT,
    change,
    commit,
    file_or_s3_store,
    flip,
    halves,
    random_tensor,
    same_bits,
    save,
    split,
    stage,
    upload_all,
)
from safetensors import safe_open

from raynium.checkpoint.catalog import latest, open_checkpoint
from raynium.checkpoint.commit import StepTaken, commit_checkpoint
from raynium.checkpoint.format.image import TORCH_DTYPES, ImageFile, plan_image
from raynium.checkpoint.format.manifest import ShardEntry, manifest_key
from raynium.checkpoint.load import load_checkpoint, read_tensors
from raynium.checkpoint.state import Chunk
from raynium.checkpoint.upload import upload_shard
from raynium.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch
from raynium.storage.backend import KeyExists
from raynium.storage.store import Store


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return file_or_s3_store(request, tmp_path)


def test_blocks_of_other_ranks_are_not_saved(tmp_path: Path) -> None:
    mine = torch.ones(2)
    replica = Chunk("model/b", (2,), (0,), torch.ones(2), saved_here=False)
    info = stage(tmp_path, 0, [replica, Chunk("model/a", (2,), (0,), mine, saved_here=True)], step=1)
    assert [block.name for block in info.tensors.rows()] == ["model/a"]


# ---- the image ----------------------------------------------------------------------------------------------------


def test_plain_safetensors_opens_an_image(tmp_path: Path) -> None:
    tensors = {name: random_tensor(name, (3, 5), seed) for seed, name in enumerate(TORCH_DTYPES)}
    tensors["scalar"] = torch.tensor(3.5)
    chunks = [
        chunk
        for name, tensor in tensors.items()
        for chunk in split(f"model/{name}", tensor, ((0, 2), (0,)) if tensor.dim() else ())
    ]
    info = stage(tmp_path, 0, chunks, step=1)
    with safe_open(info.path, "pt") as file:
        assert len(file.keys()) == len(chunks)
        for chunk in chunks:
            stored = file.get_tensor(f"{chunk.name}@{','.join(map(str, chunk.offsets))}")
            assert same_bits(stored, chunk.tensor)
    for block in info.tensors.rows():
        assert block.begin % TORCH_DTYPES[block.dtype].itemsize == 0


def test_the_image_is_reserved_once_and_outlives_its_writer(tmp_path: Path) -> None:
    image = ImageFile(tmp_path / "image")
    first = image.reserve(8192)
    first[:3] = b"abc"
    assert image.reserve(8192)[:3] == b"abc" and (tmp_path / "image").stat().st_size == 8192
    first.release()
    assert len(image.reserve(4096)) == 4096 and (tmp_path / "image").stat().st_size == 4096
    view = image.reserve(4096)
    image.close()  # even where somebody still holds a view
    assert view[:3] == b"abc"
    with ImageFile(tmp_path / "image") as again:  # a restarted rank finds the memory of the dead one
        assert again.reserve(4096)[:3] == b"abc"
    again.unlink()
    assert not (tmp_path / "image").exists()


def test_too_little_shared_memory_is_explained_before_a_page_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raynium.checkpoint.format.image._free_bytes", lambda path: 4096)
    with pytest.raises(
        CheckpointError, match=r"needs 8,192 bytes at .* and 4,096 are free there: enlarge shared memory"
    ):
        ImageFile(tmp_path / "image").reserve(8192)


def test_a_full_tmpfs_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        image = ImageFile(tmp_path / "image")
        with pytest.raises(CheckpointError, match="enlarge shared memory"):
            image.reserve(2**20)
        monkeypatch.setattr(
            "raynium.checkpoint.format.image._free_bytes", lambda path: 2**30
        )  # filled up since we asked
        with pytest.raises(CheckpointError, match="enlarge shared memory"):
            image.reserve(2**20)
        image.reserve(2**15)
        image.unlink()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_unusable_image_paths_are_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot open the snapshot memory"):
        ImageFile(tmp_path / "no" / "image").reserve(4096)
    (tmp_path / "fifo-target").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="cannot open the snapshot memory"):
        ImageFile(tmp_path / "fifo-target").reserve(4096)
    with pytest.raises(CheckpointError, match="cannot reserve"):
        ImageFile("/dev/null").reserve(4096)


def test_types_that_checkpoints_cannot_hold_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"model/c is torch.complex64, which checkpoints cannot hold"):
        plan_image([Chunk("model/c", (1,), (0,), torch.zeros(1, dtype=torch.complex64), saved_here=True)])


# ---- commit -------------------------------------------------------------------------------------------------------


def test_a_half_saved_checkpoint_does_not_exist(store: Store) -> None:
    tensor = random_tensor("float32", (8, 3))
    entries = upload_all(store, halves("model/w", tensor))
    assert latest(store) is None
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7"):
        open_checkpoint(store, 7)
    commit(store, entries)
    ref = latest(store)
    assert ref is not None and ref.step == 7 and ref.uri.endswith("/checkpoints/step-000000007")


def test_what_is_not_one_whole_checkpoint_is_not_committed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    tensor = random_tensor("float32", (8, 3))
    first, second = upload_all(store, halves("model/w", tensor))
    other_dtype = upload_all(store, halves("model/w", tensor.double()), generation="g2")
    same_half = upload_all(store, [[halves("model/w", tensor)[0][0]]] * 2, generation="g3")
    lone = upload_all(store, [[halves("model/w", tensor)[0][0]], []], generation="g4")

    def attempt(entries: Sequence[ShardEntry], problem: str, **changes: Any) -> None:
        fields: dict[str, Any] = {"step": 7, "generation": "g1", "world_size": 2, "layout": {}, "state": {}} | changes
        with pytest.raises(CheckpointError, match=problem):
            commit_checkpoint(store, entries=entries, **fields)

    attempt([first], r"1 shards for 2 ranks, wrong or missing: \['g1/shard-00001.safetensors'\]")
    attempt([first, first], "1 ranks|2 shards for 2 ranks")
    attempt([first, other_dtype[1]], "g2/shard-00001")  # of a writer that should be dead
    attempt([first, second], "g1/shard-00000.safetensors is of step 7", step=8)
    attempt(same_half, r"model/w: blocks \(0, 0\) \+ \(4, 3\) and .* overlap", generation="g3")
    attempt(lone, "model/w: blocks cover 12 of 24 elements", generation="g4")
    renamed = second.model_copy(update={"file": other_dtype[1].file.model_copy(update={"key": second.file.key})})
    attempt([first, renamed.model_copy(update={"tensors": other_dtype[1].tensors})], r"model/w is float64 \(8, 3\)")
    for shape in ((12, 3), (8, 3, 1), ()):
        of_shape = [[Chunk("model/w", shape, (0,) * len(shape), random_tensor("float32", shape), saved_here=True)]]
        [odd] = upload_all(store, of_shape, generation=f"s{len(shape)}{math.prod(shape)}")
        text = re.escape(f"model/w is float32 {shape} in g1/shard-00001.safetensors and float32 (8, 3) elsewhere")
        attempt([first, renamed.model_copy(update={"tensors": odd.tensors})], text)
    attempt([first, second], "state: Value error, Out of range float values", state={"loss": math.nan})
    attempt([first, second], "state.chunks", state={"chunks": {1, 2}})
    store.delete("checkpoints/step-000000007/g1/shard-00001.safetensors")
    attempt([first, second], r"g1/shard-00001.safetensors is not there")
    assert latest(store) is None


def test_of_two_writers_of_one_step_exactly_one_wins(store: Store) -> None:
    tensor = random_tensor("float32", (8, 3))
    entries = {g: upload_all(store, halves("model/w", tensor), generation=g) for g in ("g1", "g2")}
    winner = commit(store, entries["g2"], generation="g2")
    with pytest.raises(StepTaken, match="exists: generation g2 committed step 7 before g1"):
        commit(store, entries["g1"], generation="g1")
    assert open_checkpoint(store, 7).manifest == winner.manifest
    with pytest.raises(KeyExists):  # nor can it overwrite data
        upload_all(store, halves("model/w", tensor + 1), generation="g2")
    assert same_bits(read_tensors(winner)["model/w"], tensor)


def test_a_commit_that_its_own_generation_tries_again_stands(store: Store) -> None:
    entries = upload_all(store, halves("model/w", random_tensor("float32", (8, 3))))
    first = commit(store, entries)
    assert commit(store, entries).manifest == first.manifest == open_checkpoint(store, 7).manifest


def test_a_generation_id_must_fit_a_key(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"generation '../g' is not valid"):
        upload_all(Store(tmp_path), halves("model/w", torch.zeros(2, 1)), generation="../g")


def test_an_image_that_is_not_the_one_described_is_refused(tmp_path: Path) -> None:
    info = stage(tmp_path, 0, halves("model/w", torch.zeros(2, 1))[0], step=1)
    with Path(info.path).open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="another writer uses the same path"):
        upload_shard(Store(tmp_path / "run"), info, generation="g1", rank=0)


# ---- damage -------------------------------------------------------------------------------------------------------


def test_damage_is_refused_by_name(store: Store) -> None:
    tensor = random_tensor("float32", (64, 100))
    ref = save(store, halves("model/w", tensor))
    key = ref.shard_key(1)
    original = store.read(key)

    change(store, key, flip(SMALL_UNIT * 2 + 5))
    with pytest.raises(
        CheckpointDamaged,
        match=r"shard-00001.safetensors is damaged in bytes 8,192 to 12,288, which hold model/w: CRC64NVME .* instead",
    ):
        read_tensors(ref)
    change(store, key, lambda data: data.pop())
    with pytest.raises(CheckpointDamaged, match=r"shard-00001.safetensors has 16,895 bytes instead of 16,896"):
        read_tensors(ref)
    store.delete(key)
    with pytest.raises(CheckpointDamaged, match=r"shard-00001.safetensors is missing"):
        read_tensors(ref)
    store.replace(key, original)
    assert same_bits(read_tensors(ref)["model/w"], tensor)


def test_a_damaged_unit_that_nobody_needs_does_not_stop_a_load(tmp_path: Path) -> None:
    tensor = random_tensor("float32", (64, 100))
    store = Store(tmp_path)
    ref = save(store, halves("model/w", tensor))
    change(store, ref.shard_key(0), flip(SMALL_UNIT + 5))
    rows = torch.zeros(32, 100)
    load_checkpoint(ref, [Chunk("model/w", (64, 100), (32, 0), rows, saved_here=True)])
    assert same_bits(rows, tensor[32:])


def test_a_damaged_newest_checkpoint_is_passed_over_only_where_asked_and_loudly(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (5, 7):
        save(store, halves("model/w", torch.full((2, 2), float(step))), step=step)
    change(store, manifest_key(7), flip(300))
    with pytest.raises(CheckpointDamaged, match=r"step-000000007/manifest.json is damaged"):
        latest(store)
    with caplog.at_level(logging.WARNING):
        ref = latest(store, if_damaged="use_older")
    assert ref is not None and ref.step == 5
    assert "CHECKPOINT DAMAGED" in caplog.text and "step-000000007/manifest.json is damaged" in caplog.text
    with pytest.raises(CheckpointDamaged, match="crc64nvme does not match"):
        open_checkpoint(store, 7)


# ---- contradiction ------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    tensors = {f"model/layer{index}": torch.zeros(4, 2) for index in range(8)}
    ref = save(Store(tmp_path), [[Chunk(n, (4, 2), (0, 0), t, True) for n, t in tensors.items()]])

    def wanted(name: str, tensor: torch.Tensor) -> list[Chunk]:
        return [Chunk(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor, saved_here=True)]

    with pytest.raises(CheckpointMismatch, match=r"lacks model/new, which .* holds model/layer0, .* and 3 more"):
        load_checkpoint(ref, wanted("model/new", torch.zeros(1)))
    with pytest.raises(
        CheckpointMismatch, match=r"layer1 is float32 \(4, 2\) in the checkpoint and float32 \(4, 3\) in this"
    ):
        load_checkpoint(ref, wanted("model/layer1", torch.zeros(4, 3)))
    with pytest.raises(CheckpointMismatch, match=r"layer1 is float32 \(4, 2\) .* and bfloat16 \(4, 2\)"):
        load_checkpoint(ref, wanted("model/layer1", torch.zeros(4, 2, dtype=torch.bfloat16)))
    with pytest.raises(CheckpointMismatch, match=r"holds no tensor named optimizer/…: it has model/layer0"):
        read_tensors(ref, prefix="optimizer/")


# ---- weight of imports --------------------------------------------------------------------------------------------


def test_a_store_of_files_does_not_load_s3fs(tmp_path: Path) -> None:
    code = f"import sys; from raynium.storage.store import Store; Store({str(tmp_path)!r}).check_writable(); "
    code += "sys.exit('s3fs' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
