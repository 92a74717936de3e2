"""What a trial of ranks (`raynium/rank/trial.py`) is asked for, and how its numbers are judged. Data in, checks out.

The floors find what is broken, not what is slow: a device's work done by the host's CPU, a core throttled to a
fraction, a network card without its driver. On CPU ranks share cores with everybody, so there they only warn.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from raynium.accelerators.base import Accelerator
from raynium.hardware.catalog import Instance
from raynium.health.host import NO_ANSWER, Check, Host, Status

# Assumptions, not measurements: a healthy device reaches several times these with one 4096 × 4096 product, launch
# included; the host's CPU reaches about a hundredth.
MIN_GEMM_SHARE_OF_PEAK = 0.10
# In float32. One core has 30e9 to 150e9.
MIN_CPU_GEMM_FLOPS = 5e9
# A core that is this much slower than its node's median is told apart from one whose neighbours are as slow.
MIN_GEMM_SHARE_OF_MEDIAN = 0.5
# nccom-test's own example in AWS's documentation (tools/neuron-sys-tools/nccom-test): 40.69 GB/s of bus bandwidth for
# 32 MB over two cores. A tenth of it.
MIN_NODE_BUS_BYTES_PER_SECOND = 4e9
# Of the catalogue's EFA figure. The sweep ends at a size that fills no network: for 32 MB over 64 ranks of two nodes
# the same documentation shows 22.7 GB/s, less than a tenth of what the cards of a trn2.48xlarge carry, and more nodes
# make it less. An assumption.
MIN_SHARE_OF_EFA = 0.01
# A CPU cluster's plain network: below it, gradients of any model take longer than its steps. An assumption.
MIN_CPU_BUS_BYTES_PER_SECOND = 0.05e9

# Rows and columns, by torch's device type; DEVICE_GEMM_SIZE for all others.
GEMM_SIZES = {"cpu": 512}
DEVICE_GEMM_SIZE = 4096
REDUCE_BYTES = (64 * 2**10, 2**20, 32 * 2**20)
CPU_REDUCE_BYTES = (64 * 2**10, 4 * 2**20)


@dataclass(frozen=True)
class TrialPlan:
    """What each rank of a trial does. The same for all ranks.

    folder: each rank leaves its `RankResult` there. gemm_size: 0 for none. seconds: of the process group's timeout.
    """

    accelerator: str
    folder: str
    gemm_size: int
    reduce_bytes: tuple[int, ...]
    seconds: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "TrialPlan":
        fields = json.loads(text)
        return cls(**fields | {"reduce_bytes": tuple(fields["reduce_bytes"])})


@dataclass(frozen=True)
class Gemm:
    """One rank's matrix products.

    flops_per_second: of the fastest, launch and reading one number included. first_seconds: with what was compiled for
    it. exact: the product of integers is that of the CPU, to the bit. peak_flops: of the data sheet, in that dtype.
    """

    flops_per_second: float
    first_seconds: float
    exact: bool
    peak_flops: float | None


@dataclass(frozen=True)
class Reduced:
    """One size of the all-reduce sweep on one rank; the seconds of the fastest."""

    num_bytes: int
    seconds: float
    exact: bool

    def bus_bytes_per_second(self, ranks: int) -> float:
        """nccl-tests' and nccom-test's measure: what each link carries, whatever the number of ranks."""
        return self.num_bytes / self.seconds * 2 * (ranks - 1) / ranks


@dataclass(frozen=True)
class RankResult:
    """What one rank found; `problem` if it did not come to the end, or `unjudged` if that says nothing of its node."""

    rank: int
    gemm: Gemm | None = None
    reduced: tuple[Reduced, ...] = field(default_factory=tuple)
    problem: str = ""
    unjudged: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RankResult":
        fields: dict[str, Any] = json.loads(text)
        gemm = Gemm(**fields["gemm"]) if fields["gemm"] is not None else None
        return cls(**fields | {"gemm": gemm, "reduced": tuple(Reduced(**each) for each in fields["reduced"])})


def trial_plan(accelerator: Accelerator, *, folder: str, seconds: float, gemm: bool) -> TrialPlan:
    on_cpu = accelerator.device_type == "cpu"
    size = GEMM_SIZES.get(accelerator.device_type, DEVICE_GEMM_SIZE) if gemm else 0
    return TrialPlan(accelerator.name, folder, size, CPU_REDUCE_BYTES if on_cpu else REDUCE_BYTES, seconds)


def ranks_check(results: Sequence[RankResult]) -> Check:
    """Every rank came to the end of its trial."""
    name, rule = "ranks", "every rank starts, joins its group and ends"
    problems = [f"rank {each.rank}: {each.problem}" for each in results if each.problem]
    unjudged = [f"rank {each.rank}: {each.unjudged}" for each in results if each.unjudged]
    if problems:
        return Check(name, "failed", _first_few(problems), rule, "look into the node's log")
    if unjudged:
        remedy = "raise preflight.seconds, or try again: what has been compiled is kept"
        return Check(name, "warning", f"not judged: {_first_few(unjudged)}", rule, remedy)
    return Check(name, "ok", f"{len(results)} started and ended", rule)


def gemm_check(results: Sequence[RankResult], *, on_cpu: bool) -> Check:
    """Products are exact on every core, and no core is far below its peak or its neighbours."""
    name = "matrix product"
    rule = _gemm_rule(on_cpu)
    done = {each.rank: each.gemm for each in results if each.gemm is not None}
    if not done:
        return Check(name, "skipped", "no rank came so far", rule)
    rates = {rank: gemm.flops_per_second for rank, gemm in done.items()}
    slowest = min(rates, key=lambda rank: rates[rank])
    shown = (
        f"{rates[slowest] / 1e12:.3g} (rank {slowest}) to {max(rates.values()) / 1e12:.3g} TFLOP/s; the first took "
        f"{max(gemm.first_seconds for gemm in done.values()):.1f} s"
    )
    if wrong := [rank for rank, gemm in done.items() if not gemm.exact]:
        return Check(name, "failed", f"wrong numbers from rank(s) {_listed(wrong)}; {shown}", rule, "replace the node")
    slow_status: Status = "warning" if on_cpu else "failed"
    below_peak = [rank for rank, gemm in done.items() if rates[rank] < _gemm_floor(gemm, on_cpu)]
    if below_peak:
        remedy = (
            "something else runs on this machine's cores"
            if on_cpu
            else "is the work done by the CPU? `raynium doctor`; a device that is throttled or ill: replace the node"
        )
        return Check(name, slow_status, f"too slow: rank(s) {_listed(below_peak)}; {shown}", rule, remedy)
    if below := [rank for rank in rates if rates[rank] < MIN_GEMM_SHARE_OF_MEDIAN * median(rates.values())]:
        remedy = "the slowest rank sets the pace of all: replace the node"
        found = f"rank(s) {_listed(below)} below half of the node's median; {shown}"
        return Check(name, slow_status, found, rule, "" if on_cpu else remedy)
    return Check(name, "ok", shown, rule)


def _gemm_rule(on_cpu: bool) -> str:
    floor = f"{MIN_CPU_GEMM_FLOPS / 1e9:g} GFLOP/s" if on_cpu else f"{MIN_GEMM_SHARE_OF_PEAK:.0%} of the peak"
    return f"exact, at least {floor} and half of the node's median"


def _gemm_floor(gemm: Gemm, on_cpu: bool) -> float:
    if on_cpu:
        return MIN_CPU_GEMM_FLOPS
    return MIN_GEMM_SHARE_OF_PEAK * gemm.peak_flops if gemm.peak_flops is not None else 0.0


def reduce_check(
    name: str, results: Sequence[RankResult], *, ranks: int, on_cpu: bool, floor_bytes_per_second: float
) -> Check:
    """Sums are exact on every rank, and the best size of the sweep is above the floor."""
    rule = f"exact, at least {floor_bytes_per_second / 1e9:.3g} GB/s of bus bandwidth"
    if ranks == 1:
        return Check(name, "skipped", "one rank has nobody to talk to", rule)
    swept = {each.rank: each.reduced for each in results if each.reduced}
    if not swept:
        return Check(name, "skipped", "no rank came so far", rule)
    # The slowest rank's time of each size; then the size that carried most.
    by_size = {size: max(reduced[i].seconds for reduced in swept.values()) for i, size in enumerate(_sizes(swept))}
    best = max(Reduced(size, seconds, True).bus_bytes_per_second(ranks) for size, seconds in by_size.items())
    largest = max(by_size)
    shown = f"{best / 1e9:.3g} GB/s over {ranks} ranks; {largest / 2**20:g} MiB in {by_size[largest] * 1e3:.3g} ms"
    if wrong := [rank for rank, reduced in swept.items() if not all(each.exact for each in reduced)]:
        return Check(name, "failed", f"wrong sums on rank(s) {_listed(wrong)}; {shown}", rule, "replace the node")
    if best < floor_bytes_per_second:
        remedy = "" if on_cpu else "check the EFA cards and their driver, the placement group, and the security group"
        return Check(name, "warning" if on_cpu else "failed", shown, rule, remedy)
    return Check(name, "ok", shown, rule)


def _sizes(swept: dict[int, tuple[Reduced, ...]]) -> list[int]:
    return [each.num_bytes for each in next(iter(swept.values()))]


def node_floor(instance: Instance | None, *, on_cpu: bool) -> float:
    """Bus bandwidth within a node, bytes/s; 0: no floor is known."""
    if on_cpu:
        return MIN_CPU_BUS_BYTES_PER_SECOND
    return MIN_NODE_BUS_BYTES_PER_SECOND if instance is not None else 0.0


def cluster_floor(instance: Instance | None, *, on_cpu: bool) -> float:
    """Bus bandwidth between nodes, bytes/s; 0: no floor is known."""
    if on_cpu:
        return MIN_CPU_BUS_BYTES_PER_SECOND
    gbps = instance.efa_gbps if instance is not None else None
    return MIN_SHARE_OF_EFA * gbps * 1e9 / 8 if gbps else 0.0


def nccom_test(host: Host, *, ranks: int, timeout_seconds: float) -> Check:
    """AWS's own all-reduce benchmark over the node's cores, without torch: tells a fault of the device from ours."""
    name, rule = "nccom-test", f"at least {MIN_NODE_BUS_BYTES_PER_SECOND / 1e9:g} GB/s, checked sums"
    if ranks == 1:
        return Check(name, "skipped", "one rank has nobody to talk to", rule)
    ran = host.run(*nccom_command(ranks), timeout_seconds=timeout_seconds)
    if ran is None:
        return Check(name, "skipped", "not installed (aws-neuronx-tools)", rule)
    shown = " ".join(ran.output.split()[-8:])
    # It compiles first; a node that hangs shows in the trial of the ranks, which follows.
    if ran.code == NO_ANSWER:
        return Check(name, "warning", shown, rule, "raise preflight.seconds")
    if ran.code != 0:
        return Check(name, "failed", f"ended with {ran.code}: {shown}", rule, "run it by hand; else replace the node")
    # What the runtime logs may follow.
    said = re.search(r"Avg bus bandwidth:\s*([\d.]+)\s*GB/s", ran.output)
    if said is None:
        return Check(name, "warning", f"answers in another format than documented: {shown}", rule)
    gb_per_second = float(said[1])
    if gb_per_second * 1e9 < MIN_NODE_BUS_BYTES_PER_SECOND:
        return Check(name, "failed", f"{gb_per_second:g} GB/s", rule, "replace the node")
    return Check(name, "ok", f"{gb_per_second:g} GB/s", rule)


def nccom_command(ranks: int) -> tuple[str, ...]:
    """-c checks sums; older versions can do so for fp32 only."""
    sweep = ("allr", "-b", "32MB", "-e", "32MB", "-n", "5", "-w", "2", "-d", "fp32", "-c", "--non-interactive")
    return ("/opt/aws/neuron/bin/nccom-test", "-r", str(ranks), *sweep)


def _first_few(texts: Sequence[str]) -> str:
    return "; ".join(texts[:4]) + (f"; and {len(texts) - 4} more" if len(texts) > 4 else "")


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (" …" if len(ranks) > 8 else "")
