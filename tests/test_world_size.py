"""Training goes on at another world size and in another layout: same samples, same losses, same state."""

import json
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from raynium.checkpoint.catalog import open_checkpoint
from raynium.checkpoint.compare import differences
from raynium.checkpoint.ref import CheckpointRef
from raynium.config.schema import Config
from raynium.data.build.store_build import build_store
from raynium.storage.store import Store

WORKER = Path(__file__).with_name("_world_size_ranks.py")

# A loss is a sum of float32 products, rounded at 2**-24 = 6e-8 each. Another layout adds them in another order: a few
# roundings more or less a step, in losses and gradients, which AdamW passes on to the weights of the steps that follow.
# Ten such steps moved a loss by 1.1e-8 of itself at most when this was written; resuming without moments: by 1e-2.
REDUCTION_ERROR = 8 * 2**-24


class Run(NamedTuple):
    folder: Path
    losses: list[list[float]]  # [rank][step]
    sample_ids: list[list[int]]  # [step][sample], of all ranks in the order of the batch

    def saved(self, step: int) -> CheckpointRef:
        return open_checkpoint(Store(self.folder / "run"), step)

    def resaved(self, step: int) -> CheckpointRef:
        """What it loaded, saved before the first step."""
        return open_checkpoint(Store(self.folder / "resaved"), step)


class Runs(NamedTuple):
    whole: Run  # 2 ranks FSDP, steps 1 to 20
    four: Run  # 4 ranks, TP 2 × FSDP 2, steps 11 to 15
    one: Run  # 1 rank, steps 16 to 20


def config(documents: Path, *, ranks: int, tensor: int, packing: str) -> dict[str, Any]:
    sizes = {"vocab_size": 512, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    fields = {
        "run": {"name": "test", "seed": 5},
        "cluster": {"accelerator": "cpu", "ranks_per_node": ranks},
        "model": {**sizes, "ffn_size": 56, "max_seq_len": 32},
        "data": {"path": str(documents), "seq_len": 32, "packing": packing},
        "parallel": {"tensor": tensor},
        "engine": {"dtype": "float32"},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 3},
        "train": {"steps": 20, "global_batch_size": 4},
    }
    return Config.model_validate(fields).model_dump(mode="json")


@pytest.fixture(scope="module", params=["stream", "documents"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """By each way of making rows."""
    folder = tmp_path_factory.mktemp("world-size")
    documents, text = folder / "documents", folder / "text"
    text.mkdir()
    for number in range(30):
        lines = (f"def function_{number}_{line}(x): return x * {line * number}" for line in range(60))
        (text / f"{number}.py").write_text("\n".join(lines))
    build_store(documents, source=str(text), vocab_size=512, heldout_fraction=0.1)

    with subprocess.Popen(
        [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as it:

        def run(name: str, *, ranks: int, tensor: int = 1, after: Run | None = None, **steps: Any) -> Run:
            here = folder / name
            here.mkdir()
            scenario = {"config": config(documents, ranks=ranks, tensor=tensor, packing=request.param), **steps}
            scenario["load_from"] = str(after.folder / "run") if after else None
            (here / "scenario.json").write_text(json.dumps(scenario))
            assert it.stdin is not None and it.stdout is not None
            it.stdin.write(f"{here}\n")
            it.stdin.flush()
            assert it.stdout.readline() == "0\n", (here / "stderr").read_text()[-6000:]
            results = [json.loads((here / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
            by_slice = {each["data_rank"]: each["sample_ids"] for each in results}
            for each in results:
                assert each["sample_ids"] == by_slice[each["data_rank"]], (
                    "ranks of one tensor group share their samples"
                )
            of_step = zip(*(by_slice[slice_] for slice_ in sorted(by_slice)), strict=True)
            return Run(
                here, [each["losses"] for each in results], [list(chain.from_iterable(slices)) for slices in of_step]
            )

        whole = run("whole", ranks=2, first_step=1, last_step=20, save_steps=[10, 20])
        four = run("four", ranks=4, tensor=2, after=whole, first_step=11, last_step=15, save_steps=[15])
        one = run("one", ranks=1, after=four, first_step=16, last_step=20, save_steps=[20])
        return Runs(whole, four, one)


def test_losses_are_those_of_the_uninterrupted_run(runs: Runs) -> None:
    expected = runs.whole.losses[0]
    assert expected[-1] < expected[0] - 1, "nothing was learned, so the losses show little"
    for losses in runs.four.losses:
        assert losses == pytest.approx(expected[10:15], rel=REDUCTION_ERROR)
    assert runs.one.losses[0] == pytest.approx(expected[15:], rel=REDUCTION_ERROR)


def test_no_sample_is_repeated_or_left_out(runs: Runs) -> None:
    assert runs.four.sample_ids + runs.one.sample_ids == runs.whole.sample_ids[10:]
    seen = [sample for step in runs.whole.sample_ids for sample in step]
    assert len(set(seen)) == len(seen) == 20 * 4


def test_a_state_that_was_loaded_and_gathered_again_has_the_same_bits(runs: Runs) -> None:
    assert len(runs.whole.saved(10).manifest.shards) == 2
    assert len(runs.four.resaved(10).manifest.shards) == 4
    names = [entry.name for entry in runs.whole.saved(10).manifest.tensors]
    assert sum(name.startswith("optimizer/") for name in names) == 2 * sum(name.startswith("model/") for name in names)
    assert list(differences(runs.whole.saved(10), runs.four.resaved(10))) == []
    assert list(differences(runs.four.saved(15), runs.one.resaved(15))) == []
    assert list(differences(runs.four.saved(15), runs.whole.saved(20))) != []
