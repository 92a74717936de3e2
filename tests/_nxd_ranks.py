"""Runs the NxD or the native engine on forked gloo ranks, with one kind of neuronx-distributed, for `test_nxd.py`.

usage: _nxd_ranks.py LIBRARY PLATFORM, then a folder a line on stdin, with what `_engine_ranks.py` has in one;
or: _nxd_ranks.py signatures.
LIBRARY: "source": the real library's public source, in its CPU mode. "xla": the same, computing on the real torch-xla.
"fake": our own fake of what the engine calls. PLATFORM: "trn1" or "trn2".
"""

# pyright: reportMissingImports=false

import importlib
import inspect
import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from _engine_ranks import TASKS, Poisoned, TestAccelerator, bits, load, log_probs_of_all_rows, same_bits, saved_state
from _forked_ranks import serve_folders

from raynium.config.schema import Config
from raynium.config.world import World
from raynium.data.batch import Batch
from raynium.engines.base import Engine, Votes
from raynium.engines.native import build_native_engine
from raynium.engines.nxd import build_nxd_engine


def load_library(library: str, platform: str) -> None:
    """Puts one kind of neuronx-distributed in place and imports it, which takes seconds, before ranks are forked."""
    warnings.simplefilter("ignore")  # the library's own, of newer torch releases
    if library == "fake":
        import _nxd_fake

        _nxd_fake.install(platform=platform)
    else:
        import nxd_twin

        nxd_twin.install(xla=library == "xla", platform=platform)
        sys.path.insert(0, os.environ["RAYNIUM_NXD_SOURCE"])
    import neuronx_distributed  # noqa: F401


def run_rank(rank: int, folder: Path, scenario: dict, library: str) -> None:
    config = Config.model_validate(scenario["config"])
    with (folder / "stderr").open("ab") as stderr:
        os.dup2(stderr.fileno(), 2)
        os.dup2(stderr.fileno(), 1)  # the library's log
    torch.set_num_threads(1)
    world = World.of(config)
    store = dist.FileStore(str(folder / "rendezvous"), world.size)  # pyright: ignore[reportPrivateImportUsage]
    backend = "xla" if library == "xla" and config.engine.kind == "nxd" else "gloo"
    if backend == "xla":
        import torch_xla.distributed.xla_backend  # noqa: F401
    dist.init_process_group(backend, store=store, rank=rank, world_size=world.size)
    weights = "first" if scenario["load_from"] is None else "loaded"
    task = TASKS[scenario["task"]]
    if scenario["poison"] is not None and scenario["poison"][0] == rank:
        task = Poisoned(task, *scenario["poison"][1:])
    engine: Engine
    if config.engine.kind == "nxd":
        engine = build_nxd_engine(config, world, task, weights=weights)
    else:
        engine = build_native_engine(
            config, world, TestAccelerator(scenario["memory_bytes"][rank]), task, weights=weights
        )
    samples = torch.load(folder / "batches.pt")
    rows = config.train.global_batch_size // engine.data_size
    mine = slice(engine.data_rank * rows, (engine.data_rank + 1) * rows)

    def batch(step: int) -> Batch:
        of_rank = {name: column[step - 1, mine] for name, column in samples.items()}
        others = {column.name: of_rank[column.name] for column in task.columns}
        return Batch(of_rank["tokens"], of_rank["labels"], others, of_rank.get("documents"))

    loaded = None
    if scenario["load_from"] is not None:
        engine.evaluate(batch(1))
        load(engine.state(), Path(scenario["load_from"]))
        engine.set_updates(scenario["first_step"] - 1)
        loaded = saved_state(engine)
    evaluations, results, before, first_state = [], [], bits(engine), None
    for step in range(scenario["first_step"], scenario["last_step"] + 1):
        wish = scenario["stop"] == [rank, step]
        votes = Votes(stop=wish, leave_out=[rank, step] == scenario["leave_out"])
        result = engine.step(batch(step), step=step, votes=votes)
        results.append(vars(result) | {"agreed": tuple(result.agreed)})
        if not result.updated:
            assert same_bits(before, engine), f"step {step} was left out"
        before = bits(engine) if library != "xla" else []
        if step == 1 and scenario["first_state"]:
            first_state = saved_state(engine)
        if step % 5 == 0:
            evaluations.append(engine.evaluate(batch(step)))
    graphs_before = compiled_graphs(library)
    kept = {"results": results, "evaluations": evaluations, "state": saved_state(engine), "loaded": loaded}
    kept["first_state"] = first_state
    kept["save_graphs"] = compiled_graphs(library) - graphs_before
    if scenario["rows"]:
        kept["rows"] = log_probs_of_all_rows(engine, batch(scenario["last_step"]))
    torch.save(kept, folder / f"rank-{rank}.pt")
    if config.run.name == "saves-with-nxd":
        save_with_nxd(engine, str(folder / "nxd"))
    engine.close()
    dist.destroy_process_group()


def write_signatures() -> None:
    """As JSON to stdout: what the real library has of the fake's surface, each parameter's name and kind."""
    import _nxd_fake

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    load_library("source", "trn1")
    found = {
        f"{module}.{part.__name__}": parameters_of(getattr(importlib.import_module(module), part.__name__))
        for module, parts in _nxd_fake.SURFACE.items()
        for part in parts
    }
    replies.write(json.dumps(found))
    replies.flush()


def parameters_of(function: object) -> list[list[str]]:
    return [[each.name, str(each.kind)] for each in inspect.signature(function).parameters.values()]  # pyright: ignore[reportArgumentType]


def compiled_graphs(library: str) -> int:
    """By torch-xla, in this process so far."""
    if library != "xla":
        return 0
    import torch_xla.debug.metrics

    return torch_xla.debug.metrics.counter_value("UncachedCompile") or 0


def save_with_nxd(engine: Engine, folder: str) -> None:
    """A checkpoint in the library's own format, for the import to read."""
    import neuronx_distributed as nxd

    nxd.save_checkpoint(folder, "step_1", model=engine._model, optimizer=engine._optimizer, num_workers=1)  # pyright: ignore


def main() -> None:
    if sys.argv[1:] == ["signatures"]:
        return write_signatures()
    library, platform = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w")  # the library logs to stdout
    os.dup2(2, 1)
    load_library(library, platform)
    serve_folders(partial(run_rank, library=library), replies)


if __name__ == "__main__":
    main()
