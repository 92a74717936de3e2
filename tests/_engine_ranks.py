"""Runs the native engine on forked gloo ranks. `test_native_engine.py` starts it and writes folders to its stdin.

FOLDER/scenario.json says what to do (the keys are those of `run` in the test), FOLDER/batches.pt holds all samples.
Each rank leaves FOLDER/rank-N.pt, what its steps returned and its last state.
"""

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from _forked_ranks import serve_folders
from pair_task import PAIR_TASKS

from raynium.accelerators.cpu import CpuAccelerator
from raynium.accelerators.timeouts import PROCESS_GROUP_TIMEOUT_SECONDS
from raynium.checkpoint.base import BASE_NAME, base_of
from raynium.checkpoint.load import load_checkpoint
from raynium.checkpoint.state import MODEL_PREFIX
from raynium.config.schema import Config
from raynium.config.world import World
from raynium.data.batch import Batch
from raynium.data.evaluation import EvaluationSet
from raynium.data.questions import parse
from raynium.data.tokenizer import Tokenizer
from raynium.engines.base import Engine, Votes
from raynium.engines.native import build_native_engine
from raynium.models import pieces
from raynium.rank.evaluation import Evaluation, QuestionRows, rows_of_call
from raynium.storage.store import Store
from raynium.tasks.base import Scored, Task
from raynium.tasks.pretraining import Pretraining
from raynium.tasks.sft import Sft

TASKS: dict[str, Task] = {"pretraining": Pretraining(), "sft": Sft(), **PAIR_TASKS}


class TestAccelerator(CpuAccelerator):
    """The CPU, with a memory that is as small as the test says and a compiler that needs no C++."""

    compile_backend = "aot_eager"

    def __init__(self, memory_bytes: int):
        self._memory_bytes = memory_bytes

    def memory_bytes(self, *, local_rank: int, local_world_size: int) -> int:
        return self._memory_bytes


def run_rank(rank: int, folder: Path, scenario: dict) -> None:
    config = Config.model_validate(scenario["config"])
    with (folder / "stderr").open("ab") as stderr:
        os.dup2(stderr.fileno(), 2)
    torch.set_num_threads(1)
    pieces.LOGITS_BYTES = scenario["logits_bytes"] or pieces.LOGITS_BYTES
    world = World.of(config)
    if world.size > 1:
        # A file and not a port: nothing to collide with.
        store = dist.FileStore(str(folder / "rendezvous"), world.size)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world.size)
    weights = "first" if scenario["load_from"] is None else "loaded"
    task = TASKS[scenario["task"]]
    if scenario["poison"] is not None and scenario["poison"][0] == rank:
        task = Poisoned(task, *scenario["poison"][1:])
    engine = build_native_engine(config, world, TestAccelerator(scenario["memory_bytes"][rank]), task, weights=weights)
    for group in dist.distributed_c10d._world.pg_map if world.size > 1 else ():
        waits = group._get_backend(torch.device("cpu")).options._timeout
        assert waits == timedelta(seconds=PROCESS_GROUP_TIMEOUT_SECONDS) or group is dist.group.WORLD
    samples = torch.load(folder / "batches.pt")
    rows = config.train.global_batch_size // engine.data_size
    mine = slice(engine.data_rank * rows, (engine.data_rank + 1) * rows)

    def batch(step: int) -> Batch:
        of_rank = {name: column[step - 1, mine] for name, column in samples.items()}
        others = {column.name: of_rank[column.name] for column in task.columns}
        return Batch(of_rank["tokens"], of_rank["labels"], others, of_rank.get("documents"))

    pointers = [chunk.tensor.data_ptr() for chunk in engine.state()]
    evaluations = []
    if scenario["load_from"] is not None:
        # Evaluated first: weights that a forward pass gathered must not survive the load.
        engine.evaluate(batch(1))
        load(engine.state(), Path(scenario["load_from"]))
        engine.set_updates(scenario["first_step"] - 1)
    results, before, first_state = [], bits(engine), None
    for step in range(scenario["first_step"], scenario["last_step"] + 1):
        wish = scenario["stop"] == [rank, step]
        votes = Votes(stop=wish, skip_save=[rank, step] == [0, 2], leave_out=[rank, step] == scenario["leave_out"])
        result = engine.step(batch(step), step=step, votes=votes)
        # What a rank waited for the others is of this minute, and no two runs have it alike.
        results.append(vars(replace(result, waited_seconds=None)) | {"agreed": tuple(result.agreed)})
        if not result.updated:
            assert same_bits(before, engine), f"step {step} was left out"
        before = bits(engine)
        if step == 1 and scenario["first_state"]:
            first_state = saved_state(engine)
        if step % 5 == 0:
            evaluations.append(engine.evaluate(batch(step)))
    assert pointers == [chunk.tensor.data_ptr() for chunk in engine.state()], "a chunk aliases the same memory always"
    kept = {"results": results, "evaluations": evaluations, "state": saved_state(engine), "first_state": first_state}
    if scenario["rows"]:
        kept["rows"] = log_probs_of_all_rows(engine, batch(scenario["last_step"]))
    if scenario["questions"] is not None:
        kept["asked"] = asked(engine, config, world, task, scenario["questions"], batch(1))
    torch.save(kept, folder / f"rank-{rank}.pt")
    engine.close()
    if world.size > 1:
        dist.destroy_process_group()
    assert not dist.is_initialized()


