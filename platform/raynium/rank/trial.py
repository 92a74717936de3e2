"""What a rank runs in a preflight: a matrix product and a sweep of all-reduces, on a run's device and in its group.

Operands are small integers, so that every sum is exact in bfloat16 and float32 whatever the order: a number that
differs from the CPU's is a fault and not rounding.
"""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from raynium.accelerators.detect import detect
from raynium.health.trial_checks import Gemm, RankResult, Reduced, TrialPlan
from raynium.rank.group import join_group

if TYPE_CHECKING:
    import torch

    from raynium.train.link import Link
    from raynium.train.loop import Outcome

# The fastest counts.
REPEATS = 5
# This part of the left operand is not zero: sums stay within ±256, which bfloat16 holds exactly.
NON_ZERO = 1 / 32
# Vectors that the product is compared on; a wrong row passes all of them in one case of 256.
NUM_PROBES = 8


def run_trial(plan_json: str, link: "Link") -> "Outcome":
    """A rank's program, in the place of `rank_entry.train_plan`. Every rank of the trial calls it.

    A peer that dies in a collective ends it by the group's timeout, or by the node's deadline.
    """
    import torch
    import torch.distributed as dist

    from raynium.train.loop import Outcome

    plan = TrialPlan.from_json(plan_json)
    rank, world_size, local_rank, local_world_size = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    # The ranks of a node prepare and judge side by side.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size))
    link.phase("start", 0)
    accelerator = detect(plan.accelerator)
    device = accelerator.set_device(local_rank)
    link.phase("process group", 0)
    backend = accelerator.process_group_backend
    join_group(backend, rank=rank, world_size=world_size, timeout_seconds=plan.seconds)
    gemm, reduced = None, ()
    if plan.gemm_size:
        link.phase("matrix product", 0)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        peak_flops = accelerator.peak_flops(str(dtype).removeprefix("torch."))
        gemm = multiply(device, size=plan.gemm_size, dtype=dtype, peak_flops=peak_flops)
    if world_size > 1:
        link.phase("all-reduce", 0)
        reduced = tuple(all_reduce(device, num_bytes, rank, world_size) for num_bytes in plan.reduce_bytes)
    link.phase("end", 0)
    Path(plan.folder, f"rank-{rank:05d}.json").write_text(RankResult(rank, gemm, reduced).to_json(), encoding="utf-8")
    dist.destroy_process_group()
    return Outcome(step=0, reason="finished")


def multiply(device: "torch.device", *, size: int, dtype: "torch.dtype", peak_flops: float | None) -> Gemm:
    """[size, size] @ [size, size] in `dtype`, compared with the CPU on random vectors (Freivalds' test)."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def signs(*shape: int) -> torch.Tensor:
        return torch.randint(0, 2, shape, generator=generator).float() * 2 - 1

    left = signs(size, size) * (torch.rand(size, size, generator=generator) < NON_ZERO)
    right, probes = signs(size, size), signs(size, NUM_PROBES)
    left_there, right_there = left.to(dtype).to(device), right.to(dtype).to(device)
    seconds = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        product = left_there @ right_there
        # This waits for the device, also for one that computes only what is read.
        product.amax().item()
        seconds.append(time.perf_counter() - began)
    product = (left_there @ right_there).cpu().float()
    # The sums are below 2^24: exact in float32.
    exact = torch.equal(product @ probes, left @ (right @ probes))
    return Gemm(2 * size**3 / min(seconds[1:]), seconds[0], exact, peak_flops)


def all_reduce(device: "torch.device", num_bytes: int, rank: int, world_size: int) -> Reduced:
    """Sums `num_bytes` of float32 over all ranks, which must call it together."""
    import torch
    import torch.distributed as dist

    own, expected = float(rank + 1), world_size * (world_size + 1) / 2
    seconds, exact = [], True
    # The first makes connections, and compiles.
    for _ in range(1 + REPEATS):
        values = torch.full((num_bytes // 4,), own, dtype=torch.float32).to(device)
        began = time.perf_counter()
        dist.all_reduce(values)
        largest = values.amax().item()
        seconds.append(time.perf_counter() - began)
        exact = exact and largest == expected == values.amin().item()
    return Reduced(num_bytes, min(seconds[1:]), exact)
