"""Saving, committing and loading: any layout to any layout, bit for bit, and what happens when it is not whole."""

import itertools
import logging
import math
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from raynium.checkpoint.catalog import CheckpointRef, latest, open_checkpoint
from raynium.checkpoint.checksum import PART_BYTES, UNIT_BYTES
from raynium.checkpoint.commit import StepTaken, commit_checkpoint
from raynium.checkpoint.image import TORCH_DTYPES, ImageFile, plan_image, write_image
from raynium.checkpoint.load import load_checkpoint, read_tensors
from raynium.checkpoint.manifest import ImageInfo, ShardEntry, manifest_key
from raynium.checkpoint.state import Chunk
from raynium.checkpoint.store import KeyExists, Store
from raynium.checkpoint.upload import upload_shard
from raynium.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch

SMALL_PART = 4096  # so that a test's tensors span many parts

Cuts = tuple[tuple[int, ...], ...]  # per dim, where the blocks begin (0 first)


def random_tensor(dtype: str, shape: Sequence[int], seed: int = 0) -> torch.Tensor:
    """Any bit pattern of that type, NaNs and denormals too."""
    generator = torch.Generator().manual_seed(seed)
    item_bytes = TORCH_DTYPES[dtype].itemsize
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (math.prod(shape) * item_bytes,), generator=generator)
    return raw.to(torch.uint8).view(TORCH_DTYPES[dtype]).reshape(tuple(shape)).clone()


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return torch.equal(first.contiguous().view(-1).view(torch.uint8), second.contiguous().view(-1).view(torch.uint8))


def split(name: str, tensor: torch.Tensor, cuts: Cuts) -> list[Chunk]:
    """The grid of blocks that begin at `cuts`, as views of `tensor` (so loading into them fills it)."""
    spans = [list(itertools.pairwise((*starts, size))) for starts, size in zip(cuts, tensor.shape, strict=True)]
    return [
        Chunk(
            name=name,
            global_shape=tuple(tensor.shape),
            offsets=tuple(start for start, _ in place),
            tensor=tensor[tuple(slice(*span) for span in place)],
            saved_here=True,
        )
        for place in itertools.product(*spans)
    ]


def stage(folder: Path, rank: int, chunks: Sequence[Chunk], step: int) -> ImageInfo:
    """What a rank does: its image in memory, described for its agent."""
    plan = plan_image(chunks)
    with ImageFile(folder / f"rank-{rank}") as image:
        write_image(plan, chunks, image.reserve(plan.size))
    return ImageInfo.from_json(plan.info(step=step, path=image.path).to_json())


def upload_all(
    store: Store,
    per_rank: Sequence[Sequence[Chunk]],
    *,
    step: int = 7,
    generation: str = "g1",
    unit_bytes: int = SMALL_PART,
) -> list[ShardEntry]:
    with TemporaryDirectory() as folder:
        return [
            ShardEntry.from_json(
                upload_shard(
                    store,
                    stage(Path(folder), rank, chunks, step),
                    generation=generation,
                    rank=rank,
                    unit_bytes=unit_bytes,
                ).to_json()
            )
            for rank, chunks in enumerate(per_rank)
        ]


def commit(store: Store, entries: Sequence[ShardEntry], *, step: int = 7, generation: str = "g1") -> CheckpointRef:
    return commit_checkpoint(
        store,
        step=step,
        generation=generation,
        entries=entries,
        state={"step": step, "samples": 2**53, "name": "é"},
        world_size=len(entries),
        layout={"data": len(entries)},
    )


def save(store: Store, per_rank: Sequence[Sequence[Chunk]], **which: Any) -> CheckpointRef:
    unit_bytes = which.pop("unit_bytes", SMALL_PART)
    return commit(store, upload_all(store, per_rank, unit_bytes=unit_bytes, **which), **which)


