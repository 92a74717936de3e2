"""FSDP2's collectives, watched: a checksum of the gradients that go into them, and how long they take.

FSDP2 adds up gradients inside the backward pass, and lets its collectives be replaced. These are torch's own, with the
same bits. A checksum is a sum of int32, which any one flipped bit changes, wherever it is; it stays on the device. What
is compared was computed by the same kernels in the same order, so equal means equal bits.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from raynium.config.schema import Config
from raynium.errors import ConfigError


class Waiting:
    """How long this rank was in collectives: mostly until the others had come, too. On CUDA by the device's clock."""

    def __init__(self, device_type: str):
        self._on_device = device_type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.Event, torch.Event]] = []

    @contextlib.contextmanager
    def counts(self) -> Iterator[None]:
        if self._on_device:
            events = torch.Event(enable_timing=True), torch.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def taken(self) -> float:
        """Since it was last asked, once the device has nothing left to do."""
        seconds = self._seconds + sum(began.elapsed_time(ended) for began, ended in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return seconds


class TimedAllGather(DefaultAllGather):
    def __init__(self, waiting: Waiting):
        self._waiting = waiting

    def __call__(self, *given: Any, **named: Any) -> Any:
        with self._waiting.counts():
            return super().__call__(*given, **named)


class GradientWatch(DefaultReduceScatter):
    """Of one rank of a model that FSDP2 shards."""

    def __init__(self, modules: Sequence[FSDPModule], waiting: Waiting, *, device_type: str):
        self._device_type, self._waiting = device_type, waiting
        self._watching, self._reduces = False, True
        self._checksum: Tensor | None = None
        for module in modules:
            module.set_custom_reduce_scatter(self)
            module.set_custom_all_gather(TimedAllGather(waiting))

    def of(self, accumulate: Callable[[], Tensor], *, reduces: bool = True) -> tuple[Tensor, int]:
        """What `accumulate` returns, the task's sums, and the checksum of these and of the gradients that it makes.

        reduces: else gradients are not sent, and what is left of them means nothing. Waits for the device.
        """
        self._watching, self._reduces, self._checksum = True, reduces, None
        try:
            with repeatable(self._device_type):
                sums = accumulate()
        finally:
            self._watching, self._reduces = False, True
        assert self._checksum is not None, "FSDP reduced no gradient"
        return sums, int(self._checksum + checksum([sums]))

    # ---- what FSDP2 calls --------------------------------------------------------------------------------------------

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *group_and_op: Any, **named: Any) -> Any:
        if self._watching:
            here = checksum([input_tensor])
            self._checksum = here if self._checksum is None else self._checksum + here
        if self._reduces:
            with self._waiting.counts():
                return super().__call__(output_tensor, input_tensor, *group_and_op, **named)
        output_tensor.zero_()
        return None


def gather(numbers: Sequence[int], *, device: str) -> list[list[int]]:
    """Equally many int32 of every rank, by rank. All ranks call it; if one dies, others wait until they are ended."""
    mine = torch.tensor(numbers, dtype=torch.int32, device=device)
    of_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, mine)
    return torch.stack(of_ranks).tolist()


def refuse_simple_fsdp(config: Config) -> None:
    """Raises ConfigError where its gradients would have to be watched; `engine.fsdp` auto may have become it."""
    if config.fault.audit_every_steps is not None:
        raise ConfigError(
            [
                "fault.audit_every_steps is set with engine.fsdp simple, whose compiled graphs add up the gradients of "
                "ranks before anybody can compare them: set engine.fsdp to fsdp2, or fault.audit_every_steps to null"
            ]
        )


def checksum(tensors: Iterable[Tensor]) -> Tensor:
    """Of float32 or float64 values, int32 on their device: the sum of their bit patterns, modulo 2**32."""
    sums = [tensor.flatten().view(torch.int32).sum(dtype=torch.int32) for tensor in tensors]
    return torch.stack(sums).sum(dtype=torch.int32)


@contextlib.contextmanager
def repeatable(device_type: str) -> Iterator[None]:
    """Kernels that give the same bits each time. Others than CUDA's do anyway; of CUDA's, attention's backward pass
    adds in the order in which it happens. With compiled blocks the first such step compiles once more.
    """
    if device_type != "cuda" or torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
