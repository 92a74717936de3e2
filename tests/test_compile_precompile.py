"""The job that fills the compile cache: the run's shapes, and nothing of the run's own is touched."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_compile_twin import TESTS
from tiny import build_documents, job_text

from raynium.checkpoint.catalog import list_checkpoints
from raynium.config.load import parse_config
from raynium.config.schema import Config
from raynium.errors import RunFailed
from raynium.launch import precompile as module
from raynium.launch.precompile import STEPS, main, precompile, short_config, summary
from raynium.launch.preparation import checked
from raynium.run.record import Owner, RunRecord
from raynium.storage.store import Store
from raynium.train.compiles import WARM_UP_CALLS

CHANGES = {
    "model.num_kv_heads": 2,
    "engine.dtype": "auto",
    "optimizer.warmup_steps": 50,
    "optimizer.schedule": "wsd",
    "train.steps": 1000,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 2,
    "checkpoint.every_steps": 1,
    "sample.prompts": ["once"],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    build_documents(root)
    return root


def job(root: Path, name: str = "tiny") -> str:
    return job_text(CHANGES | {"run.name": name, "cluster.ranks_per_node": None}, root=root)


def config(root: Path, name: str = "tiny", **changes: Any) -> Config:
    return checked(parse_config(job(root, name), changes))


def test_the_short_run_has_the_runs_shapes_and_keeps_nothing(root: Path) -> None:
    run = config(root)
    # Of steps that the short run does not have, and of snapshots that it does not keep.
    short = short_config(config(root, **{"data.leave_out_steps": [3], "fault.snapshot_every_steps": 2}))
    for section in ("cluster", "model", "data", "parallel", "engine"):
        assert getattr(short, section) == getattr(run, section), section
    assert (short.train.global_batch_size, short.train.micro_batch_size) == (8, 2)
    assert short.train.steps == short.evaluate.every_steps == STEPS == WARM_UP_CALLS
    assert (short.checkpoint.save, short.sample.prompts) == ("never", ())
    assert short.tracking.experiment == "raynium-precompile"
    assert short.run.name.startswith("tiny.precompile-") and short.run.root == run.run.root
    assert short.run.name != short_config(run).run.name, "two at once do not meet"
    assert len(short_config(config(root, "x" * 63)).run.name) <= 63


def test_a_run_that_goes_on_is_compiled_in_the_precision_it_began_with(
    tmp_path: Path, save_run: Callable[..., Any]
) -> None:
    from raynium.models.decoder import Decoder

    began = parse_config(job(tmp_path), {"engine.dtype": "bfloat16", "run.root": str(tmp_path / "runs")})
    save_run(Decoder(began.model), began, name="tiny")
    goes_on = checked(parse_config(job(tmp_path), {"run.root": str(tmp_path / "runs")}))
    assert goes_on.engine.dtype == "auto"
    assert short_config(goes_on).engine.dtype == "bfloat16"


def test_a_run_that_keeps_nothing_ends_well_without_a_checkpoint(root: Path, tmp_path: Path) -> None:
    short = short_config(config(root, **{"engine.dtype": "float32"}))
    given = {
        "config": short.model_dump(mode="json"),
        "run_folder": str(tmp_path / "run"),
        "data_folder": str(root / "data"),
    }
    agent = [sys.executable, str(TESTS / "_neuron_agent.py")]
    done = subprocess.run(agent, input=json.dumps(given), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["ended"], found["cause"]) == ("finished", None)
    assert [step for step, metrics in found["points"] if "train/loss" in metrics] == [1, 2]
    assert any("eval/loss" in metrics for _, metrics in found["points"])
    assert list_checkpoints(Store(tmp_path / "run")) == []


def test_the_short_runs_folder_goes_also_when_it_failed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def fails(config: Config, **options: Any) -> RunRecord:
        made.append(root / config.run.name)
        Store(config.run.root).child(config.run.name).write_new("record.json", b"{}")
        raise RunFailed("no")

    monkeypatch.setattr(module, "run", fails)
    with pytest.raises(RunFailed, match=r"^no$"):
        precompile(config(root), address=None)
    assert not (made[0] / "record.json").exists()


def record(root: Path, **metrics: float) -> RunRecord:
    config = {"run": {"root": str(root)}, "cluster": {"accelerator": "cpu"}}
    return RunRecord("tiny", config, "finished", Owner("host", "", 1, ""), 0.0, 0.0, metrics=metrics)


def test_what_it_says(tmp_path: Path) -> None:
    compiled = {"compile/graphs": 3.0, "compile/seconds": 61.72}
    assert "nothing was compiled: with engine.compile=none" in summary(record(tmp_path))
    said = "3 graphs in 61.7 s on rank 0, kept by nobody: executables of 'cpu'"
    assert summary(record(tmp_path, **compiled)).startswith(said)
    Store(tmp_path).write_new("compile-cache/key/ab/one.neff=0123456789abcdef", bytes(2_000_000))
    assert summary(record(tmp_path, **compiled)) == (
        f"3 graphs in 61.7 s on rank 0; file://{tmp_path}/compile-cache holds 1 files, 2.0 MB"
    )


def test_a_bad_config_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: no config given"):
        main([])
    (tmp_path / "job.yaml").write_text(job(tmp_path))
    with pytest.raises(SystemExit, match=r"(?s)^error: .*train\.global_batch_size is 7"):
        main([str(tmp_path / "job.yaml"), "train.global_batch_size=7"])
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]


@pytest.mark.ray
@pytest.mark.slow
def test_the_job_leaves_the_runs_root_as_it_was_but_for_mlflow(root: Path, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(job(root))
    before = {path.name for path in root.iterdir()}
    script = Path(__file__).parents[1] / "jobs/precompile.py"
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "job.yaml")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment | {"HOME": str(tmp_path)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("nothing was compiled: with engine.compile=none")
    assert {path.name.partition(".")[0] for path in root.iterdir()} - before <= {"mlflow", "mlartifacts"}
