"""Preflight through Ray: a probe on each node, with the cores that the run would have there.

Every node that has the run's resources is checked, also those that it does not need: Ray may place it on any, and
after a loss on another. One that fails is named and left out: the run asks Ray for nodes without that id (each has its
own in the label ray.io/node-id), at its first placement and at every later one. Nodes that other jobs hold, or that
join afterwards, are not checked.
"""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray
import ray.exceptions
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from raynium.config.schema import Config
from raynium.hardware.catalog import INSTANCES
from raynium.health.host import Check
from raynium.health.report import NodeReport, Report, blamed, rounds_of_pairs
from raynium.health.trial_checks import RankResult, cluster_floor, ranks_check, reduce_check
from raynium.launch.nodes import NODE_ID_LABEL, fitting_nodes
from raynium.node.preflight import NodeProbe, TrialOrder
from raynium.storage.store import Store

# For Python, Raynium and the job's runtime environment on a node.
PROBE_START_SECONDS = 60.0
# Longer than for the nodes that had free cores: one that has not come by then has none.
BUSY_SECONDS = 10.0
# For an answer, beyond the time that the node was given.
GRACE_SECONDS = 15.0
# Of the time left, for each node's own trial, and again for that of all: a hang must leave time to find who hangs.
TRIAL_SHARE = 0.5

# Without ranks, or with them.
Level = Literal["host", "all"]


@dataclass(frozen=True)
class _Node:
    """A node of the cluster, with a probe on it."""

    node_id: str
    host: str
    probe: Any