def halves(name: str, tensor: torch.Tensor) -> list[list[Chunk]]:
    """Two ranks, each with half of the rows."""
    return [[chunk] for chunk in split(name, tensor, ((0, tensor.shape[0] // 2), *((0,),) * (tensor.dim() - 1)))]


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "file":
        return Store(tmp_path / "run")
    return s3_store(request)


def s3_store(request: pytest.FixtureRequest) -> Store:
    server = request.getfixturevalue("s3_server")
    return Store(server.create_bucket(f"c-{uuid4().hex[:12]}") + "/run", options=server.options)


# ---- round trips --------------------------------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], list[list[Chunk]], dict[str, Cuts], int]:
    """Tensors, the blocks that each of some ranks saves, and how and by how many ranks they are loaded."""
    tensors: dict[str, torch.Tensor] = {}
    num_savers, num_loaders = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    per_rank: list[list[Chunk]] = [[] for _ in range(num_savers)]
    target: dict[str, Cuts] = {}
    for index in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 13) | st.just(40), max_size=3)))
        name = f"model/t{index}"
        tensors[name] = random_tensor(draw(st.sampled_from(sorted(TORCH_DTYPES))), shape, draw(st.integers(0, 99)))
        for chunk in split(name, tensors[name], draw(cuts(shape))):
            per_rank[draw(st.integers(0, num_savers - 1))].append(chunk)
        target[name] = draw(cuts(shape))
    return tensors, per_rank, target, num_loaders


@st.composite
def cuts(draw: st.DrawFn, shape: Sequence[int]) -> Cuts:
    return tuple(tuple(sorted({0} | draw(st.sets(st.integers(0, max(size - 1, 0)), max_size=3)))) for size in shape)


def check_round_trip(store: Store, layout: tuple[dict[str, torch.Tensor], list[list[Chunk]], dict[str, Cuts], int]):
    tensors, per_rank, target, num_loaders = layout
    ref = save(store, per_rank)
    assert open_checkpoint(store, 7).manifest == ref.manifest
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    chunks = [chunk for name, tensor in loaded.items() for chunk in split(name, tensor, target[name])]
    random.Random(0).shuffle(chunks)
    for rank in range(num_loaders):
        assert load_checkpoint(ref, chunks[rank::num_loaders]).state == ref.manifest.state
    for name, tensor in tensors.items():
        assert same_bits(tensor, loaded[name]), name
    whole = read_tensors(ref)
    assert whole.keys() == tensors.keys() and all(same_bits(whole[name], tensors[name]) for name in whole)


@given(layout=layouts())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_layout_loads_into_any_layout_from_files(layout) -> None:
    with TemporaryDirectory() as folder:
        check_round_trip(Store(folder), layout)


@pytest.fixture(scope="module")
def s3_folder(s3_server) -> Callable[[], Store]:
    """Makes empty stores in one bucket."""
    bucket = s3_server.create_bucket("layouts")
    return lambda: Store(f"{bucket}/{uuid4().hex}", options=s3_server.options)


@pytest.mark.s3
@given(layout=layouts())
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_layout_loads_into_any_layout_from_s3(s3_folder: Callable[[], Store], layout) -> None:
    check_round_trip(s3_folder(), layout)


def test_parts_of_full_size(store: Store) -> None:
    """One shard of more than two 64 MiB parts: multipart on S3, and each part read once."""
    tensor = random_tensor("bfloat16", (17_000, 4_096))
    ref = save(store, [split("model/w", tensor, ((0,), (0,)))], unit_bytes=UNIT_BYTES)
    assert len(ref.manifest.shards[0].part_crc64nvme) == 3

    whole = torch.zeros_like(tensor)
    loaded = load_checkpoint(ref, split("model/w", whole, ((0, 100, 9_000), (0, 5))))
    assert same_bits(whole, tensor) and loaded.num_bytes_read == ref.manifest.shards[0].size

    rows = torch.zeros(10, 4_096, dtype=torch.bfloat16)  # of the second part only
    only = Chunk("model/w", (17_000, 4_096), (9_000, 0), rows, saved_here=False)
    assert load_checkpoint(ref, [only]).num_bytes_read == PART_BYTES
    assert same_bits(rows, tensor[9_000:9_010])


def test_parameters_and_strided_blocks_are_saved_and_filled_in_place(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(6, 4))
    ref = save(Store(tmp_path), [[Chunk("model/w", (4, 6), (0, 0), weight.t(), saved_here=True)]])
    target = torch.nn.Parameter(torch.zeros(6, 4))
    load_checkpoint(ref, [Chunk("model/w", (4, 6), (0, 0), target.t(), saved_here=True)])
    assert same_bits(target.detach(), weight.detach()) and target.requires_grad


def test_optional_generators_may_be_absent(tmp_path: Path) -> None:
    state = random_tensor("uint8", (16,))
    ref = save(Store(tmp_path), [[Chunk("rng/rank00000", (16,), (0,), state, saved_here=True)]])
    there, new = torch.zeros_like(state), torch.zeros_like(state)
    wanted = [Chunk("rng/rank00000", (16,), (0,), there, True), Chunk("rng/rank00001", (16,), (0,), new, True)]
    assert load_checkpoint(ref, wanted).absent == ("rng/rank00001",)
    assert same_bits(there, state) and not new.any()


