"""Trains a config twice, without faults and under a schedule of them, and holds the two runs against each other."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

from raynium.chaos.cut_proxy import CutProxy
from raynium.chaos.driver import DrivenRun
from raynium.chaos.flaky_s3 import FlakyS3
from raynium.chaos.kinds import NEEDS, SPIKE, BadStep, FlippedBit, Kind, NotThere, Scene, Struck, kinds_for
from raynium.chaos.loopback import LoopbackCluster
from raynium.chaos.schedule import Fault, beside_audits, healing_steps, refuse_crowd, schedule
from raynium.chaos.steps import Cost, Steps, cost
from raynium.chaos.verdict import Claim, claims
from raynium.checkpoint.catalog import step_folders
from raynium.config.schema import Config
from raynium.config.world import World
from raynium.errors import ConfigError, LaunchError
from raynium.rank.armed import BAD_NAME, CHAOS_VARIABLE, FLIPS_NAME, LIMIT_NAME, STEPS_NAME
from raynium.run.bad_nodes import forget
from raynium.run.past import run_store
from raynium.run.record import read_record
from raynium.storage.process import pid_started
from raynium.storage.store import Store
from raynium.tracking.runs import resolve_uri

POLL_SECONDS = 0.02
# Between two looks whether a fault has shown, some of which are through all processes of this machine.
SHOWN_SECONDS = 0.25
# Until a new step is done after a fault, or what it wants to hit is there. The slowest thing is a driver's start.
HEAL_SECONDS = 600.0
# Between two looks whether the store has a newer checkpoint.
COMMIT_SECONDS = 0.2
# So long a run stands at the last step that it may take before it may take more, while no checkpoint comes.
HELD_SECONDS = 3.0
# A stopped uploader is waited for so often.
LONGEST_SILENCE_SECONDS = 60.0
ENDPOINT_VARIABLE = "AWS_ENDPOINT_URL"
# A leap is told by the fifty steps before it that were learned from (train/guard.py); some of them are bad ones.
LEAPS_FROM = 70
# The most that fault.max_bad_steps can be.
MOST_BAD = 255


@dataclass(frozen=True)
class Happened:
    """A fault that the run has survived."""

    fault: Fault
    what: str
    cost: Cost


@dataclass(frozen=True)
class Soak:
    """What came of it. claims: what was promised, and whether it held."""

    happened: list[Happened]
    claims: list[Claim]

    @property
    def passed(self) -> bool:
        return all(claim.holds for claim in self.claims)

    def table(self) -> list[tuple[str, ...]]:
        """A row for each kind: how often, the median and the worst seconds, the most steps done again."""
        rows = []
        for kind in sorted({each.fault.kind for each in self.happened}):
            costs = [each.cost for each in self.happened if each.fault.kind == kind]
            seconds = sorted(each.seconds for each in costs)
            again = max(each.steps for each in costs)
            rows.append((kind, str(len(costs)), f"{seconds[len(seconds) // 2]:.2f}", f"{seconds[-1]:.2f}", str(again)))
        return rows


class GivenUp(Exception):
    """The run did not live on after a fault; the message says which and what the driver said."""


class FinishedEarly(Exception):
    """The run took its last step before a fault could happen."""


def soak(config: Config, *, faults: int, seed: int, folder: Path, tell: Callable[[str], None]) -> Soak:
    """Starts both runs on this machine, one after the other. folder: for their output, empty.

    Raises ConfigError and LaunchError before anything is started; LaunchError if the run without faults fails.
    """
    steps = config.train.steps
    if steps is None:
        raise ConfigError(["faults are spread over train.steps, which train.epochs leaves open: set train.steps"])
    if config.cluster.seats > 1:
        _refuse_cluster(config)
    refuse_crowd(faults=faults, steps=steps, checkpoint_every=config.checkpoint.every_steps)
    plain, faulted = _named(config)
    endpoint = os.environ.get(ENDPOINT_VARIABLE, "")
    mlflow_uri = resolve_uri(config.tracking.uri, config.run.root)
    audit_every = _audits_every(config)
    has = _has(config, endpoint=endpoint, mlflow_uri=mlflow_uri, audit_every=audit_every)
    kinds, missing = kinds_for(has)
    for kind in missing:
        tell(f"left out: {kind.name}, which needs {NEEDS[kind.needs]}")
    by_name = {kind.name: kind for kind in kinds}
    planned = schedule(list(by_name), faults=faults, steps=steps, seed=seed, not_before={SPIKE.name: LEAPS_FROM})
    if audit_every is not None:
        spoils = [kind.name for kind in kinds if isinstance(kind, BadStep)]
        planned = beside_audits(planned, every_steps=audit_every, flips=FlippedBit.name, spoils=spoils)
    bad = {fault.step: kind.factor for fault in planned if isinstance(kind := by_name[fault.kind], BadStep)}
    plain, faulted = _with_bad_steps(plain, faulted, bad)

    tell(f"run {plain.run.name}: {steps:,} steps without faults")
    began = time.monotonic()
    first = _watched(plain, folder / "plain", {})
    with first:
        first.driven.start()
        if first.driven.wait() != 0:
            raise LaunchError(f"the run without faults failed:\n{first.driven.last_lines()}")
        first.steps.look()
    tell(f"run {plain.run.name}: finished after {time.monotonic() - began:.0f} s")

    log = folder / "faulted/log"
    tell(f"run {faulted.run.name}: the same with {len(planned)} faults of seed {seed}; its output: {log}")
    happened: list[Happened] = []
    with contextlib.ExitStack() as open_things:
        proxy = open_things.enter_context(FlakyS3(endpoint)) if "s3" in has else None
        environment = {ENDPOINT_VARIABLE: proxy.endpoint} if proxy is not None else {}
        mlflow_proxy = open_things.enter_context(CutProxy(mlflow_uri)) if "server" in has else None
        if mlflow_proxy is not None:
            tracking = faulted.tracking.model_copy(update={"uri": mlflow_proxy.uri})
            faulted = faulted.model_copy(update={"tracking": tracking})
        second = open_things.enter_context(_watched(faulted, folder / "faulted", environment))
        bad_file = second.steps.file.with_name(BAD_NAME)
        bad_file.write_text("".join(f"{step} {factor}\n" for step, factor in bad.items()), encoding="utf-8")
        flips = [f"{fault.step}\n" for fault in planned if fault.kind == FlippedBit.name]
        bad_file.with_name(FLIPS_NAME).write_text("".join(flips), encoding="utf-8")
        second.driven.start()
        scenes = _Scenes(second, mlflow_uri, proxy, mlflow_proxy)
        try:
            early: list[Claim] = []
            try:
                for fault in planned:
                    happened.append(_one_fault(fault, by_name[fault.kind], scenes, tell, of=len(planned)))
            except FinishedEarly as error:
                early.append(Claim(False, f"faults: {len(happened)} of {len(planned)} happened: {error}"))
            second.may_finish()
            second.until_finished()
            both = first.steps, second.steps
            tell(f"nobody typed anything: drivers that died were started again, {second.driven.starts - 1} time(s)")
            found = [*claims(plain, faulted, steps=both, bad_steps=bad, tell=tell), *early]
        except GivenUp as error:
            found = [Claim(False, f"the run went on after every fault: {error}")]
    # This machine is as good as before.
    forget(Store(config.run.root), run=faulted.run.name)
    return Soak(happened, found)


def _has(config: Config, *, endpoint: str, mlflow_uri: str, audit_every: int | None) -> set[str]:
    """Of what kinds need, by the names of `NEEDS`, what this run has. endpoint: of its S3."""
    several = config.cluster.seats > 1
    has = {
        "s3": config.run.root.startswith("s3://") and endpoint.startswith("http://"),
        "folder": run_store(config).local_path is not None,
        "sqlite": mlflow_uri.startswith("sqlite"),
        "server": mlflow_uri.startswith("http://"),
        "silence": config.fault.upload_silence_seconds <= LONGEST_SILENCE_SECONDS,
        "audits": not several
        and audit_every is not None
        and audit_every <= healing_steps(config.checkpoint.every_steps),
        "nodes": several,
        "spares": config.cluster.spares > 0,
        "leaps": config.fault.spike_score is not None
        and not config.data.stages
        and (config.train.steps or 0) > LEAPS_FROM,
    }
    return {need for need, there in has.items() if there}


def _refuse_cluster(config: Config) -> None:
    """Raises ConfigError where its nodes cannot be played on this machine, or the bits are not promised."""
    asked = config.cluster
    if asked.accelerator != "cpu":
        problem = (
            f"cluster.accelerator is {asked.accelerator} and the run takes {asked.seats} nodes: chaos plays them on "
            "this machine, whose devices they cannot share. Set cluster.accelerator=cpu, or one node and no spares"
        )
        raise ConfigError([problem])
    if asked.min_nodes is not None and asked.min_nodes < asked.nodes:
        problem = (
            f"cluster.min_nodes is {asked.min_nodes} of {asked.nodes}: fewer ranks add in another order, and chaos "
            "compares bits. Leave cluster.min_nodes out"
        )
        raise ConfigError([problem])


def _audits_every(config: Config) -> int | None:
    every_steps = config.fault.audit_every_steps
    if every_steps == 1:
        raise ConfigError(
            ["fault.audit_every_steps is 1: chaos spoils gradients in steps that no audit looks at; set 2 or more"]
        )
    return every_steps if World.of(config).data > 1 else None


def _with_bad_steps(plain: Config, faulted: Config, bad: Collection[int]) -> tuple[Config, Config]:
    """One is told which steps to leave out, and the other lives with so many, whatever its limit."""
    told = tuple(sorted({*plain.data.leave_out_steps, *bad}))
    most = max(faulted.fault.max_bad_steps, min(len(bad), MOST_BAD))
    return (
        plain.model_copy(update={"data": plain.data.model_copy(update={"leave_out_steps": told})}),
        faulted.model_copy(update={"fault": faulted.fault.model_copy(update={"max_bad_steps": most})}),
    )


def _named(config: Config) -> tuple[Config, Config]:
    """The config under two names that no run has yet."""
    number = 1
    while True:
        names = [f"{config.run.name}-{what}-{number}" for what in ("plain", "chaos")]
        both = [config.model_copy(update={"run": config.run.model_copy(update={"name": name})}) for name in names]
        if all(read_record(run_store(each)) is None for each in both):
            return both[0], both[1]
        number += 1


@dataclass
class _WatchedRun:
    driven: DrivenRun
    steps: Steps
    cluster: LoopbackCluster | None
    _limit: int = 0
    _held_since: float = math.inf

    def __enter__(self) -> "_WatchedRun":
        if self.cluster is not None:
            self.cluster.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        # A rank that is held back could not save and end.
        self.may_finish()
        self.driven.__exit__(*exception)
        if self.cluster is not None:
            self.cluster.__exit__(*exception)

    def look(self) -> None:
        """Raises GivenUp if the driver has ended as it should not."""
        self.steps.look()
        code = self.driven.exit_code()
        if code is not None and code != 0:
            raise GivenUp(f"the driver ended with {code}:\n{self.driven.last_lines()}")

    def until_finished(self) -> None:
        """Raises GivenUp."""
        if (code := self.driven.wait()) != 0:
            raise GivenUp(f"after the last fault the driver ended with {code}:\n{self.driven.last_lines()}")
        self.steps.look()

    def may_take(self, step: int, more: int | None = None) -> None:
        """Steps until this one and some more; None: as many as it takes to heal."""
        limit = self.steps.file.with_name(LIMIT_NAME)
        more = healing_steps(self.driven.config.checkpoint.every_steps) if more is None else more
        last = max(step, self.steps.newest) + more
        replacement = limit.with_suffix(".new")
        replacement.write_text(str(last), encoding="utf-8")
        replacement.replace(limit)
        self._limit, self._held_since = last, math.inf

    def may_go_on(self, more: int | None = None) -> None:
        """As `may_take`, once it has stood at its last step for a while."""
        self.steps.look()
        if self.steps.newest < self._limit:
            return
        self._held_since = min(self._held_since, time.monotonic())
        if time.monotonic() - self._held_since >= HELD_SECONDS:
            self.may_take(self.steps.newest, more)

    def may_finish(self) -> None:
        self.steps.file.with_name(LIMIT_NAME).unlink(missing_ok=True)

    def newest_checkpoint(self) -> int:
        folders = step_folders(run_store(self.driven.config))
        return max((each.step for each in folders if each.manifest is not None), default=0)


def _watched(config: Config, folder: Path, environment: Mapping[str, str]) -> _WatchedRun:
    folder.mkdir(parents=True)
    asked, everything = config.cluster, {**os.environ, **environment, CHAOS_VARIABLE: str(folder)}
    cluster = None
    if asked.seats > 1:
        cluster = LoopbackCluster(folder, everything, nodes=asked.seats, cpus=asked.ranks_per_node)
    return _WatchedRun(DrivenRun(config, folder, everything, cluster), Steps(folder / STEPS_NAME), cluster)


@dataclass(frozen=True)
class _Scenes:
    run: _WatchedRun
    mlflow_uri: str
    proxy: FlakyS3 | None
    mlflow_proxy: CutProxy | None

    def now(self) -> Scene:
        run = self.run
        return Scene(
            run.driven.processes(),
            self.mlflow_uri,
            run.steps.file.parent,
            self.proxy,
            run_store(run.driven.config).local_path,
            self.mlflow_proxy,
            run.cluster,
        )


def _one_fault(fault: Fault, kind: Kind, scenes: _Scenes, tell: Callable[[str], None], *, of: int) -> Happened:
    """Waits for its step, strikes, and stays until the run is as well as before. Raises GivenUp and FinishedEarly."""
    run = scenes.run
    run.may_take(fault.step)
    for _ in _patiently(run, f"fault {fault.number} waits for step {fault.step}", seconds=float("inf")):
        if run.steps.newest >= fault.step:
            break
    checkpoint = run.newest_checkpoint()
    hit = _strike(fault, kind, scenes)
    struck = hit.struck
    reached = run.steps.newest
    run.may_take(reached)
    tell(f"fault {fault.number}/{of} at step {reached:,}: {kind.name}: {struck.what}")
    if struck.ends_driver:
        run.driven.wait()
        run.driven.start()
    _until_it_ends(struck, run)
    # What it took while the fault lasted is not what it needs afterwards.
    run.look()
    run.may_take(run.steps.newest)
    over_unix = time.time() if struck.seconds else hit.unix
    paid: Cost | None = None
    for _ in _patiently(run, f"no new step since fault {fault.number} ({struck.what})"):
        # Ranks of a dead driver go on for some seconds: the next ones need steps of their own.
        if struck.ends_ranks and hit.ranks and not any(map(pid_started, hit.ranks)):
            hit.ranks.clear()
            run.may_take(run.steps.newest)
        paid = cost(
            run.steps, struck_unix=hit.unix, over_unix=over_unix, ends_ranks=struck.ends_ranks, before=hit.before
        )
        # A run that finishes meanwhile has no further step to show; what it lacks is seen afterwards.
        if paid is not None or run.driven.exit_code() == 0:
            break
    paid = paid or Cost(0.0, 0)
    tell(f"    it stood still for {paid.seconds:.2f} s, and took {paid.steps} step(s) again")
    # The next one finds a run that has got on, as a run of weeks does between two faults.
    looked = 0.0
    for _ in _patiently(run, f"no new checkpoint since fault {fault.number} ({struck.what})"):
        if run.driven.exit_code() == 0:
            break
        if time.monotonic() - looked >= COMMIT_SECONDS:
            looked = time.monotonic()
            if run.newest_checkpoint() > checkpoint:
                break
            # Saves that were given up are not made again: it takes further steps to the next.
            run.may_go_on()
    return Happened(fault, struck.what, paid)


def _until_it_ends(struck: Struck, run: _WatchedRun) -> None:
    """A fault that lasts. Ranks that nothing hinders stand at their last step meanwhile, and must not seem to hang."""
    until = time.monotonic() + struck.seconds
    while time.monotonic() < until and not struck.has_shown():
        run.may_go_on(1)
        time.sleep(SHOWN_SECONDS)
    # It takes a while where nodes are started.
    with ThreadPoolExecutor(1, "fault-ends") as thread:
        ending = thread.submit(struck.end)
        while not ending.done():
            run.may_go_on(1)
            time.sleep(SHOWN_SECONDS)
        ending.result()


@dataclass(frozen=True)
class _Hit:
    """before: how many steps had been written down. ranks: pids of those that ran."""

    struck: Struck
    unix: float
    before: int
    ranks: set[int]


def _strike(fault: Fault, kind: Kind, scenes: _Scenes) -> _Hit:
    """Raises GivenUp and FinishedEarly."""
    run, problem = scenes.run, ""
    for _ in _patiently(run, f"fault {fault.number} ({kind.name}) found nothing to hit"):
        if run.driven.exit_code() == 0:
            raise FinishedEarly(
                f"the run had finished before fault {fault.number} ({kind.name}) could{problem}. Set more train.steps, "
                "so that there is time to heal"
            )
        try:
            before, unix, scene = len(run.steps.taken), time.time(), scenes.now()
            if isinstance(kind, BadStep | FlippedBit):
                # It has happened, maybe while the run healed from the one before; a flipped bit before that step was
                # done, and after the one before it was.
                last = fault.step - isinstance(kind, FlippedBit)
                before = 1 + next(place for place, each in enumerate(run.steps.taken) if each.step == last)
                unix = run.steps.taken[before - 1].unix
            struck = kind.strike(scene, Random(fault.seed))
            return _Hit(struck, unix, before, {each.pid for each in scene.processes.ranks()})
        except NotThere as error:
            problem = f" ({error})"
    raise AssertionError


def _patiently(run: _WatchedRun, what: str, *, seconds: float = HEAL_SECONDS) -> Iterator[None]:
    """Looks again and again. Raises GivenUp where it takes longer than any healing may."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        run.look()
        yield
        time.sleep(POLL_SECONDS)
    raise GivenUp(f"{what} for {seconds:.0f} s:\n{run.driven.last_lines()}")
