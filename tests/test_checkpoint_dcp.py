"""torch.distributed.checkpoint over our format: both ways, by one process and by two ranks under FSDP2."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import LoadPlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from raynium.checkpoint.catalog import latest, open_checkpoint
from raynium.checkpoint.dcp import OBJECTS, CheckpointReader, CheckpointWriter
from raynium.checkpoint.load import load_checkpoint, read_tensors
from raynium.checkpoint.state import Chunk
from raynium.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, StoreError
from raynium.storage.store import Store

WORKER = Path(__file__).with_name("_dcp_ranks.py")
STEP = 2  # that it saves
# What DCP itself says to one process without ranks
pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
)


def save(state: dict[str, Any], store: Store, *, step: int = 1, planner: Any = None, **fields: Any) -> CheckpointWriter:
    writer = CheckpointWriter(store, step=step, **fields)
    dcp_save(state, storage_writer=writer, planner=planner)
    return writer


def cause(error: CheckpointException) -> BaseException:
    """What went wrong on rank 0."""
    return error.failures[0][0]


# ---- two ranks ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `_dcp_ranks.py` leaves."""
    folder = tmp_path_factory.mktemp("dcp")
    dcp_save({"model": start_weights()}, storage_writer=CheckpointWriter(str(folder / "start"), step=1))
    ran = subprocess.run([sys.executable, str(WORKER), str(folder)], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return folder


def start_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"0.weight": (9, 6), "0.bias": (9,), "2.weight": (3, 9), "2.bias": (3,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def ranks(folder: Path, what: str) -> list[dict[str, torch.Tensor]]:
    return [torch.load(folder / f"rank-{rank}.pt")[what] for rank in range(2)]


def test_two_ranks_load_what_one_process_saved(folder: Path) -> None:
    for loaded in ranks(folder, "loaded"):
        assert all(torch.equal(loaded[name], tensor) for name, tensor in start_weights().items())


def test_dcp_loads_what_an_engine_saved_into_another_layout_and_dtype(folder: Path) -> None:
    after = ranks(folder, "after")[0]
    weights = {name: torch.zeros_like(tensor) for name, tensor in after.items()}
    dcp_load({"model": weights}, storage_reader=CheckpointReader(str(folder / "ours")))
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights.items())
    rounded = {name: torch.zeros_like(tensor, dtype=torch.bfloat16) for name, tensor in after.items()}
    dcp_load({"model": rounded}, storage_reader=CheckpointReader(str(folder / "ours"), step=STEP))
    assert all(torch.equal(tensor, after[name].bfloat16()) for name, tensor in rounded.items())


def test_our_loader_loads_what_dcp_saved(folder: Path) -> None:
    after, moments = ranks(folder, "after")[0], ranks(folder, "moments")[0]
    ref = open_checkpoint(Store(folder / "theirs"), STEP)
    tensors = read_tensors(ref)
    assert tensors.keys() == {f"model/{name}" for name in after}
    assert all(torch.equal(tensor, tensors[f"model/{name}"]) for name, tensor in after.items())
    assert len(ref.manifest.shards) == 2 and ref.manifest.state["next_sample"] == 64
    rows = torch.zeros(4, 6)
    name = "optimizer/state/0.weight/exp_avg"
    load_checkpoint(ref, [Chunk(name, (9, 6), (3, 0), rows, saved_here=False)])
    assert torch.equal(rows, moments["0.weight"][3:7])


def test_what_is_no_tensor_comes_back_from_json(folder: Path) -> None:
    groups = [{"lr": 0.0, "betas": (0.0, 0.0), "params": []}]
    state: dict[str, Any] = {
        "scheduler": {"last_rates": (), "epoch": 0, "note": ""},
        "optimizer": {"param_groups": groups},
    }
    dcp_load(state, storage_reader=CheckpointReader(str(folder / "theirs")))
    assert state["scheduler"] == {"last_rates": [0.1, 0.05], "epoch": 3, "note": None}
    [group] = state["optimizer"]["param_groups"]
    assert group == {"lr": 0.1, "betas": [0.9, 0.999], "params": ["0.weight", "0.bias", "2.weight", "2.bias"]}
    kept = open_checkpoint(Store(folder / "theirs"), STEP).manifest.state[OBJECTS]
    assert isinstance(kept, dict) and kept["scheduler/epoch"] == 3


# ---- one process --------------------------------------------------------------------------------------------------


@pytest.mark.s3
def test_the_same_through_s3(s3_server: Any) -> None:
    store = Store(s3_server.create_bucket("dcp") + "/run", options=s3_server.options)
    tensor = torch.randn(40, 30)
    writer = save({"model": {"w": tensor}, "lr": 0.5}, store, step=3)
    assert writer.ref is not None and writer.ref.step == 3
    state: dict[str, Any] = {"model": {"w": torch.zeros(40, 30)}, "lr": 0.0}
    dcp_load(state, storage_reader=CheckpointReader(store, step=3))
    assert torch.equal(state["model"]["w"], tensor) and state["lr"] == 0.5


def test_damage_is_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    writer = save({"model": {"w": torch.randn(40, 30)}}, store)
    assert writer.ref is not None
    key = writer.ref.shard_key(0)
    data = bytearray(store.read(key))
    data[-1] ^= 1
    store.replace(key, bytes(data))
    with pytest.raises(CheckpointException) as caught:
        dcp_load({"model": {"w": torch.zeros(40, 30)}}, storage_reader=CheckpointReader(store))
    assert isinstance(cause(caught.value), CheckpointDamaged) and "hold model/w" in str(cause(caught.value))


def test_a_save_that_fails_leaves_no_checkpoint(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.replace("checkpoints/step-000000001", b"a file in the way")
    with pytest.raises(CheckpointException) as caught:
        save({"model": {"w": torch.ones(3)}}, store)
    assert isinstance(cause(caught.value), StoreError)
    store.delete("checkpoints/step-000000001")
    assert latest(store) is None
    save({"model": {"w": torch.ones(3)}}, store)
    assert latest(store) is not None


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (({1: 2},), r"things/0 is a dict \(\{1: 2\}\), which is neither a tensor nor JSON"),
        ({"rate": float("nan")}, "things/rate is a float"),
        ([1, object()], "things/1 is a object"),
        ({1, 2}, "things is a set"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_name(tmp_path: Path, value: Any, problem: str) -> None:
    with pytest.raises(CheckpointException) as caught:
        save({"model": {"w": torch.ones(3)}, "things": value}, Store(tmp_path))
    assert isinstance(cause(caught.value), CheckpointError)
    with pytest.raises(CheckpointError, match=problem):
        raise cause(caught.value)
    assert latest(Store(tmp_path)) is None


def test_a_foreign_planners_pickles_are_refused(tmp_path: Path) -> None:
    class Foreign(SavePlanner):
        def __init__(self) -> None:
            self._inner = DefaultSavePlanner()

        def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
            self._inner.set_up_planner(state_dict, storage_meta, is_coordinator)

        def create_local_plan(self) -> Any:
            return self._inner.create_local_plan()

        def create_global_plan(self, all_plans: Any) -> Any:
            return self._inner.create_global_plan(all_plans)

        def finish_plan(self, new_plan: Any) -> Any:
            return self._inner.finish_plan(new_plan)

        def resolve_data(self, write_item: Any) -> Any:
            return self._inner.resolve_data(write_item)

    with pytest.raises(CheckpointException) as caught:
        save({"w": torch.ones(3), "lr": 0.5}, Store(tmp_path / "a"), planner=Foreign())
    assert "lr is no tensor, and Foreign only gives its pickle" in str(cause(caught.value))
    save({"w": torch.ones(3)}, Store(tmp_path / "b"), planner=Foreign())
    assert latest(Store(tmp_path / "b")) is not None


def test_replayed_plans_are_refused(tmp_path: Path) -> None:
    class Caching(DefaultSavePlanner):  # the caches belong to the class
        def __init__(self) -> None:
            super().__init__(enable_plan_caching=True)

    state = {"w": torch.ones(3)}
    save(state, Store(tmp_path), step=1, planner=Caching())
    with pytest.raises(CheckpointException) as caught:
        save(state, Store(tmp_path), step=2, planner=Caching())
    assert "a planner with enable_plan_caching replays old plans" in str(cause(caught.value))
    assert [ref.step for ref in [latest(Store(tmp_path))] if ref] == [1]


def test_a_checkpoint_id_beside_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint_id='x' was given beside a CheckpointWriter: leave it out"):
        dcp_save({"w": torch.ones(1)}, checkpoint_id="x", storage_writer=CheckpointWriter(str(tmp_path), step=1))
    save({"w": torch.ones(1)}, Store(tmp_path))
    with pytest.raises(CheckpointError, match=r"checkpoint_id='x' was given beside a CheckpointReader: leave it out"):
        dcp_load({"w": torch.ones(1)}, checkpoint_id="x", storage_reader=CheckpointReader(str(tmp_path)))


def test_names_that_dcp_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    flat = DefaultSavePlanner(flatten_state_dict=False)
    save({"a/b": torch.ones(1), "a.b": torch.ones(1)}, Store(tmp_path), planner=flat)
    with pytest.raises(CheckpointMismatch, match=r"names that only differ in / and \., .*: \['a.b'\]"):
        CheckpointReader(str(tmp_path))


def test_ranks_that_found_different_checkpoints_stop(tmp_path: Path) -> None:
    for step in (1, 2):
        save({"w": torch.ones(1)}, Store(tmp_path), step=step)
    readers = [CheckpointReader(str(tmp_path), step=step) for step in (1, 2)]
    plans = [reader.prepare_local_plan(LoadPlan([])) for reader in readers]
    with pytest.raises(CheckpointMismatch, match=r"the ranks would load different checkpoints, .*: give .* a step"):
        readers[0].prepare_global_plan(plans)


def test_no_checkpoint_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        CheckpointReader(str(tmp_path))
