"""Builds one rank's parts from the plan and runs the loop: all that a rank process does.

This is the only place that knows every constructor. A node agent forks it (`rank/entry.py`); for debugging,
`torchrun --nproc-per-node 2 -m raynium.standalone CONFIG` starts the same ranks without Ray.
"""

import logging
import os
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist

from raynium.accelerators.base import Accelerator
from raynium.accelerators.detect import detect
from raynium.accelerators.timeouts import PROCESS_GROUP_TIMEOUT_SECONDS
from raynium.config.images import image_slots
from raynium.config.schema import Config
from raynium.config.world import World
from raynium.data.access import open_fetched
from raynium.data.evaluation import EvaluationSet, evaluation_set
from raynium.data.judges import kept_questions, open_sets
from raynium.data.loader import Loader, open_loader
from raynium.data.store import OpenStore
from raynium.engines.base import Engine
from raynium.engines.collectives import gather
from raynium.engines.native import NativeEngine, build_native_engine
from raynium.engines.nxd import build_nxd_engine
from raynium.engines.torch_compiles import TorchCompiles
from raynium.models.flops import flops_per_token
from raynium.rank.armed import armed, armed_memory, armed_task
from raynium.rank.evaluation import Evaluation, QuestionRows, rows_of_call
from raynium.rank.evidence import Evidence
from raynium.rank.group import join_group
from raynium.rank.origin import Origin, resumes
from raynium.rank.pairs import pair_data
from raynium.rank.plan import RankPlan
from raynium.rank.snapshots import NoSnapshots, Snapshots
from raynium.storage.store import Store
from raynium.tasks.base import Task
from raynium.tasks.registry import task_of
from raynium.train.audit import Audits
from raynium.train.compiles import WatchedEngine
from raynium.train.guard import Guard
from raynium.train.link import Link
from raynium.train.loop import Cadence, Outcome, Steps, train
from raynium.train.metrics import Throughput
from raynium.train.patience import Patience

logger = logging.getLogger(__name__)


