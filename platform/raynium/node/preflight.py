"""Preflight: is each node fit for the run, before its ranks are started and the hour is paid for. No ray in here.

`NodeProbe` is what runs on each node, `preflight_cluster.py` places one per node through Ray, and `Report` is what came
out. In order of cost: what shows without a rank, then a trial of this node's ranks in a group of their own, which finds
the sick core, then one group over all nodes, which finds the network.
"""

import os
import socket
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raynium.accelerators import neuron, neuron_xla
from raynium.accelerators.base import Accelerator, Place
from raynium.accelerators.detect import detect
from raynium.config.images import copy_slots, image_slots
from raynium.config.local_folders import scratch_folder
from raynium.config.schema import Config
from raynium.errors import LaunchError, StoreError
from raynium.health.checks import MAX_CLOCK_SECONDS, NodeNeeds, compile_cache, host_checks
from raynium.health.host import Check, Host, Status, ThisHost
from raynium.health.trial_checks import (
    RankResult,
    gemm_check,
    nccom_test,
    node_floor,
    ranks_check,
    reduce_check,
    trial_plan,
)
from raynium.node.diagnosis import KernelLog
from raynium.node.orphans import end_orphans
from raynium.node.ranks import RankGroup
from raynium.planning.memory import shared_memory_bytes
from raynium.rank.ports import rendezvous_socket
from raynium.rank.trial import run_trial
from raynium.storage.backend import KeyMissing
from raynium.storage.own_folder import temporary_folder
from raynium.storage.store import Store
from raynium.train.link import Phase

POLL_SECONDS = 0.5
# After the first rank that failed: its peers' own reasons may follow.
SETTLE_SECONDS = 1.0
# At most so much of the time left is for AWS's own benchmark.
NCCOM_SHARE = 0.3
COMPILERS = ("neuronx-cc", "walrus_driver")


@dataclass(frozen=True)
class TrialOrder:
    """One node's part in a trial. seconds: then ranks that have not ended are killed."""

    first_rank: int
    world_size: int
    master_host: str
    master_port: int
    gemm: bool
    seconds: float


# ---- what the run will ask of a node -------------------------------------------------------------------------------


def needs_of(config: Config, environment: Mapping[str, str]) -> NodeNeeds:
    """config: settled. environment: the node's."""
    folders = [str(scratch_folder()), tempfile.gettempdir()]
    if cache := cache_folder(config, environment):
        folders.append(cache)
    return NodeNeeds(
        accelerator=config.cluster.accelerator,
        nodes=config.cluster.nodes,
        ranks=config.cluster.ranks_per_node,
        shared_memory_bytes=shared_memory_bytes(config),
        images=image_slots(config.fault),
        copies=copy_slots(config),
        disk_folders=tuple(folders),
        instance_type=config.cluster.instance_type,
        own_pids=frozenset({os.getpid(), os.getppid()}),
    )


def cache_folder(config: Config, environment: Mapping[str, str]) -> str | None:
    """The folder of this node that is the cache of a trial's ranks, if one is. A run's: see node/compile_cache.py."""
    match config.cluster.accelerator:
        case "neuron":
            folder = environment.get(neuron.NEFF_CACHE, neuron.default_cache(environment))
        case "neuron_xla":
            folder = environment.get(neuron_xla.CACHE_URL, neuron_xla.default_cache())
        case _:
            return None
    return None if "://" in folder else folder


def kernel_log() -> Check:
    """Whether the kernel will say why it ended a rank, and what broke below one."""
    name, rule = "kernel log", "can be read: it explains deaths that nothing else does"
    log = KernelLog()
    log.close()
    if log.source is not None:
        return Check(name, "ok", log.source, rule)
    remedy = "add the node's user to the group adm, or give a container /dev/kmsg and CAP_SYSLOG"
    return Check(name, "warning", log.problem, rule, remedy)


def storage_checks(root: str, *, probes: str, node: str) -> list[Check]:
    """The run's root takes, gives back and deletes; all nodes and the driver see the same one; its clock is ours.

    probes: a folder of the root in which the driver left the key "driver". node: a name of this node's own.
    """
    rule = "write, read and delete under run.root"
    try:
        store = Store(root)
        store.check_writable()
        before = time.time()
        store.replace(f"{probes}/{node}", b"probe")
        theirs = store.list(probes, recursive=False).modified_unix[f"{probes}/{node}"]
        after = time.time()
        checks = [Check("storage", "ok", store.url, rule)]
    except StoreError as error:
        return [Check("storage", "failed", str(error), rule)]
    try:
        store.read(f"{probes}/driver")
    except KeyMissing:
        remedy = "use s3://, or a file system that every node mounts at the same path"
        return [Check("storage", "failed", f"{store.url} is not the folder that the driver writes", rule, remedy)]
    # S3's times are of whole seconds.
    seconds = max(before - 1 - theirs, theirs - after, 0.0)
    remedy = "start chrony or ntpd on the node" if seconds > MAX_CLOCK_SECONDS else ""
    status: Status = "warning" if remedy else "ok"
    return [
        *checks,
        Check("clock", status, f"{seconds:.0f} s off the storage's", f"at most {MAX_CLOCK_SECONDS:g} s", remedy),
    ]


# ---- on each node --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Met:
    """What a node says when it is called upon."""

    free_port: int
    product_name: str | None


