"""Ranks of every engine and layout fill their parts from one adopted folder: the same bits, and no more than needed."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
import torch
from conversions import weights_in

from raynium.checkpoint.base import Base, base_of, keep_base
from raynium.checkpoint.load import load_checkpoint
from raynium.checkpoint.state import Chunk
from raynium.convert.folder import Folder
from raynium.convert.weights import base_of_folder, find_weights
from raynium.models.names import hugging_face_names
from raynium.storage.store import Store

# pytest's import mode leaves it out.
sys.path.append(str(Path(__file__).parent))
from test_native_engine import LLAMA3, QWEN2, QWEN3, WORKER, config, run
from test_nxd import nxd_config, start_worker

pytestmark = pytest.mark.slow


def adopted(folder: Path, store: Store, model: Any) -> Base:
    found = Folder(folder)
    base = base_of_folder(found, model, find_weights(found, model))
    keep_base(store, base)
    return base


@pytest.fixture(scope="module")
def workers() -> Iterator[dict[str, "Popen[str]"]]:
    native = Popen([sys.executable, str(WORKER)], stdin=-1, stdout=-1, text=True)
    started = {"native": native, "nxd": start_worker("fake", "trn1")}
    yield started
    for process in started.values():
        # Leaving closes its stdin, which ends it.
        with process:
            pass


LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp 2": ("native", {"ranks": 2, "model": LLAMA3}),
    "tp 2, biases": ("native", {"ranks": 2, "tensor": 2, "model": QWEN2}),
    "fsdp 2 x tp 2, bfloat16": ("native", {"ranks": 4, "tensor": 2, "model": QWEN3, "dtype": "bfloat16"}),
    "nxd, tp 2 x dp 2, biases": ("nxd", {"ranks": 4, "tensor": 2, "model": QWEN2}),
    "nxd, tp 4, two ranks a head": ("nxd", {"ranks": 4, "tensor": 4, "model": QWEN3}),
    "nxd, pp 2": ("nxd", {"ranks": 2, "pipeline": 2, "model": LLAMA3}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_every_layout_holds_the_published_bits(
    workers: dict[str, "Popen[str]"],
    hugging_face: Callable[..., Path],
    tmp_path: Path,
    layout: str,
    dtype: torch.dtype,
) -> None:
    engine, arguments = LAYOUTS[layout]
    made = nxd_config(**arguments) if engine == "nxd" else config(**arguments)
    folder = hugging_face(made.model, dtype=dtype, max_shard_size="20KB")
    adopted(folder, Store(tmp_path / "base"), made.model)
    # Without a step; whoever loads has evaluated before.
    begun = run(workers[engine], tmp_path / "run", made, last_step=0, load_from=tmp_path / "base")
    whole, published = begun.whole_state(), weights_in(folder)
    for ours, theirs in hugging_face_names(made.model).items():
        assert torch.equal(whole[f"model/{ours}"], published[theirs].float()), ours
    assert not any(tensor.any() for name, tensor in whole.items() if name.startswith("optimizer/"))


def test_a_rank_reads_its_part_and_no_more(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    """A quarter of 13 MB, in rows: the bytes of it, and units of 256 KiB at the edges of each matrix."""
    model = config(model=LLAMA3 | {"vocab_size": 4096, "hidden_size": 512, "ffn_size": 1024}).model
    folder = hugging_face(model, dtype=torch.bfloat16)
    base = adopted(folder, Store(tmp_path / "base"), model)
    matrices = [entry for entry in base.tensors if len(entry.global_shape) == 2]
    chunks = []
    for entry in matrices:
        rows, width = entry.global_shape
        part = torch.full((rows // 4, width), torch.nan)
        chunks.append(Chunk(entry.name, entry.global_shape, (rows // 2, 0), part, saved_here=True))
    needed = sum(chunk.tensor.numel() * 2 for chunk in chunks)
    read = load_checkpoint(base_of(Store(tmp_path / "base")), chunks, dtypes="converted").num_bytes_read
    assert needed <= read <= needed + len(matrices) * 2 * 262_144 < base.shards[0].size
    names = hugging_face_names(model)
    published = weights_in(folder)
    for chunk in chunks:
        begin = chunk.offsets[0]
        expected = published[names[chunk.name.removeprefix("model/")]][begin : begin + len(chunk.tensor)]
        assert torch.equal(chunk.tensor, expected.float())