def bits(engine: Engine) -> list[torch.Tensor]:
    """All that a step may change: parameters, moments, and AdamW's counts of updates."""
    moments = engine._moments if hasattr(engine, "_moments") else engine._optimizer.state.values()  # pyright: ignore
    counts = [each["step"] for each in moments]
    return [tensor.clone() for tensor in (*(chunk.tensor for chunk in engine.state()), *counts)]


def same_bits(before: list[torch.Tensor], engine: Engine) -> bool:
    return all(torch.equal(old, new) for old, new in zip(before, bits(engine), strict=True))


class Poisoned:
    """A task, and one micro-batch of its training whose objective has slopes of `value`."""

    def __init__(self, task: Task, step: int, micro_batch: int, value: float, per_step: int):
        """per_step: micro-batches of a step on this rank."""
        self._task = task
        self._at = (step - 1) * per_step + micro_batch
        self._value = value
        self._seen = -1

    def __getattr__(self, name: str) -> object:
        return getattr(self._task, name)

    @property
    def slopes(self) -> str:
        """Never "fixed", or the native engine would ask twice for a micro-batch's."""
        return "signed" if self._task.slopes == "signed" else "negative"

    def score(self, log_probs_BT: torch.Tensor, batch: Batch) -> Scored:
        scored = self._task.score(log_probs_BT, batch)
        # The native engine asks while it makes gradients itself; a step that is poisoned comes before any evaluation.
        self._seen += 1
        return scored._replace(slope_BT=scored.slope_BT * self._value) if self._seen == self._at else scored


def saved_state(engine: Engine) -> list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor, bool]]:
    """A copy of it, on the CPU."""
    return [
        (c.name, c.global_shape, c.offsets, c.tensor.to("cpu", copy=True).contiguous(), c.saved_here)
        for c in engine.state()
    ]


def log_probs_of_all_rows(engine: Engine, batch: Batch) -> torch.Tensor:
    """Of the global batch, on every rank."""
    mine_B = engine.row_log_probs(batch)
    all_DB = torch.zeros(engine.data_size, len(mine_B))
    all_DB[engine.data_rank] = mine_B
    return engine.sum_over_ranks(all_DB.flatten())


class Heard(QuestionRows):
    """Keeps the scores of all rows."""

    def judged(self, scores_R: torch.Tensor) -> dict[str, float]:
        self.scores_R = scores_R.clone()
        return super().judged(scores_R)


def asked(
    engine: Engine, config: Config, world: World, task: Task, questions: str, held_out: Batch
) -> tuple[torch.Tensor, dict[str, float]]:
    """What an evaluation with these questions scores each choice, and its metrics."""
    tokenizer = Tokenizer.train([questions], vocab_size=300)
    ranks = {"data_rank": engine.data_rank, "data_size": engine.data_size}
    rows = Heard(parse(questions.encode(), "q"), tokenizer, config, batch_size=rows_of_call(config, world), **ranks)
    documents = {"own": EvaluationSet([held_out], num_documents=1, num_tokens=1, num_bytes=1)}
    metrics = Evaluation(engine, task, documents, questions={"q": rows}).metrics(lambda done, total: None)
    return rows.scores_R[: rows._num_rows], metrics


def load(chunks: list, folder: Path) -> None:
    """Copies the blocks that another layout's ranks saved into this rank's; or what a run begins with, as ranks do."""
    if (folder / BASE_NAME).exists():
        weights = [chunk for chunk in chunks if chunk.name.startswith(MODEL_PREFIX)]
        load_checkpoint(base_of(Store(folder)), weights, dtypes="converted")
        return
    whole: dict[str, torch.Tensor] = {}
    for path in folder.glob("rank-*.pt"):
        for name, shape, offsets, tensor, saved_here in torch.load(path)["state"]:
            if saved_here:
                target = whole.setdefault(name, torch.full(shape, torch.nan))
                target[extent(offsets, tensor.shape)] = tensor
    for chunk in chunks:
        chunk.tensor.copy_(whole[chunk.name][extent(chunk.offsets, chunk.tensor.shape)])


def extent(offsets: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(begin, begin + size) for begin, size in zip(offsets, shape, strict=True))


if __name__ == "__main__":
    serve_folders(run_rank)