def test_blocks_of_other_ranks_are_not_saved(tmp_path: Path) -> None:
    mine = torch.ones(2)
    replica = Chunk("model/b", (2,), (0,), torch.ones(2), saved_here=False)
    info = stage(tmp_path, 0, [replica, Chunk("model/a", (2,), (0,), mine, saved_here=True)], step=1)
    assert [block.name for block in info.tensors] == ["model/a"]


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
    for block in info.tensors:
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
    monkeypatch.setattr("raynium.checkpoint.image._free_bytes", lambda path: 4096)
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
        monkeypatch.setattr("raynium.checkpoint.image._free_bytes", lambda path: 2**30)  # filled up since we asked
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
    attempt([first, second], "state: Value error, Out of range float values", state={"loss": math.nan})
    attempt([first, second], "state.chunks", state={"chunks": {1, 2}})
    store.delete("checkpoints/step-000000007/g1/shard-00001.safetensors")
    attempt([first, second], r"g1/shard-00001.safetensors is not there")
    assert latest(store) is None


def test_of_two_writers_of_one_step_exactly_one_wins(store: Store) -> None:
    tensor = random_tensor("float32", (8, 3))
    entries = {g: upload_all(store, halves("model/w", tensor), generation=g) for g in ("g1", "g2")}
    winner = commit(store, entries["g2"], generation="g2")
    with pytest.raises(StepTaken, match="another generation committed step 7 before g1"):
        commit(store, entries["g1"], generation="g1")
    assert open_checkpoint(store, 7).manifest == winner.manifest
    with pytest.raises(KeyExists):  # nor can it overwrite data
        upload_all(store, halves("model/w", tensor + 1), generation="g2")
    assert same_bits(read_tensors(winner)["model/w"], tensor)


def test_a_commit_whose_answer_was_lost_is_not_a_conflict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    entries = upload_all(store, halves("model/w", random_tensor("float32", (8, 3))))
    write_new = store.write_new
    monkeypatch.setattr(store, "write_new", lambda key, data: (write_new(key, data), write_new(key, data)))
    assert commit(store, entries).step == 7


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


def change(store: Store, key: str, edit: Callable[[bytearray], object]) -> None:
    data = bytearray(store.read(key))
    edit(data)
    store.replace(key, bytes(data))


def flip(position: int) -> Callable[[bytearray], object]:
    return lambda data: data.__setitem__(position, data[position] ^ 0x10)


def test_damage_is_refused_by_name(store: Store) -> None:
    tensor = random_tensor("float32", (64, 100))
    ref = save(store, halves("model/w", tensor))
    key = ref.shard_key(1)
    original = store.read(key)

    change(store, key, flip(SMALL_PART * 2 + 5))
    with pytest.raises(
        CheckpointDamaged, match=r"g1/shard-00001.safetensors is damaged in part 2 \(bytes 8,192 to 12,288\)"
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


def test_a_damaged_part_that_nobody_needs_does_not_stop_a_load(tmp_path: Path) -> None:
    tensor = random_tensor("float32", (64, 100))
    store = Store(tmp_path)
    ref = save(store, halves("model/w", tensor))
    change(store, ref.shard_key(0), flip(SMALL_PART + 5))
    rows = torch.zeros(32, 100)
    load_checkpoint(ref, [Chunk("model/w", (64, 100), (32, 0), rows, saved_here=True)])
    assert same_bits(rows, tensor[32:])


def test_a_damaged_newest_checkpoint_is_passed_over_loudly(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    for step in (5, 7):
        save(store, halves("model/w", torch.full((2, 2), float(step))), step=step)
    change(store, manifest_key(7), flip(300))
    with caplog.at_level(logging.WARNING):
        ref = latest(store)
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


def test_agents_and_coordinators_do_not_load_torch() -> None:
    modules = "store, file_store, s3_store, manifest, upload, commit, catalog, boxes, checksum, state"
    code = f"import sys; from raynium.checkpoint import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0


def test_a_store_of_files_does_not_load_s3fs(tmp_path: Path) -> None:
    code = f"import sys; from raynium.checkpoint.store import Store; Store({str(tmp_path)!r}).check_writable(); "
    code += "sys.exit('s3fs' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
