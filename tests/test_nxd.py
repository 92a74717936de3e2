"""The NxD engine on gloo ranks against a plain float64 loop and the native engine; the map of its parameters.

Three kinds of neuronx-distributed (`_nxd_ranks.py`):
- "fake", always: ours, with the library's names and signatures;
- "source", if RAYNIUM_NXD_SOURCE names the folder that holds `neuronx_distributed` in a checkout of its public source:
  the real library, unchanged, in its CPU mode;
- "xla", if RAYNIUM_NXD_PYTHON names an interpreter with torch 2.9, torch-xla 2.9 and this project's dependencies too:
  the same over the real torch-xla, with its ZeRO-1 optimizer. About a minute a run.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raynium.checkpoint.load import read_tensors
from raynium.config.schema import Config, ModelSection
from raynium.convert.config_json import config_from_model
from raynium.convert.nxd_folder import import_nxd_folder
from raynium.data.batch import IGNORED_LABEL
from raynium.data.store import TOKENIZER_NAME
from raynium.data.tokenizer import Tokenizer
from raynium.models.decoder import Decoder
from raynium.models.nxd_layout import KvOrder, heads_of_rank, kv_copies, pieces, zero1_pieces
from raynium.storage.store import Store

sys.path.append(str(Path(__file__).parent))  # pytest's import mode leaves it out
from test_native_engine import LLAMA3, QWEN2, QWEN3, Run, assert_first_weights, config, reference, run, samples

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("_nxd_ranks.py")
SOURCE = os.environ.get("RAYNIUM_NXD_SOURCE")
XLA_PYTHON = os.environ.get("RAYNIUM_NXD_PYTHON")
needs_source = pytest.mark.skipif(SOURCE is None, reason="RAYNIUM_NXD_SOURCE names no source of neuronx-distributed")
needs_xla = pytest.mark.skipif(
    SOURCE is None or XLA_PYTHON is None, reason="RAYNIUM_NXD_SOURCE or RAYNIUM_NXD_PYTHON is not set"
)
LIBRARIES = ["fake", pytest.param("source", marks=needs_source)]

Fork = Callable[[str, str], subprocess.Popen[str]]  # (library, platform) → its waiting worker


def start_worker(library: str, platform: str) -> subprocess.Popen[str]:
    """`_nxd_ranks.py`, waiting for folders on its stdin, whose end ends it."""
    return subprocess.Popen(
        [XLA_PYTHON if library == "xla" and XLA_PYTHON else sys.executable, str(WORKER), library, platform],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": str(WORKER.parents[1] / "platform")},
    )


@pytest.fixture(scope="module")
def fork() -> Iterator[Fork]:
    """Workers that have loaded a library once and fork the ranks of every run; ended with the module."""
    started: dict[tuple[str, str], subprocess.Popen[str]] = {}

    def worker(library: str, platform: str) -> subprocess.Popen[str]:
        if (library, platform) not in started:
            started[library, platform] = start_worker(library, platform)
        return started[library, platform]

    yield worker
    for process in started.values():
        with process:  # leaving closes its stdin, which ends it
            pass


def nxd_config(*, run_name: str = "test", **arguments: Any) -> Config:
    fields = config(**arguments).model_dump(mode="json")
    fields["run"]["name"], fields["engine"]["kind"] = run_name, "nxd"
    return Config.model_validate(fields)


LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "one rank": ({"ranks": 1}, "trn1"),
    "tp 2": ({"ranks": 2, "tensor": 2}, "trn1"),
    "dp 2": ({"ranks": 2}, "trn1"),
    "tp 2 x dp 2, untied": ({"ranks": 4, "tensor": 2, "model": LLAMA3}, "trn1"),
    "tp 2 x dp 2, biases": ({"ranks": 4, "tensor": 2, "model": QWEN2}, "trn1"),
    "tp 4, two ranks a head, interleaved": ({"ranks": 4, "tensor": 4}, "trn1"),
    "tp 4, two ranks a head, adjacent": ({"ranks": 4, "tensor": 4}, "trn2"),
    "tp 2, checkpointed": ({"ranks": 2, "tensor": 2, "activation_checkpointing": "full"}, "trn1"),
}


PIPELINES: dict[str, tuple[dict[str, Any], str]] = {
    "pp 2": ({"ranks": 2, "pipeline": 2}, "trn1"),
    "pp 2, untied, checkpointed": (
        {"ranks": 2, "pipeline": 2, "model": LLAMA3, "activation_checkpointing": "full"},
        "trn1",
    ),
    "pp 2 x dp 2": ({"ranks": 4, "pipeline": 2}, "trn1"),
    "pp 2 x tp 2, two ranks a head": (
        {"ranks": 4, "pipeline": 2, "tensor": 2, "model": QWEN3 | {"num_kv_heads": 1}, "micro_batches": 4},
        "trn1",
    ),
    "pp 4, more micro-batches than stages": (
        {"ranks": 4, "pipeline": 4, "micro_batches": 6, "model": QWEN3 | {"num_layers": 4}},
        "trn1",
    ),
}
LAYOUTS |= PIPELINES


def check_against_reference(ran: Run, config: Config) -> None:
    expected = reference(config)
    counted = [(labels != IGNORED_LABEL).sum().item() for labels in samples()["labels"]]
    for results, evaluations in zip(ran.results, ran.evaluations, strict=True):
        assert [result["loss"] for result in results] == pytest.approx(expected.losses, rel=3e-6)
        assert [result["grad_norm"] for result in results] == pytest.approx(expected.grad_norms, rel=1e-4)
        assert [result["sums"]["tokens"] for result in results] == counted
        assert [sums["nats"] for sums in evaluations] == pytest.approx(expected.nats, rel=3e-6)
        assert [sums["tokens"] for sums in evaluations] == counted[4::5]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_as_a_plain_float64_loop_does(
    library: str, layout: str, fork: Fork, tmp_path: Path
) -> None:
    arguments, platform = LAYOUTS[layout]
    ran = run(fork(library, platform), tmp_path / "run", nxd_config(**arguments))
    check_against_reference(ran, config(**arguments))
    names = {
        name: tuple(parameter.shape) for name, parameter in Decoder(nxd_config(**arguments).model).named_parameters()
    }
    assert {name: tuple(whole.shape) for name, whole in ran.whole_state().items()} == {
        f"{prefix}/{name}": shape
        for name, shape in names.items()
        for prefix in ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq")
    }, "each element once, under the native engine's names"


SIZES = {"vocab_size": 720, "hidden_size": 320, "ffn_size": 600}  # matrices of several tiles


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    "layout",
    [
        "tp 2 x dp 2, untied",
        "tp 2 x dp 2, biases",
        "tp 4, two ranks a head, interleaved",
        "tp 4, two ranks a head, adjacent",
        "pp 2 x dp 2",
        "pp 2 x tp 2, two ranks a head",
    ],
)
def test_every_rank_begins_with_its_part_of_the_one_model(
    library: str, layout: str, fork: Fork, tmp_path: Path
) -> None:
    arguments, platform = LAYOUTS[layout]
    made = nxd_config(**arguments | {"model": arguments.get("model", QWEN3) | SIZES})
    assert_first_weights(run(fork(library, platform), tmp_path / "run", made, last_step=0), made)


@pytest.mark.parametrize("library", LIBRARIES)
def test_all_ranks_learn_of_a_wish_to_stop_at_the_same_step(library: str, fork: Fork, tmp_path: Path) -> None:
    asked = run(fork(library, "trn1"), tmp_path / "stop", nxd_config(ranks=4, tensor=2), last_step=4, stop=(3, 3))
    for results in asked.results:
        assert [result["agreed"][0] for result in results] == [False, False, True, False]


# ---- The bridge ------------------------------------------------------------------------------------------------------

BRIDGES: list[tuple[dict[str, Any], str]] = [
    ({"ranks": 2, "tensor": 2}, "trn1"),
    ({"ranks": 4, "tensor": 4}, "trn1"),
    ({"ranks": 4, "tensor": 2, "model": LLAMA3}, "trn2"),
    ({"ranks": 2, "pipeline": 2}, "trn1"),
    ({"ranks": 4, "pipeline": 2, "model": LLAMA3}, "trn1"),
]


def loaded_state(ran: Run) -> dict[str, torch.Tensor]:
    """The state that the ranks of a run held after they loaded another's, before any step."""
    ranks = [torch.load(ran.folder / f"rank-{rank}.pt") for rank in range(len(ran.states))]
    return ran._replace(states=[rank["loaded"] for rank in ranks]).whole_state()


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("layout", "platform"), BRIDGES)
def test_a_run_moves_to_the_native_engine_and_back(
    library: str, layout: dict[str, Any], platform: str, fork: Fork, tmp_path: Path
) -> None:
    """Steps 1 to 6 under NxD, 7 to 12 under native FSDP 2, 13 to 20 under NxD; no element of the state is changed."""
    worker = fork(library, platform)
    as_fsdp: dict[str, Any] = layout | {"ranks": 2, "tensor": 1, "pipeline": 1}
    native = config(**as_fsdp)
    first = run(worker, tmp_path / "nxd", nxd_config(**layout), last_step=6)
    second = run(worker, tmp_path / "native", native, first_step=7, last_step=12, load_from=first.folder)
    third = run(worker, tmp_path / "back", nxd_config(**layout), first_step=13, load_from=second.folder)
    for before, after in ((first, second), (second, third)):
        saved, loaded = before.whole_state(), loaded_state(after)
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)
        assert any(tensor.abs().max() > 0 for name, tensor in saved.items() if name.startswith("optimizer/exp_avg_sq"))
    assert first.losses + second.losses + third.losses == pytest.approx(reference(native).losses, rel=3e-6)


