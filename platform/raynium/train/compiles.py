"""An engine that says what its steps had to compile, and explains each compilation that should not have been.

A shape that changes costs minutes on Trainium, and every rank waits for it. So after the first calls, in which every
graph is compiled, each further one is told with what differs: "step 12, rank 1: forward (decoder.py:82) was compiled
again (4.1 s): hidden_BTD is float32 [4, 256, 64], seen float32 [4, 512, 64]".
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from raynium.checkpoint.state import Chunk
from raynium.data.batch import Batch
from raynium.engines.base import Audit, Engine, StepResult, Votes
from raynium.engines.torch_compiles import Compiled, GraphInput, TorchCompiles, difference, graph_input
from raynium.tasks.base import Sums
from raynium.train.link import Link

# Of steps, of evaluation calls, of passes for rows' log-probabilities, and of copies of the state that compile. The
# second may compile once more: what the first returned or made, such as gradients and gathered parameters, then has its
# final layout.
WARM_UP_CALLS = 2

# "copy": of the state, for a save or a load, between two of the others.
Call = Literal["step", "evaluate", "rows", "copy"]


class WatchedEngine:
    """The engine it is given, and a watch on what is compiled in each call. See `engines/base.py`, Engine."""

    def __init__(
        self,
        engine: Engine,
        *,
        torch_compiles: TorchCompiles,
        device_counts: Callable[[], dict[str, float]],
        link: Link,
    ):
        """device_counts: what the device's own library has compiled on this rank so far, outside torch.compile:
        compile/graphs and compile/seconds, or neither (`Accelerator.metrics`).
        """
        self.data_rank, self.data_size = engine.data_rank, engine.data_size
        self._engine = engine
        self._torch_compiles = torch_compiles
        self._device_counts = device_counts
        self._link = link
        self._step = 0
        self._calls: dict[Call, int] = {"step": 0, "evaluate": 0, "rows": 0, "copy": 0}
        self._batches: dict[Call, list[tuple[GraphInput, ...]]] = {"step": [], "evaluate": [], "rows": []}
        self._graphs, self._seconds = 0, 0.0
        self._device_graphs, self._device_seconds = _graphs_and_seconds(device_counts())
        # Heartbeats, since minutes may pass in a compilation; behind it the rank is again where it was.
        torch_compiles.watch(started=lambda: link.compiling(True), ended=lambda: link.compiling(False))

    def step(self, batch: Batch, *, step: int, votes: Votes, audit: Audit | None = None) -> StepResult:
        self._report_copies()
        self._step = step
        result = self._engine.step(batch, step=step, votes=votes, audit=audit)
        self._report("step", batch)
        return result

    def layer_norms(self, batch: Batch, *, step: int) -> dict[str, float]:
        return self._engine.layer_norms(batch, step=step)

    def evaluate(self, batch: Batch) -> Sums:
        self._report_copies()
        sums = self._engine.evaluate(batch)
        self._report("evaluate", batch)
        return sums

    def row_log_probs(self, batch: Batch) -> Tensor:
        self._report_copies()
        rows_B = self._engine.row_log_probs(batch)
        self._report("rows", batch)
        return rows_B

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return self._engine.sum_over_ranks(values)

    def state(self) -> list[Chunk]:
        return self._engine.state()

    def frozen_state(self) -> list[Chunk]:
        return self._engine.frozen_state()

    def set_updates(self, updates: int) -> None:
        self._engine.set_updates(updates)

    def close(self) -> None:
        self._torch_compiles.close()
        self._engine.close()

    def compile_metrics(self) -> dict[str, float]:
        """Graphs compiled by this rank since it started, and the seconds that took."""
        return {"compile/graphs": float(self._graphs), "compile/seconds": self._seconds}

    def _report_copies(self) -> None:
        """What the device compiled since the last call, which is not the work of the next one."""
        graphs, seconds = self._new_on_the_device()
        if graphs:
            why = "saves and loads before it did without this graph" if self._calls["copy"] else ""
            self._tell("copy", [Compiled("a copy of the state", seconds / graphs, why)] * graphs)

    def _report(self, call: Literal["step", "evaluate", "rows"], batch: Batch) -> None:
        inputs = tuple(graph_input(name, column) for name, column in batch.columns().items())
        compiled = [*self._torch_compiles.new(), *self._compiled_by_the_device(inputs, self._batches[call])]
        if inputs not in self._batches[call]:
            self._batches[call].append(inputs)
        self._tell(call, compiled)

    def _tell(self, call: Call, compiled: list[Compiled]) -> None:
        self._calls[call] += 1
        if not compiled:
            return
        seconds = sum(each.seconds for each in compiled)
        self._graphs += sum(not each.given_up for each in compiled)
        self._seconds += seconds
        warm = self._calls[call] > WARM_UP_CALLS
        surprises = [sentence(each) for each in compiled if warm or each.given_up]
        self._link.compiled(self._step, graphs=len(compiled), seconds=seconds, surprises=surprises)

    def _compiled_by_the_device(
        self, inputs: tuple[GraphInput, ...], seen: list[tuple[GraphInput, ...]]
    ) -> list[Compiled]:
        """torch-xla's: it only counts, so a graph is explained by the batch that its step was given."""
        new_graphs, new_seconds = self._new_on_the_device()
        if not new_graphs:
            return []
        why = difference(inputs, seen)
        if seen and not why:
            why = (
                "the batch is like those seen, so a Python number or a branch in the step changed, which becomes part "
                "of the graph (PT_XLA_DEBUG_LEVEL=2 shows where)"
            )
        return [Compiled("the device's graph", new_seconds / new_graphs, why)] * new_graphs

    def _new_on_the_device(self) -> tuple[int, float]:
        """Graphs that the device's library compiled since it was last asked, and their seconds."""
        graphs, seconds = _graphs_and_seconds(self._device_counts())
        new = graphs - self._device_graphs, seconds - self._device_seconds
        self._device_graphs, self._device_seconds = graphs, seconds
        return new


def sentence(compiled: Compiled) -> str:
    """What happened and why, to be put after "step 12, rank 1: "."""
    why = f": {compiled.why}" if compiled.why else ", for the first time"
    if compiled.given_up:
        return f"{compiled.name} is no longer compiled, and runs operator by operator from now on{why}"
    again = "again " if compiled.why else ""
    return f"{compiled.name} was compiled {again}({compiled.seconds:.1f} s){why}"


def _graphs_and_seconds(counts: dict[str, float]) -> tuple[int, float]:
    return int(counts.get("compile/graphs", 0)), counts.get("compile/seconds", 0.0)
