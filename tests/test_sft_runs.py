"""Whole fine-tuning runs over chats: killed ranks, other world sizes, epochs, and a task of one's own."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_agent import Played
from test_preparation import Attempt
from test_records import chats_store, write_lines
from tiny import job_text
from waiting import wait_for

from raynium.accelerators.cpu import CpuAccelerator
from raynium.config.load import parse_config
from raynium.config.world import World
from raynium.data.batch import IGNORED_LABEL, Batch
from raynium.data.loader import open_loader
from raynium.data.records.template import ChatTemplate
from raynium.data.store import open_store
from raynium.data.tokenizer import reader
from raynium.engines.native import build_native_engine
from raynium.errors import ConfigError, DataError
from raynium.run.record import read_record
from raynium.tasks.registry import task_of
from raynium.tasks.sft import Sft

SETTINGS = {
    "data.packing": "documents",
    "data.records": "chats",
    "data.seq_len": 64,
    "model.max_seq_len": 96,
    "optimizer.learning_rate": 3e-3,
    "optimizer.schedule": "constant",
    "train.steps": 12,
    "checkpoint.every_steps": 4,
    "evaluate.every_steps": 6,
}
JOB = "task: sft\n" + job_text(SETTINGS)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats_store(tmp_path_factory.mktemp("chats")).path


@pytest.fixture
def play(tmp_path: Path, documents: Path) -> Iterator[Callable[..., Played]]:
    played: list[Played] = []

    def start(name: str, **changes: Any) -> Played:
        played.append(Played(parse_config(JOB, changes), tmp_path / name, documents))
        return played[-1]

    yield start
    for run in played:
        if run.thread.is_alive():
            run.let_uploads_go()
        run.thread.join(60)


def test_a_killed_rank_changes_no_bit_of_a_fine_tuning_run(play: Callable[..., Played]) -> None:
    whole = play("whole")
    whole.thread.start()
    assert whole.finish().ended == "finished"
    reference = whole.losses()
    assert reference[12] < reference[1]

    killed = play("killed")
    killed.hold_uploads()
    killed.thread.start()
    wait_for(lambda: any(len(held.ranks) == 2 for held in killed.agent._saving.images.held()))
    os.kill(killed.agent.rank_pids()[1], signal.SIGKILL)
    wait_for(lambda: killed.status().generation == 2)
    killed.let_uploads_go()
    assert killed.finish().ended == "finished"
    for step, losses in killed.losses().items():
        assert set(losses) == set(reference[step]), f"step {step}"
    for name in ("eval/loss", "eval/perplexity"):
        assert killed.tracker.values(name)[-1] == whole.tracker.values(name)[-1]


def test_other_world_sizes_see_the_same_chats(documents: Path) -> None:
    config = parse_config(JOB, {"data.path": str(documents)})
    store = open_store(documents)
    for step in (1, 5):
        [whole] = [open_loader(config, [store], data_rank=0, data_size=1).batch(step)]
        halves = [open_loader(config, [store], data_rank=rank, data_size=2).batch(step) for rank in (0, 1)]
        for name, column in whole.columns().items():
            assert torch.equal(column, torch.cat([half.columns()[name] for half in halves])), name


def alone(batch: Batch) -> Batch:
    """Each document of packed rows in a row of its own."""
    assert batch.documents_BT is not None
    rows = []
    for tokens, labels, documents in zip(batch.tokens_BT, batch.labels_BT, batch.documents_BT, strict=True):
        for document in documents.unique():
            of_it = documents == document
            row = torch.zeros_like(tokens), torch.full_like(labels, IGNORED_LABEL)
            row[0][: of_it.sum()], row[1][: of_it.sum()] = tokens[of_it], labels[of_it]
            if (row[1] != IGNORED_LABEL).any():
                rows.append(row)
    return Batch(torch.stack([tokens for tokens, _ in rows]), torch.stack([labels for _, labels in rows]))


def test_packed_chats_have_the_loss_that_each_has_alone(documents: Path) -> None:
    changes = {
        "data.path": str(documents),
        "cluster.ranks_per_node": 1,
        "train.micro_batch_size": 4,
        "data.seq_len": 96,
    }
    config = parse_config(JOB, changes)
    batch = open_loader(config, [open_store(documents)], data_rank=0, data_size=1).batch(1)
    assert batch.documents_BT is not None and batch.documents_BT.max() > 1
    engine = build_native_engine(config, World.of(config), CpuAccelerator(), Sft())
    packed, single = (engine.evaluate(each) for each in (batch, alone(batch)))
    assert packed["tokens"] == single["tokens"] > 0
    assert packed["nats"] == pytest.approx(single["nats"], rel=1e-6)


def test_a_row_without_a_label_does_no_harm(documents: Path) -> None:
    config = parse_config(JOB, {"data.path": str(documents), "cluster.ranks_per_node": 1})
    engine = build_native_engine(config, World.of(config), CpuAccelerator(), Sft())
    batch = open_loader(config, [open_store(documents)], data_rank=0, data_size=1).batch(1)
    silent = Batch(batch.tokens_BT, torch.full_like(batch.labels_BT, IGNORED_LABEL), documents_BT=batch.documents_BT)
    assert engine.evaluate(silent) == {"tokens": 0.0, "nats": 0.0}


# ---- what a run settles ----------------------------------------------------------------------------------------------


def test_epochs_become_steps_when_the_rows_are_known_and_are_recorded(documents: Path, tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, "chats")
    changes = SETTINGS | {"task": "sft", "data.path": str(documents), "train.steps": None, "train.epochs": 2.5}
    prepared = attempt(**changes)
    record = read_record(prepared.store)
    assert record is not None and record.packing is not None
    steps = -(-record.packing["rows"] * 5 // 2 // 4)
    assert prepared.config.train.steps == record.config["train"]["steps"] == steps
    assert f"train: 2.5 epochs are {steps} steps" in attempt.told
    template = ChatTemplate.load(reader(prepared.store), "the run")
    assert template is not None and template.is_marked()


def test_steps_that_are_not_those_of_the_epochs_are_refused(documents: Path, tmp_path: Path) -> None:
    changes = SETTINGS | {"task": "sft", "data.path": str(documents), "train.epochs": 2}
    Attempt(tmp_path, "chats").refused(ConfigError, "train.steps is 12 and train.epochs 2, which are", **changes)


def test_a_store_of_chats_is_no_store_of_texts(documents: Path, tmp_path: Path) -> None:
    changes = {"data.path": str(documents), "data.packing": "documents"}
    Attempt(tmp_path, "texts").refused(DataError, "holds chats, and data.records is text: set data.records", **changes)


# ---- a task of one's own ---------------------------------------------------------------------------------------------

OWN = '''
from raynium.tasks.base import Scored


class LastWords:
    """The later a label stands in its row, the more it counts."""

    columns = ()
    rows_per_sample = 1
    sums = ("weighted", "weight")
    objective = "weighted"
    divisor = "weights"
    slopes = "fixed"

    def counts(self, batch):
        return {"weights": float(self.weights(batch).sum())}

    def weights(self, batch):
        import torch

        places = torch.arange(batch.labels_BT.shape[1], device=batch.labels_BT.device)
        return (batch.labels_BT != -100) * (1.0 + places)

    def score(self, log_probs_BT, batch):
        weights = self.weights(batch)
        return Scored({"weighted": -log_probs_BT * weights, "weight": weights}, slope_BT=-weights)

    def training(self, sums):
        return {}

    def evaluation(self, sums, held_out):
        return {"eval/loss": sums["weighted"] / sums["weight"]}


class Riddles:
    """A format of records of one's own: a question, whose answer is learned."""

    sequences = 1

    def __init__(self):
        from raynium.data.records.formats import FieldOf

        self.fields = (FieldOf("riddle", required=True), FieldOf("solution", required=True))

    def render(self, record):
        from raynium.data.records.formats import Rendered

        asked = record["riddle"] + " "
        whole = asked + record["solution"]
        return [Rendered(whole, ((len(asked), len(whole)),), markup=False, ends=True)]