class NodeProbe:
    """Looks at one node. Holds the cores that the run will have there; ends with its process."""

    def __init__(self, config_json: Mapping[str, Any], probes: str):
        """config_json: settled. probes: see `storage_checks`."""
        self._config = Config.model_validate(config_json)
        self._probes = probes
        self._rendezvous: socket.socket | None = None

    def meet(self, host: str) -> Met:
        """host: this node's address."""
        if self._rendezvous is not None:
            self._rendezvous.close()
        self._rendezvous = rendezvous_socket(host)
        return Met(self._rendezvous.getsockname()[1], ThisHost().machine.product_name)

    def look(self) -> list[Check]:
        """What shows without a rank. Orphans are ended first, since they may hold cores."""
        config, host = self._config, ThisHost()
        orphans = end_orphans()
        checks = host_checks(host, needs_of(config, os.environ))
        checks.append(kernel_log())
        if orphans:
            checks.append(Check("orphans", "warning", "; ".join(orphans), "no process of a dead node agent"))
        if cache := cache_folder(config, os.environ):
            checks.append(compile_cache(cache))
        return checks + storage_checks(
            config.run.root, probes=self._probes, node=f"{socket.gethostname()}-{os.getpid()}"
        )

    def trial_here(self, host: str, seconds: float) -> list[Check]:
        """This node's ranks in a group of their own, and AWS's benchmark where there is one. host: this node's."""
        config, began = self._config, time.monotonic()
        ranks, on_cpu = config.cluster.ranks_per_node, config.cluster.accelerator == "cpu"
        checks = []
        if config.cluster.accelerator in ("neuron", "neuron_xla"):
            checks.append(nccom_test(ThisHost(), ranks=ranks, timeout_seconds=NCCOM_SHARE * seconds))
        left = seconds - (time.monotonic() - began)
        port = self.meet(host).free_port
        results = self.trial(TrialOrder(0, ranks, host, port, gemm=True, seconds=left))
        floor = node_floor(ThisHost().machine.instance, on_cpu=on_cpu)
        return [
            *checks,
            ranks_check(results),
            gemm_check(results, on_cpu=on_cpu),
            reduce_check("all-reduce", results, ranks=ranks, on_cpu=on_cpu, floor_bytes_per_second=floor),
        ]

    def trial(self, order: TrialOrder) -> list[RankResult]:
        """One result for each rank of this node. Every node of the order's world must be asked at the same time."""
        try:
            return run_ranks(detect(self._config.cluster.accelerator), self._config, order, self._rendezvous)
        except LaunchError as error:
            return [RankResult(order.first_rank, problem=str(error))]


def run_ranks(
    accelerator: Accelerator, config: Config, order: TrialOrder, rendezvous: socket.socket | None = None
) -> list[RankResult]:
    """Forks this node's ranks as a run would, and ends them at the order's time. Raises LaunchError.

    rendezvous: where rank 0 will listen, if it is one of them; closed here. A rank that only waited for one that failed
    has no problem of its own.
    """
    deadline = time.monotonic() + order.seconds
    with temporary_folder("preflight") as folder:
        plan = trial_plan(accelerator, folder=str(folder), seconds=order.seconds, gemm=order.gemm)
        environments = _environments(accelerator, config, order)
        group = RankGroup(environments, plan.to_json(), program=run_trial, rendezvous=rendezvous)
        if rendezvous is not None:
            rendezvous.close()
        phases: dict[int, str] = {}
        while group.alive() and (left := deadline - time.monotonic()) > 0:
            messages, _ = group.poll(min(POLL_SECONDS, left))
            phases |= {rank: message.name for rank, message in messages if isinstance(message, Phase)}
            if any(each.process.exitcode != 0 for each in group.ended()):
                deadline = min(deadline, time.monotonic() + SETTLE_SECONDS)
        silent = {each.rank for each in group.alive()}
        compiling = bool(silent) and compiler_runs(ThisHost())
        group.kill()
        messages, _ = group.drain()
        phases |= {rank: message.name for rank, message in messages if isinstance(message, Phase)}
        exits = {rank: each.exit() for rank, each in group.ranks.items()}
        group.close()
        failed = {rank for rank, each in exits.items() if rank not in silent and each.cause is not None}
        results = []
        for rank, each in exits.items():
            path = Path(folder, f"rank-{rank:05d}.json")
            if path.is_file():
                results.append(RankResult.from_json(path.read_text(encoding="utf-8")))
            elif rank in failed:
                results.append(RankResult(rank, problem=f"{each.cause} (in phase {phases.get(rank, 'fork')!r})"))
            elif failed:
                results.append(RankResult(rank))
            else:
                where = f"still in phase {phases.get(rank, 'fork')!r} after {order.seconds:.0f} s"
                if compiling:
                    results.append(RankResult(rank, unjudged=f"{where}, while a compiler runs"))
                else:
                    results.append(RankResult(rank, problem=where))
        return results


def compiler_runs(host: Host) -> bool:
    """Whether a Neuron compiler is at work: then ranks that are late wait for it, and not for a sick core.

    A graph takes it seconds under TorchNeuron and minutes under torch-xla, where nothing is cached yet.
    """
    processes = (name for name in host.names("/proc") if name.isdecimal())
    return any(name in (host.read(f"/proc/{pid}/cmdline") or "") for pid in processes for name in COMPILERS)


def _environments(accelerator: Accelerator, config: Config, order: TrialOrder) -> dict[int, dict[str, str]]:
    """Rank → its variables, those that a run's ranks get (node/agent.py)."""
    per_node, environments = config.cluster.ranks_per_node, {}
    for local_rank in range(per_node):
        place = Place(
            rank=order.first_rank + local_rank,
            world_size=order.world_size,
            local_rank=local_rank,
            local_world_size=per_node,
            master_host=order.master_host,
            master_port=order.master_port,
            run_name=config.run.name,
            inherited=os.environ,
        )
        environments[place.rank] = place.standard_variables() | accelerator.environment(place)
    return environments