class Preflight:
    """One preflight of one cluster, on which `ray` is initialised. Use `check_nodes`."""

    def __init__(self, config: Config, *, resources: Mapping[str, float], level: Level, tell: Callable[[str], None]):
        self.config = config
        self.resources = dict(resources)
        self.level: Level = level
        self.tell = tell
        # Of all that runs on nodes; set when the first are there.
        self.deadline = 0.0
        self._probes_folder = f"preflight-{secrets.token_hex(6)}"
        self._store = Store(config.run.root)
        self._reports: dict[str, NodeReport] = {}
        self._fit: dict[str, _Node] = {}
        self._busy: list[str] = []
        self._between: tuple[Check, ...] = ()

    def run(self, *, wait: Callable[[], bool]) -> Report | None:
        """See `check_nodes`."""
        self._store.replace(f"{self._probes_folder}/driver", b"driver")
        try:
            needed = self._place(wait)
            if not needed:
                return None
            began = time.monotonic()
            self.deadline = began + self.config.preflight.seconds
            self._check_alone(needed)
            if self.level == "all":
                self._check_all_together()
            return self._report(time.monotonic() - began)
        finally:
            for node in self._fit.values():
                ray.kill(node.probe)
            self._store.delete_prefix(self._probes_folder)

    def _report(self, seconds: float) -> Report:
        nodes, busy = tuple(self._reports.values()), tuple(self._busy)
        return Report(self.config.cluster.seats, nodes, self._between, busy, seconds)

    def _left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    # ---- where ---------------------------------------------------------------------------------------------------

    def _place(self, wait: Callable[[], bool]) -> list[str]:
        """Ids of nodes that Ray would give the run now; [] once `wait` says no.

        Asking is also what makes an autoscaler start nodes.
        """
        count = self.config.cluster.seats
        strategy = "STRICT_SPREAD" if count > 1 else "PACK"
        group = placement_group([self.resources] * count, strategy=strategy)
        try:
            while not group.wait(1):
                if not wait():
                    return []
            return list(placement_group_table(group)["bundles_to_node_id"].values())
        finally:
            remove_placement_group(group)

    def _start_probes(self, needed: Sequence[str]) -> list[_Node]:
        """On every node that could take part: the run may be placed on any, now or for one that was lost.

        needed: nodes that had free cores a moment ago; others may be held by other jobs, and are not waited for.
        """
        hosts = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        options = {
            "num_cpus": self.resources.get("CPU", 0),
            "num_gpus": self.resources.get("GPU", 0),
            "resources": {name: each for name, each in self.resources.items() if name not in ("CPU", "GPU")},
        }
        arguments = (self.config.model_dump(mode="json"), self._probes_folder)
        nodes = []
        for node_id in fitting_nodes(self.resources):
            actor = ray.remote(NodeProbe).options(label_selector={NODE_ID_LABEL: node_id}, **options)
            nodes.append(_Node(node_id, hosts[node_id], actor.remote(*arguments)))
        asked = {node.probe.meet.remote(node.host): node for node in nodes}
        firm = [reference for reference, node in asked.items() if node.node_id in needed]
        ray.wait(firm, num_returns=len(firm), timeout=PROBE_START_SECONDS)
        _, late = ray.wait(list(asked), num_returns=len(asked), timeout=0 if len(firm) == len(asked) else BUSY_SECONDS)
        for node in (asked[each] for each in late):
            ray.kill(node.probe)
            if node.node_id in needed:
                found = f"it did not start within {PROBE_START_SECONDS:g} s"
                check = Check("probe", "failed", found, "starts", "look into the node's Ray logs, or replace it")
                self._reports[node.node_id] = NodeReport(node.node_id, node.host, (check,))
                self.tell(f"preflight: node {node.host} is left out: {check}")
            else:
                self._busy.append(node.host)
        return [node for reference, node in asked.items() if reference not in late]

    # ---- what ----------------------------------------------------------------------------------------------------

    def _check_alone(self, needed: Sequence[str]) -> None:
        nodes = self._start_probes(needed)
        checks = self._ask(nodes, "look", {node.node_id: () for node in nodes})
        if self.level == "all":
            well = [node for node in nodes if not any(check.is_bad for check in checks[node.node_id])]
            arguments = {node.node_id: (node.host, TRIAL_SHARE * self._left()) for node in well}
            for node_id, found in self._ask(well, "trial_here", arguments).items():
                checks[node_id] += found
        for node in nodes:
            self._fit[node.node_id] = node
            self._reports[node.node_id] = NodeReport(node.node_id, node.host, tuple(checks[node.node_id]))
            if self._reports[node.node_id].bad:
                self._set_apart(node.node_id)

    def _ask(self, nodes: Sequence[_Node], method: str, arguments: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
        """Node id → the answer, all asked at once; for one that does not answer, a failed check that says so."""
        asked = {node.node_id: getattr(node.probe, method).remote(*arguments[node.node_id]) for node in nodes}
        answers: dict[str, Any] = {}
        deadline = time.monotonic() + self._left() + GRACE_SECONDS
        for node_id, reference in asked.items():
            try:
                answers[node_id] = ray.get(reference, timeout=max(0.0, deadline - time.monotonic()))
            except ray.exceptions.GetTimeoutError:
                found = f"no answer to {method!r} within preflight.seconds={self.config.preflight.seconds:g}"
                answers[node_id] = [
                    Check("probe", "failed", found, "answers", "look into the node's log, or replace it")
                ]
            except ray.exceptions.RayError as error:
                found = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
                answers[node_id] = [Check("probe", "failed", found, "lives", "look into the node's log, or replace it")]
        return answers

    def _set_apart(self, node_id: str, check: Check | None = None) -> None:
        """A node that the run will not use: its cores are free again, and everybody is told."""
        ray.kill(self._fit.pop(node_id).probe)
        if check is not None:
            report = self._reports[node_id]
            self._reports[node_id] = replace(report, checks=(*report.checks, check))
        for bad in self._reports[node_id].bad:
            self.tell(f"preflight: node {self._reports[node_id].host} is left out: {bad}")

    # ---- together ------------------------------------------------------------------------------------------------

    def _check_all_together(self) -> None:
        """All that are fit, and again without those that turn out to work with nobody."""
        while len(nodes := list(self._fit.values())) > 1:
            self._between = self._check_together(nodes, seconds=TRIAL_SHARE * self._left())
            if not any(check.is_bad for check in self._between):
                return
            culprits = self._find_culprits(nodes)
            if not culprits:
                return
            for node_id, check in culprits.items():
                self._set_apart(node_id, check)

    def _check_together(self, nodes: Sequence[_Node], *, seconds: float) -> tuple[Check, ...]:
        """One process group over all ranks of these nodes."""
        cluster = self.config.cluster
        head, on_cpu = nodes[0], cluster.accelerator == "cpu"
        (met,) = self._ask([head], "meet", {head.node_id: (head.host,)}).values()
        if isinstance(met, list):
            return tuple(met)
        orders = {
            node.node_id: TrialOrder(
                first_rank=number * cluster.ranks_per_node,
                world_size=len(nodes) * cluster.ranks_per_node,
                master_host=head.host,
                master_port=met.free_port,
                gemm=False,
                seconds=seconds,
            )
            for number, node in enumerate(nodes)
        }
        answers = self._ask(nodes, "trial", {node_id: (order,) for node_id, order in orders.items()})
        results: list[RankResult] = []
        for node in nodes:
            for each in answers[node.node_id]:
                if isinstance(each, Check):
                    results.append(RankResult(orders[node.node_id].first_rank, problem=f"{node.host}: {each}"))
                else:
                    results.append(replace(each, problem=each.problem and f"{node.host}: {each.problem}"))
        floor = cluster_floor(INSTANCES.get(met.product_name or ""), on_cpu=on_cpu)
        ranks = len(nodes) * cluster.ranks_per_node
        name = f"all-reduce over {len(nodes)} nodes"
        return (
            replace(ranks_check(results), name=f"ranks of {len(nodes)} nodes"),
            reduce_check(name, results, ranks=ranks, on_cpu=on_cpu, floor_bytes_per_second=floor),
        )

    def _find_culprits(self, nodes: Sequence[_Node]) -> dict[str, Check]:
        """Node id → the failed check, of nodes that work with none of their neighbours, in pairs. Two cannot tell."""
        if len(nodes) < 3:
            return {}
        self.tell(f"preflight: {len(nodes)} nodes do not work together; looking for the one, in pairs")
        by_id = {node.node_id: node for node in nodes}
        worked: dict[tuple[str, str], bool] = {}
        rounds = rounds_of_pairs(list(by_id))
        for number, pairs in enumerate(rounds):
            seconds = self._left() / (len(rounds) - number)
            with ThreadPoolExecutor(len(pairs)) as pool:
                asked = {
                    (a, b): pool.submit(self._check_together, [by_id[a], by_id[b]], seconds=seconds) for a, b in pairs
                }
            worked |= {pair: not any(check.is_bad for check in each.result()) for pair, each in asked.items()}
        remedy = "check its EFA cards, security group and placement group, or replace it"
        return {
            node_id: Check("with others", "failed", "works with no neighbour, which work with others", "all", remedy)
            for node_id in blamed(worked)
        }


def check_nodes(
    config: Config,
    *,
    resources: Mapping[str, float],
    level: Level,
    wait: Callable[[], bool],
    tell: Callable[[str], None],
) -> Report | None:
    """Checks every node that could take part in the run, on the cluster that `ray` is connected to, within
    preflight.seconds from when as many as the run needs are there.

    config: settled. resources: of one node. wait: asked every second while the nodes are not there; when it says no,
    nothing is checked and None returned. tell: gets a line for each node that is left out. Raises StoreError if
    run.root cannot be written.
    """
    return Preflight(config, resources=resources, level=level, tell=tell).run(wait=wait)


def preflight_level(config: Config) -> Level | None:
    """What is checked before this run; None: nothing. See `PreflightSection`."""
    match config.preflight.before_run:
        case "none":
            return None
        case "auto" if config.cluster.accelerator != "cpu":
            return "all"
        case "auto":
            return "host" if config.cluster.seats > 1 else None
        case level:
            return level