# ---- The real library ------------------------------------------------------------------------------------------------


@needs_source
def test_the_fake_has_the_real_librarys_names_and_signatures() -> None:
    """The fake may end a signature early; up to there it has the library's parameters in the library's order."""
    import _nxd_fake
    from _nxd_ranks import parameters_of

    done = subprocess.run([sys.executable, str(WORKER), "signatures"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    real = json.loads(done.stdout)
    for module, parts in _nxd_fake.SURFACE.items():
        for part in parts:
            mine = [each for each in parameters_of(part) if "VAR" not in each[1]]
            theirs = [each for each in real[f"{module}.{part.__name__}"] if "VAR" not in each[1]]
            assert mine == theirs[: len(mine)], part.__name__


def check_import(ran: Run, config: Config, folder: Path) -> None:
    """What `save_checkpoint` wrote at the end of a run is the state that its ranks held."""
    texts = [f"def function_{number}(x): return x + {number}\n" for number in range(400)]
    (folder / TOKENIZER_NAME).write_text(Tokenizer.train(texts, vocab_size=300).file_text)
    fields = config_from_model(config.model, dtype="bfloat16", end_of_document_id=0)
    (folder / "config.json").write_text(json.dumps(fields))
    imported = import_nxd_folder(ran.folder / "nxd", Store(folder / "imported"), model_folder=folder)
    assert imported.ref.step == len(ran.losses)
    found, expected = read_tensors(imported.ref, ""), ran.whole_state()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@needs_source
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (4, 1), (2, 2)])
def test_a_checkpoint_that_the_library_saved_is_imported(
    tensor: int, pipeline: int, fork: Fork, tmp_path: Path
) -> None:
    saving = nxd_config(
        ranks=4, tensor=tensor, pipeline=pipeline, model=LLAMA3 | {"vocab_size": 320}, run_name="saves-with-nxd"
    )
    ran = run(fork("source", "trn1"), tmp_path / "run", saving, last_step=3)
    check_import(ran, saving, tmp_path)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_step_that_is_not_finite_changes_no_bit_and_equals_one_that_was_left_out_beforehand(
    library: str, fork: Fork, tmp_path: Path
) -> None:
    made = nxd_config(ranks=4, tensor=2)
    worker = fork(library, "trn1")
    spoilt = run(worker, tmp_path / "spoilt", made, last_step=5, poison=(3, 3, 1, math.nan))
    told = run(worker, tmp_path / "told", made, last_step=5, leave_out=(3, 3))
    for results in (*spoilt.results, *told.results):
        assert [result["updated"] for result in results] == [step != 3 for step in range(1, 6)]
    assert all(torch.equal(tensor, told.whole_state()[name]) for name, tensor in spoilt.whole_state().items())


