"""What one step reports: a flat dict, keys `area/name_unit` (the list is `tracking/metrics.py`)."""

from dataclasses import dataclass

from raynium.engines.base import StepResult
from raynium.tasks.base import Task


@dataclass(frozen=True)
class Throughput:
    """Turns a step's result and duration into what is reported. Arithmetic only; any rank may call it.

    tokens_per_step: over all ranks. global_batch_size: sequences per step. flops_per_token_6n: 6 FLOPs per parameter
    and token, forward and backward of the matrices. flops_per_token_with_attention: the same plus the attention scores.
    peak_flops_per_rank: dense peak of the compute dtype; None: unknown, then no MFU is reported.
    """

    task: Task
    world_size: int
    tokens_per_step: int
    global_batch_size: int
    flops_per_token_6n: float
    flops_per_token_with_attention: float
    peak_flops_per_rank: float | None

    def metrics(self, step: int, result: StepResult, *, step_seconds: float, data_seconds: float) -> dict[str, float]:
        """Rates count the labels that count, over all ranks, and not what fills rows up.

        train/tokens is of all positions, and so known at any step without those before it.
        """
        tokens_per_second = result.tokens / step_seconds
        values = {
            "train/loss": result.loss,
            "train/grad_norm": result.grad_norm,
            **self.task.training(result.sums),
            "train/learning_rate": result.learning_rate,
            "train/tokens": float(step * self.tokens_per_step),
            "train/samples": float(step * self.global_batch_size),
            "time/step_seconds": step_seconds,
            "time/data_seconds": data_seconds,
            "throughput/tokens_per_second": tokens_per_second,
            "throughput/tokens_per_second_per_rank": tokens_per_second / self.world_size,
        }
        if self.peak_flops_per_rank is not None:
            peak = self.peak_flops_per_rank * self.world_size
            values["throughput/peak_flops_per_rank"] = self.peak_flops_per_rank
            values["throughput/mfu_6n"] = tokens_per_second * self.flops_per_token_6n / peak
            values["throughput/mfu_with_attention"] = tokens_per_second * self.flops_per_token_with_attention / peak
        return values