'''


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "own_task_of_a_test.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_task_of_a_test"
    sys.modules.pop("own_task_of_a_test", None)


def test_a_task_and_a_format_of_ones_own_train(own_module: str, tmp_path: Path) -> None:
    from raynium.data.build.prepare import prepare_stores

    lines = [{"riddle": f"what is {n} + 1?", "solution": str(n + 1)} for n in range(200)]
    source = write_lines(tmp_path / "riddles.jsonl", lines)
    changes = SETTINGS | {"data.path": str(tmp_path / "store"), "data.source": str(source), "data.seq_len": 32}
    changes |= {"cluster.ranks_per_node": 1, "data.records": f"{own_module}:Riddles", "data.heldout_fraction": 0.2}
    config = parse_config(f"task: {own_module}:LastWords\n" + job_text(changes))
    task = task_of(config)
    [store] = prepare_stores(config, cache_dir=tmp_path)
    loader = open_loader(config, [store], data_rank=0, data_size=1)
    engine = build_native_engine(config, World.of(config), CpuAccelerator(), task)
    from raynium.engines.base import Votes

    losses = [engine.step(loader.batch(step), step=step, votes=Votes()).loss for step in range(1, 13)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        ("stf", r"task is 'stf': did you mean sft\?"),
        ("no_such_package:Task", "no_such_package cannot be imported here: .* Install its package on every node"),
        ("json:NoTask", "json has no class 'NoTask': write package.module:Class"),
        ("json:JSONDecoder", "has no score, counts, training, evaluation, sums: it is no task"),
    ],
)
def test_a_task_that_is_none_is_refused(task: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        task_of(parse_config(f"task: {task}\n" + job_text()))