XLA_LAYOUTS: dict[str, dict[str, Any]] = {
    "dp 2": {"ranks": 2},
    "tp 2 x dp 2": {"ranks": 4, "tensor": 2},
    "pp 2 x dp 2": {"ranks": 4, "pipeline": 2},
    "pp 2 x tp 2, untied": {"ranks": 4, "pipeline": 2, "tensor": 2, "model": LLAMA3, "micro_batches": 3},
}


@needs_xla
@pytest.mark.parametrize("layout", XLA_LAYOUTS)
def test_zero1_over_torch_xla_trains_as_a_plain_float64_loop_does(layout: str, fork: Fork, tmp_path: Path) -> None:
    ran = run(fork("xla", "trn1"), tmp_path / "run", nxd_config(**XLA_LAYOUTS[layout]))
    check_against_reference(ran, config(**XLA_LAYOUTS[layout]))


@needs_xla
def test_zero1_masters_begin_with_their_part_of_the_one_model(fork: Fork, tmp_path: Path) -> None:
    """In float32, not made of weights that were rounded to bfloat16."""
    made = nxd_config(ranks=4, tensor=2, model=LLAMA3 | SIZES, dtype="bfloat16")
    assert_first_weights(run(fork("xla", "trn1"), tmp_path / "run", made, last_step=0), made)


@needs_xla
def test_a_save_compiles_nothing_for_what_a_rank_holds_whole(fork: Fork, tmp_path: Path) -> None:
    """Else the first save of a run waits for the compiler, once for each shape. Here no shard needs cutting."""
    ran = run(fork("xla", "trn1"), tmp_path / "run", nxd_config(ranks=2), last_step=2)
    assert torch.load(ran.folder / "rank-0.pt")["save_graphs"] == 0


