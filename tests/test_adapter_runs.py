"""Runs that train an adapter of published weights, from a job file to a checkpoint and back."""

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conversions import same_tensors, weights_in
from test_agent import Played
from test_model_init import config_at, ended, folder, job, trained  # noqa: F401  (folder: a fixture)
from tiny import loader_of
from waiting import wait_for

from raynium.accelerators.cpu import CpuAccelerator
from raynium.checkpoint.base import ADAPTER_NAME, base_of
from raynium.checkpoint.catalog import latest, open_checkpoint
from raynium.checkpoint.load import read_tensors
from raynium.checkpoint.ref import CheckpointRef
from raynium.cli.app import app
from raynium.config.world import World
from raynium.convert.beginning import adopt_weights
from raynium.convert.export import export_checkpoint
from raynium.convert.merged import merged_weights
from raynium.convert.peft_folder import export_adapter
from raynium.data.store import open_store
from raynium.engines.native import build_native_engine
from raynium.errors import CheckpointMismatch
from raynium.generation.sampler import open_sampler
from raynium.rank.snapshots import Snapshots
from raynium.sdk import find_run
from raynium.storage.store import Store
from raynium.tasks.pretraining import Pretraining
from raynium.train.guard import Guard
from raynium.train.link import MemoryLink
from raynium.train.patience import Patience

pytestmark = pytest.mark.usefixtures("folder")

ADAPTER = ("adapter.rank=4", "adapter.alpha=8", "optimizer.learning_rate=0.01")


def last(tmp_path: Path, name: str = "tuned") -> CheckpointRef:
    ref = latest(Store(tmp_path / "runs" / name))
    assert ref is not None
    return ref


def test_an_adapter_begins_as_its_base_and_is_all_that_is_saved(transformers: Any, tmp_path: Path) -> None:
    losses = trained(job(tmp_path), *ADAPTER)
    batch = loader_of(open_store(tmp_path / "data"), seq_len=16, global_batch_size=4).batch(1)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hugging-face", dtype=torch.float32)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            base(batch.tokens_BT).logits.flatten(0, 1), batch.labels_BT.flatten()
        )
    assert losses[1] == pytest.approx(expected.item(), rel=2e-5) and losses[4] < losses[1]
    kinds = {re.sub(r"blocks\.\d+\.", "", entry.name) for entry in last(tmp_path).manifest.tensors}
    learned = {kind for kind in kinds if not kind.startswith(("rng/", "data/", "guard/"))}
    assert {kind.rpartition(".")[2] for kind in learned} == {"lora_A", "lora_B"}
    assert len(learned) == 3 * 2 * 7
    export_checkpoint(last(tmp_path), tmp_path / "merged", dtype="float32")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        tuned = torch.nn.functional.cross_entropy(
            merged(batch.tokens_BT).logits.flatten(0, 1), batch.labels_BT.flatten()
        )
    assert tuned < expected
    ours = open_sampler(str(tmp_path / "runs/tuned")).model
    torch.testing.assert_close(ours(batch.tokens_BT), merged(batch.tokens_BT).logits, rtol=1e-5, atol=1e-5)


def test_the_command_and_the_sdk_export_the_adapter_alone_or_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(job(tmp_path), *ADAPTER, "train.steps=1")
    monkeypatch.chdir(tmp_path)
    app(["checkpoints", "export", "tuned", "adapter", "--adapter"], standalone_mode=False)
    assert "adapter: 42 tensors, 24.6 kB of float32 in 1 file(s)" in capsys.readouterr().out
    app(["checkpoints", "export", "tuned", "merged"], standalone_mode=False)
    assert "merged: 29 tensors" in capsys.readouterr().out
    find_run("tuned").export("again", what="adapter")
    assert same_tensors(weights_in(tmp_path / "again"), weights_in(tmp_path / "adapter"))

    # Another run begins where this one is.
    trained(job(tmp_path), *ADAPTER, "run.name=second", "train.steps=1", "optimizer.learning_rate=1e-30",
            "optimizer.weight_decay=0", f"adapter.init={tmp_path}/adapter")  # fmt: skip
    first, second = (read_tensors(last(tmp_path, name)) for name in ("tuned", "second"))
    assert same_tensors(first, second)


def test_a_stopped_run_goes_on_bit_equal_on_its_base(tmp_path: Path) -> None:
    path = job(tmp_path)
    trained(path, *ADAPTER, "run.name=whole", "engine.dtype=bfloat16", ranks=2)
    # The rate is constant: the first half of the run is that of a shorter one.
    trained(path, *ADAPTER, "train.steps=2", "engine.dtype=bfloat16", ranks=2)
    assert sorted(trained(path, *ADAPTER, "engine.dtype=bfloat16", ranks=2)) == [3, 4]
    whole, halves = (
        read_tensors(open_checkpoint(Store(tmp_path / f"runs/{name}"), 4), "") for name in ("whole", "tuned")
    )
    assert whole.keys() == halves.keys() and all(torch.equal(whole[name], halves[name]) for name in whole)


