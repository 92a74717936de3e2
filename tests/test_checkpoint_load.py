"""Loading: any layout from any layout, bit for bit, with few bytes fetched and little memory taken."""

import itertools
import math
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import pytest
import torch
from checkpoints import (
    SMALL_UNIT,
    Cuts,
    change,
    counted,
    file_or_s3_store,
    flip,
    halves,
    random_tensor,
    rows_of,
    same_bits,
    save,
    split,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raynium.checkpoint import reads
from raynium.checkpoint.catalog import open_checkpoint
from raynium.checkpoint.format.boxes import Box, spans
from raynium.checkpoint.format.image import TORCH_DTYPES
from raynium.checkpoint.load import load_checkpoint, read_tensors
from raynium.checkpoint.reads import REQUEST_BYTES, STREAMS
from raynium.checkpoint.ref import CheckpointRef
from raynium.checkpoint.state import Chunk
from raynium.errors import CheckpointDamaged, StoreError
from raynium.storage.checksum import PART_BYTES, UNIT_BYTES
from raynium.storage.store import Store


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return file_or_s3_store(request, tmp_path)


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


@given(layout=layouts(), request_units=st.sampled_from([1, 3, 4096]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_layout_loads_into_any_layout_from_files(layout, request_units: int) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reads, "REQUEST_BYTES", request_units * SMALL_UNIT)
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


def test_requests_of_full_size(store: Store) -> None:
    """One shard of 140 MiB: multipart on S3, several requests, each unit read once."""
    tensor = random_tensor("bfloat16", (17_000, 4_096))
    ref = save(store, [split("model/w", tensor, ((0,), (0,)))], unit_bytes=UNIT_BYTES)
    assert ref.manifest.num_bytes > 2 * PART_BYTES > REQUEST_BYTES

    whole = torch.zeros_like(tensor)
    loaded = load_checkpoint(ref, split("model/w", whole, ((0, 100, 9_000), (0, 5))))
    assert same_bits(whole, tensor)
    assert loaded.num_bytes_read == ref.manifest.shards[0].size - UNIT_BYTES, "all but the header, a unit of its own"

    rows = torch.zeros(10, 4_096, dtype=torch.bfloat16)  # 80 KiB, in the middle of a unit
    only = Chunk("model/w", (17_000, 4_096), (9_000, 0), rows, saved_here=False)
    assert load_checkpoint(ref, [only]).num_bytes_read == UNIT_BYTES
    assert same_bits(rows, tensor[9_000:9_010])


LLAMA_LAYER = {
    "q": (512, 512),
    "k": (128, 512),
    "v": (128, 512),
    "o": (512, 512),
    "gate": (2048, 512),
    "up": (2048, 512),
    "down": (512, 2048),
    "norm": (512,),
}


@pytest.mark.parametrize("num_savers", [1, 2, 16])
def test_a_reshard_fetches_little_more_than_it_needs(tmp_path: Path, num_savers: int) -> None:
    """One of 8 ranks reads its rows of every tensor: at most 1.1 times their bytes, straight into place.

    A sixteenth of a layer of Llama 3.2 1B, and units of a twentieth of 256 KiB that no tensor is aligned with.
    """
    unit_bytes = 3 * SMALL_UNIT
    shapes = {**LLAMA_LAYER, "embedding": (2_000, 512)}
    tensors = {
        f"{kind}/{name}": random_tensor("float32", shape, seed)
        for kind in ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq")
        for seed, (name, shape) in enumerate(shapes.items())
    }
    per_rank = [rows_of(tensors, rank, num_savers) for rank in range(num_savers)]
    store, ref = counted(save(Store(tmp_path), per_rank, unit_bytes=unit_bytes))
    for rank in (0, 5):
        mine = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        chunks = rows_of(mine, rank, 8)
        store.reads.clear()
        loaded = load_checkpoint(ref, chunks)
        needed = sum(chunk.tensor.nbytes for chunk in chunks)
        assert needed <= loaded.num_bytes_read == store.num_bytes <= 1.1 * needed
        assert store.bytes_into([chunk.tensor for chunk in chunks]) == needed, "copied, where it could be read in place"
        for chunk in chunks:
            start = chunk.offsets[0]
            assert same_bits(chunk.tensor, tensors[chunk.name][start : start + len(chunk.tensor)])


def test_each_unit_is_fetched_once_whatever_is_wanted_of_it(tmp_path: Path) -> None:
    """Columns through scratch memory, the same rows twice, and rows that reach into one another."""
    tensor = random_tensor("float32", (300, 100))
    store, ref = counted(save(Store(tmp_path), halves("model/w", tensor)))
    loaded = [torch.zeros(300, 60), torch.zeros(200, 100), torch.zeros(200, 100), torch.zeros(150, 100)]
    places = [(0, 40), (100, 0), (100, 0), (50, 0)]
    load_checkpoint(ref, [Chunk("model/w", (300, 100), p, t, False) for p, t in zip(places, loaded, strict=True)])
    for place, part in zip(places, loaded, strict=True):
        rows = slice(place[0], place[0] + len(part))
        assert same_bits(part, tensor[rows, place[1] :])
    assert store.num_bytes == tensor.nbytes  # the headers are units of their own
    assert store.bytes_into(loaded) == 0


def test_what_nobody_wants_is_asked_around_unless_it_is_small(tmp_path: Path) -> None:
    rows = 2 * SMALL_UNIT // 4  # numbers in two units
    tensor = random_tensor("float32", (4, 6, rows))
    store, ref = counted(save(Store(tmp_path), [split("model/w", tensor, ((0,), (0,), (0,)))]))
    mine = torch.zeros(4, 1, rows)
    load_checkpoint(ref, [Chunk("model/w", (4, 6, rows), (0, 3, 0), mine, saved_here=False)])
    assert same_bits(mine, tensor[:, 3:4])
    assert len(store.reads) == 4 and store.num_bytes == store.bytes_into([mine]) == mine.nbytes
    store.reads.clear()
    mine = torch.zeros(4, 5, rows - 1)  # between them lies one number, or less than two units
    load_checkpoint(ref, [Chunk("model/w", (4, 6, rows), (0, 1, 0), mine, saved_here=False)])
    assert same_bits(mine, tensor[:, 1:, :-1]) and len(store.reads) == 4


def test_a_load_needs_little_memory_beside_its_destination(tmp_path: Path) -> None:
    """As a process of its own, because memory that others gave back would hide it."""
    tensor = random_tensor("uint8", (3 * 2**20, 64))  # 192 MiB
    save(Store(tmp_path), [split("model/w", tensor, ((0,), (0,)))], unit_bytes=UNIT_BYTES)
    code = f"""
import resource, torch
from raynium.checkpoint.catalog import latest
from raynium.checkpoint.load import load_checkpoint
from raynium.checkpoint.state import Chunk
from raynium.storage.store import Store
from raynium.errors import CheckpointDamaged, StoreError
ref = latest(Store({str(tmp_path)!r}))
tensor = torch.ones(ref.manifest.tensors[0].global_shape, dtype=torch.uint8)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
load_checkpoint(ref, [Chunk("model/w", tuple(tensor.shape), (0, 0), tensor, False)])
straight = peak() - before
load_checkpoint(ref, [Chunk("model/w", tuple(tensor.shape), (0, 0), tensor[:, :60], False)])
print(straight, peak() - before)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    straight_kib, columns_kib = map(int, ran.stdout.split())
    assert straight_kib < 16 * 1024
    assert columns_kib < (STREAMS * REQUEST_BYTES + 32 * 2**20) // 1024


def test_a_load_into_another_dtype_is_asked_for(tmp_path: Path) -> None:
    tensor = torch.randn(64, 100)
    ref = save(Store(tmp_path), halves("model/w", tensor))
    rounded = torch.zeros(64, 100, dtype=torch.bfloat16)
    load_checkpoint(ref, [Chunk("model/w", (64, 100), (0, 0), rounded, False)], dtypes="converted")
    assert same_bits(rounded, tensor.bfloat16())


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


def test_a_flipped_bit_is_found_wherever_its_byte_went(tmp_path: Path) -> None:
    """Rows that begin and end inside a unit: the first and the last unit are checked over scratch memory and rows."""
    tensor = random_tensor("float32", (64, 100))
    store = Store(tmp_path)
    ref = save(store, [split("model/w", tensor, ((0,), (0,)))])
    rows = torch.zeros(30, 100)
    wanted = [Chunk("model/w", (64, 100), (20, 0), rows, saved_here=False)]
    begin = ref.manifest.tensors[0].blocks[0].begin
    first, last = (begin + row * rows.shape[1] * 4 for row in (20, 50))
    units = range(first // SMALL_UNIT, (last - 1) // SMALL_UNIT + 1)
    assert first % SMALL_UNIT and last % SMALL_UNIT and len(units) > 2
    places = [0, first - 1, first, (first + last) // 2, last - 1, last, units.stop * SMALL_UNIT - 1, -1]
    for position in places:
        change(store, ref.shard_key(0), flip(position))
        if position >= 0 and position // SMALL_UNIT in units:
            unit = position // SMALL_UNIT * SMALL_UNIT
            with pytest.raises(
                CheckpointDamaged, match=f"in bytes {unit:,} to {unit + SMALL_UNIT:,}, which hold model/w"
            ):
                load_checkpoint(ref, wanted)
        else:
            load_checkpoint(ref, wanted)
            assert same_bits(rows, tensor[20:50])
        change(store, ref.shard_key(0), flip(position))


def test_every_tensor_that_damage_hit_is_named(tmp_path: Path) -> None:
    tensors = {f"model/t{index}": random_tensor("float32", (100,), index) for index in range(8)}
    store = Store(tmp_path)
    ref = save(store, [[Chunk(name, (100,), (0,), tensor, saved_here=True) for name, tensor in tensors.items()]])
    change(store, ref.shard_key(0), flip(SMALL_UNIT))
    with pytest.raises(CheckpointDamaged, match=r"hold model/t0, .*, model/t4 and 3 more: CRC64NVME"):
        read_tensors(ref)


def test_a_store_that_fails_is_not_called_damage(tmp_path: Path) -> None:
    class Failing(Store):
        def read_into(self, key: str, start: int, *buffers: memoryview) -> None:
            raise StoreError("the network is down")

    tensor = random_tensor("float32", (64, 100))
    ref = save(Store(tmp_path), halves("model/w", tensor))
    with pytest.raises(StoreError, match="the network is down"):
        read_tensors(CheckpointRef(Failing(tmp_path), ref.manifest))


def test_spans_hold_the_box_and_no_wide_gap() -> None:
    """Against every element's place, for all boxes of some arrays."""
    for shape in [(), (5,), (3, 4), (2, 3, 4)]:
        ranges = [[(begin, end) for begin in range(size) for end in range(begin + 1, size + 1)] for size in shape]
        places = torch.arange(max(1, math.prod(shape))).reshape(shape)
        for edges, max_gap in itertools.product(itertools.product(*ranges), (0, 1, 3, 100)):
            box = Box(tuple(begin for begin, _ in edges), tuple(end - begin for begin, end in edges))
            found = []
            for first, end, part in spans(shape, box, max_gap=max_gap):
                inside = places[part.slices()].flatten().tolist()
                assert (inside[0], inside[-1] + 1) == (first, end)
                assert all(b - a - 1 <= max_gap for a, b in itertools.pairwise(inside))
                found += inside
            assert found == places[box.slices()].flatten().tolist()
    assert list(spans((3, 4), Box((1, 0), (0, 4)), max_gap=1)) == []