@needs_xla
@pytest.mark.parametrize("layout", [{"ranks": 2}, {"ranks": 4, "pipeline": 2}])
def test_zero1_shards_move_to_the_native_engine_and_back(layout: dict[str, Any], fork: Fork, tmp_path: Path) -> None:
    """bfloat16: the master weights are what is saved, and what the parameters are made of after a load."""
    mixed = nxd_config(**layout, dtype="bfloat16")
    native = config(ranks=1)
    first = run(fork("xla", "trn1"), tmp_path / "nxd", mixed, last_step=4)
    second = run(fork("fake", "trn1"), tmp_path / "native", native, first_step=5, last_step=6, load_from=first.folder)
    third = run(fork("xla", "trn1"), tmp_path / "back", mixed, first_step=7, last_step=8, load_from=second.folder)
    assert {tensor.dtype for _, _, _, tensor, _ in first.states[0]} == {torch.float32}
    for before, after in ((first, second), (second, third)):
        saved, loaded = before.whole_state(), loaded_state(after)
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert first.losses + second.losses + third.losses == pytest.approx(reference(native).losses[:8], rel=2e-2)


@needs_xla
def test_a_zero1_checkpoint_that_the_library_saved_is_imported(fork: Fork, tmp_path: Path) -> None:
    saving = nxd_config(ranks=2, model=LLAMA3 | {"vocab_size": 320}, run_name="saves-with-nxd")
    ran = run(fork("xla", "trn1"), tmp_path / "run", saving, last_step=3)
    check_import(ran, saving, tmp_path)


# ---- The map of parameters -------------------------------------------------------------------------------------------


def model(**sizes: int | str) -> ModelSection:
    return config(model=sizes).model  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kv_order", ["interleaved", "adjacent"])
@pytest.mark.parametrize("tensor_size", [1, 2, 4, 8, 16])
def test_pieces_cover_each_parameter_once_and_each_stored_parameter_without_gaps(
    tensor_size: int, kv_order: KvOrder
) -> None:
    section = model(num_heads=16, num_kv_heads=4)
    times: dict[str, torch.Tensor] = {}
    for rank in range(tensor_size):
        rows: dict[str, int] = {}
        for piece in pieces(section, tensor_rank=rank, tensor_size=tensor_size, kv_order=kv_order):
            assert piece.row == rows.get(piece.stored, 0)
            rows[piece.stored] = piece.row + piece.shape[0]
            block = tuple(slice(begin, begin + size) for begin, size in zip(piece.offsets, piece.shape, strict=True))
            times.setdefault(piece.name, torch.zeros(piece.global_shape))[block] += piece.first_holder
    assert all((count == 1).all() for count in times.values())
    assert set(times) == {name for name, _ in Decoder(section).named_parameters()}


@pytest.mark.parametrize(("kv_order", "kv_heads"), [("interleaved", [0, 1, 0, 1]), ("adjacent", [0, 0, 1, 1])])
def test_query_heads_go_where_their_key_value_head_is(kv_order: KvOrder, kv_heads: list[int]) -> None:
    section = model(num_heads=8, num_kv_heads=2)
    heads = [heads_of_rank(section, tensor_rank=r, tensor_size=4, kv_order=kv_order) for r in range(4)]
    assert kv_copies(section, 4) == 2
    assert [each.first_kv for each in heads] == kv_heads
    assert sorted(each.first_query for each in heads) == [0, 2, 4, 6]
    for each in heads:
        assert {query // 4 for query in range(each.first_query, each.first_query + each.num_query)} == {each.first_kv}
    assert sorted((each.first_kv, each.copy) for each in heads) == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("data_size", [1, 2, 3, 7, 64])
def test_zero1_shards_of_a_fused_parameter_hold_each_row_once(data_size: int) -> None:
    found = [p for p in pieces(model(), tensor_rank=1, tensor_size=2, kv_order="adjacent") if ".0.ffn.g" in p.stored]
    assert [piece.name for piece in found] == ["blocks.0.ffn.gate.weight", "blocks.0.ffn.up.weight"]
    held = []
    for data_rank in range(data_size):
        for part in zero1_pieces(found, rows=48, data_rank=data_rank, data_size=data_size):
            offset = part.offsets[0] - 24  # of rank 1 of 2
            assert part.row == offset + (24 if ".up." in part.name else 0)
            held += [(part.name, offset + row) for row in range(part.shape[0])]
    assert sorted(held) == sorted((piece.name, row) for piece in found for row in range(24))