def test_a_killed_rank_changes_no_bit_and_one_rank_goes_on_with_what_two_have_trained(tmp_path: Path) -> None:
    """With dropout: which inputs are left out follows from the sample, at any world size."""

    def played(name: str, *overrides: str, hold_uploads: bool = False) -> Played:
        every = ("train.steps=12", "checkpoint.every_steps=4", "adapter.dropout=0.2", "cluster.ranks_per_node=2")
        config = config_at(tmp_path, *ADAPTER, *every, f"run.name={name}", *overrides)
        store = Store(tmp_path / "runs" / name)
        newest = latest(store)
        saved: Any = None if newest is None else newest.manifest.state["config"]
        run = Played(adopt_weights(config, store, saved, print), tmp_path / "runs" / name, tmp_path / "data")
        if hold_uploads:
            run.hold_uploads()
        run.thread.start()
        return run

    whole = played("whole")
    assert whole.finish().ended == "finished"
    reference = whole.losses()
    assert reference[12] < reference[1]

    killed = played("killed", "train.steps=8", hold_uploads=True)
    wait_for(lambda: any(len(held.ranks) == 2 for held in killed.agent._saving.images.held()))
    os.kill(killed.agent.rank_pids()[1], signal.SIGKILL)
    wait_for(lambda: killed.status().generation == 2)
    killed.let_uploads_go()
    assert killed.finish().ended == "finished"
    assert sorted(killed.losses()) == list(range(1, 9))
    for step, losses in killed.losses().items():
        assert set(losses) == set(reference[step]), f"step {step}"
    states = [read_tensors(open_checkpoint(Store(tmp_path / f"runs/{name}"), 8), "") for name in ("whole", "killed")]
    others = ("rng/", "data/", "guard/")
    assert same_tensors(*states) and all("lora_" in name or name.startswith(others) for name in states[0])

    alone = played("killed", "cluster.ranks_per_node=1")
    assert alone.finish().ended == "finished"
    assert sorted(alone.losses()) == list(range(9, 13))
    for step, losses in alone.losses().items():
        assert losses == pytest.approx(reference[step], rel=1e-5), f"step {step}"


def test_a_rank_that_does_not_find_the_base_or_the_adapter_says_who_must_see_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(job(tmp_path), *ADAPTER, "train.steps=1")
    export_adapter(last(tmp_path), tmp_path / "adapter")
    store = Store(tmp_path / "runs/second")
    config = config_at(tmp_path, *ADAPTER, "run.name=second", f"adapter.init={tmp_path}/adapter")
    config = adopt_weights(config, store, None, print)
    engine = build_native_engine(config, World.of(config), CpuAccelerator(), Pretraining(), base="loaded")
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    snapshots = Snapshots(engine, MemoryLink(), tmp_path, Guard(), Patience(), if_busy="wait")
    for name in ("hugging-face", "adapter"):
        shutil.move(tmp_path / name, tmp_path / f"{name}, away")
    with pytest.raises(CheckpointMismatch, match=r"the weights at model\.init = .* as long as the run trains:"):
        snapshots.read_frozen(base_of(store))
    with pytest.raises(CheckpointMismatch, match=r"must see the weights at adapter\.init = .*unchanged, until "):
        snapshots.begin_with_adapter(base_of(store, name=ADAPTER_NAME))


def test_without_its_base_or_with_another_an_adapter_goes_no_further(tmp_path: Path) -> None:
    path = job(tmp_path)
    trained(path, *ADAPTER, "train.steps=2")
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "hugging-face", other)
    done = ended(path, *ADAPTER, f"model.init={other}")
    assert re.search(r"model\.init is .*other.*, but the checkpoint was trained with .*hugging-face", done.log)
    done = ended(path, *ADAPTER[1:], "adapter.rank=8")
    assert "adapter.rank is 8, but the checkpoint was trained with 4" in done.log

    ref = last(tmp_path)
    ref.manifest.state["config"]["model"]["init_identity"] = "0" * 64  # pyright: ignore
    with pytest.raises(
        CheckpointMismatch, match=r"is an adapter of weights with the identity 0000.*base\.json was repl"
    ):
        merged_weights(ref)
    shutil.move(tmp_path / "hugging-face", tmp_path / "away")
    done = ended(path, *ADAPTER)
    assert done.returncode != 0 and re.search(r"hugging-face/model-\S+ is missing", done.log), done.log[-3000:]
    assert weights_in(tmp_path / "away")