def run(plan: RankPlan, link: Link) -> Outcome:
    """One generation of this rank, from process group to the last snapshot. Every rank of the world calls it.

    Reads the standard environment: RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
    """
    config = plan.config
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])

    # ---- the process group first: on Trainium nothing may touch the device before it -------------------------------
    at = plan.resume_step or 0
    link.phase("start", at)
    accelerator = detect(config.cluster.accelerator)
    accelerator.set_device(local_rank)
    link.phase("group", at)
    join_group(
        accelerator.process_group_backend,
        rank=rank,
        world_size=plan.world.size,
        timeout_seconds=PROCESS_GROUP_TIMEOUT_SECONDS,
    )
    torch.manual_seed(config.run.seed + rank)

    # ---- model, optimizer, and the state they start from -----------------------------------------------------------
    link.phase("build", at)
    task = armed_task(task_of(config), rank=rank)
    compiles = TorchCompiles()
    weights = "loaded" if resumes(plan) else "first"
    base = "loaded" if config.model.init is not None else "first"
    if config.engine.kind == "nxd":
        built = build_nxd_engine(config, plan.world, task, weights="first" if weights == base == "first" else "loaded")
    else:
        backend = compiles.backend(accelerator.compile_backend)
        built = build_native_engine(
            config, plan.world, accelerator, task, compile_backend=backend, weights=weights, base=base
        )
    engine = WatchedEngine(armed(built, task), torch_compiles=compiles, device_counts=accelerator.metrics, link=link)
    guard, patience = _guard(plan), Patience.of(config)
    snapshots = _snapshots(plan, engine, link, guard, patience)
    origin = Origin(plan, engine, snapshots)
    link.phase("restore", at)
    start_step = origin.restore()

    # ---- data ------------------------------------------------------------------------------------------------------
    link.phase("data", start_step)
    documents = _documents(plan)
    # Ranks that see the same samples read the same blocks.
    sharers = max(1, plan.world.ranks_per_node // (plan.world.tensor * plan.world.pipeline))
    of_call = rows_of_call(config, plan.world)
    pairs = pair_data(config, task, engine, documents, origin, batch_size=of_call, tell=link.evaluating)
    loader = open_loader(
        config,
        documents,
        data_rank=engine.data_rank,
        data_size=engine.data_size,
        cache_sharers=sharers,
        columns={column.name for column in task.columns},
        references=pairs.references,
    )
    read = partial(_evaluation, plan, engine, task, documents, pairs.held_out, batch_size=of_call)
    evaluation = _at_need(plan, read)

    # ---- train -----------------------------------------------------------------------------------------------------
    link.phase("fetch", start_step + 1)
    outcome = train(
        engine=_audited(engine, built, loader, plan, accelerator),
        batches=loader,
        cadence=Cadence.of(config),
        start_step=start_step,
        evaluate=lambda: evaluation().metrics(link.evaluating) | accelerator.metrics() | engine.compile_metrics(),
        guard=guard,
        evidence=_evidence(plan, engine, loader, documents),
        patience=patience,
        snapshots=snapshots if config.checkpoint.save == "steps" else NoSnapshots(link),
        throughput=_throughput(config, plan.world, accelerator, task),
        link=link,
    )
    loader.close()
    engine.close()
    dist.destroy_process_group()
    return outcome


def _audited(engine: Engine, built: Engine, loader: Loader, plan: RankPlan, accelerator: Accelerator) -> Steps:
    """built: without its watches. With one data rank there is nobody to compare with; the driver has said so."""
    every_steps = plan.config.fault.audit_every_steps
    if every_steps is None or plan.world.data == 1:
        return engine
    assert isinstance(built, NativeEngine), "planning.rules refuses others"
    gathers = partial(gather, device=accelerator.device_type)
    return Audits(engine, built, loader.batch_of, gathers, every_steps=every_steps, world=plan.world)


def _snapshots(plan: RankPlan, engine: Engine, link: Link, guard: Guard, patience: Patience) -> Snapshots:
    config, folder = plan.config, Path(plan.image_folder)
    if_busy, num_images = config.checkpoint.if_busy, image_slots(config.fault)
    # A run that begins is refused what it will never have; one that goes on has had it.
    if_short = "skip" if resumes(plan) else "refuse"
    return Snapshots(
        engine,
        link,
        folder,
        guard,
        patience,
        if_busy=if_busy,
        num_images=num_images,
        if_short=if_short,
        has_memory=armed_memory,
    )


def _documents(plan: RankPlan) -> list[OpenStore]:
    data, run = plan.config.data, plan.config.run.place
    places = zip(plan.data_places, data.stores, strict=True)
    return [open_fetched(data, place, identity=store.identity, run=run) for place, store in places]


def _guard(plan: RankPlan) -> Guard:
    return Guard.of(plan.config, undone=plan.undone_steps, suspected=plan.suspected_steps)


def _evidence(plan: RankPlan, engine: Engine, loader: Loader, documents: list[OpenStore]) -> Evidence:
    names = [each.name for each in plan.config.data.stores]
    return Evidence(engine, loader, stores=names, text=lambda tokens: documents[0].tokenizer().decode(tokens))


def _by_name(plan: RankPlan, documents: list[OpenStore]) -> dict[str, OpenStore]:
    return {entry.name: store for entry, store in zip(plan.config.data.stores, documents, strict=True)}


def _held_out(
    plan: RankPlan, engine: Engine, stores: Mapping[str, OpenStore], *, batch_size: int
) -> dict[str, EvaluationSet]:
    return {
        name: evaluation_set(
            store,
            seq_len=plan.config.data.seq_len,
            batch_size=batch_size,
            data_rank=engine.data_rank,
            data_size=engine.data_size,
            max_documents=plan.config.evaluate.max_documents,
        )
        for name, store in stores.items()
    }


def _at_need(plan: RankPlan, read: Callable[[], Evaluation]) -> Callable[[], Evaluation]:
    """Reads once, when it is asked for first: ranks that go on are back at their first step sooner.

    Where a run begins that is at once, since what is wrong with it is better told before it trains.
    """
    at_need = cache(read)
    if not resumes(plan):
        at_need()
    return at_need


def _evaluation(
    plan: RankPlan,
    engine: Engine,
    task: Task,
    documents: list[OpenStore],
    held_out_pairs: Mapping[str, EvaluationSet],
    *,
    batch_size: int,
) -> Evaluation:
    held_out = held_out_pairs or _held_out(plan, engine, _by_name(plan, documents), batch_size=batch_size)
    config, tokenizer = plan.config, documents[0].tokenizer()
    sets = _held_out(plan, engine, open_sets(config), batch_size=batch_size)
    questions = {
        name: QuestionRows(
            each,
            tokenizer,
            config,
            batch_size=batch_size,
            data_rank=engine.data_rank,
            data_size=engine.data_size,
        )
        for name, each in kept_questions(config, Store(plan.run_url)).items()
    }
    return Evaluation(engine, task, held_out, sets=sets, questions=questions)


def _throughput(config: Config, world: World, accelerator: Accelerator, task: Task) -> Throughput:
    flops = flops_per_token(config.model, config.data.seq_len, config.adapter)
    return Throughput(
        task=task,
        world_size=world.size,
        tokens_per_step=config.tokens_per_step,
        global_batch_size=config.train.global_batch_size,
        flops_per_token_6n=flops.six_n,
        flops_per_token_with_attention=flops.with_attention,
        peak_flops_per_rank=accelerator.peak_flops(config.engine.dtype),
    )
