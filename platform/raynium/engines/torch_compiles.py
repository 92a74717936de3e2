"""What torch.compile compiled in this process, how long it took, and how a graph's inputs differ from those seen.

Two sources, both torch's own: every compilation leaves an entry in `get_compilation_metrics`, and our backend stands in
front of the real one to see each graph's inputs. torch also names the guard that failed, but only the first one, of
the newest graph of the function; where several graphs exist (training, evaluation) that is often the wrong one.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.callback import CallbackArgs, callback_handler
from torch._dynamo.utils import CompilationMetrics, get_compilation_metrics, set_compilation_metrics_limit
from torch._guards import CompileContext

# Entries that torch keeps, in place of 64: one step of a large model may compile more.
COMPILES_KEPT = 1000
# A sentence names so many of the inputs that differ.
INPUTS_SHOWN = 3

Backend = Callable[..., Callable[..., Any]]


@dataclass(frozen=True)
class GraphInput:
    """One input of a graph, as far as a compiled graph depends on it.

    kind: everything else, in words: "float32 [4, 256]". wants_gradient: which `kind` says too.
    """

    name: str
    kind: str
    wants_gradient: bool = False


@dataclass(frozen=True)
class Compiled:
    """One graph that was compiled, or that torch gave up compiling.

    name: "forward (decoder.py:82)", or "backward of …". why: how it differs from the graphs of this function before; ""
    for the first. given_up: torch compiles this function no more: from now on it runs operator by operator.
    """

    name: str
    seconds: float
    why: str
    given_up: bool = False


class TorchCompiles:
    """Follows torch.compile in this process. One per process, made before anything is compiled."""

    def __init__(self) -> None:
        set_compilation_metrics_limit(COMPILES_KEPT)
        self._last = (get_compilation_metrics() or [None])[-1]
        # The inputs of each graph, by compile id.
        self._inputs: dict[str, tuple[GraphInput, ...]] = {}
        # By the id of a function: the inputs of each of its graphs, and its name.
        self._seen: dict[str, list[tuple[GraphInput, ...]]] = {}
        self._names: dict[str, str] = {}
        # By compile id: why the forward was compiled, which its backward shares.
        self._whys: dict[str, str] = {}
        self._started: list[Callable[[CallbackArgs], None]] = []
        self._ended: list[Callable[[CallbackArgs], None]] = []

    def watch(self, *, started: Callable[[], None], ended: Callable[[], None]) -> None:
        """Has these called when a compilation begins and ends, on the thread that compiles, until `close`."""
        self._started.append(callback_handler.register_start_callback(lambda _: started()))
        self._ended.append(callback_handler.register_end_callback(lambda _: ended()))

    def close(self) -> None:
        for listener in self._started:
            callback_handler.remove_start_callback(listener)
        for listener in self._ended:
            callback_handler.remove_end_callback(listener)
        self._started.clear()
        self._ended.clear()

    def backend(self, name: str) -> Backend:
        """torch.compile's backend of that name, watched.

        It is looked up when there is a graph to compile: inductor's takes a second to import, and most runs on CPUs
        compile nothing.
        """

        def watched(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
            names = [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]
            self._inputs[str(CompileContext.current_compile_id())] = graph_inputs(names, inputs)
            return lookup_backend(name)(graph, inputs, **options)

        return watched

    def new(self) -> list[Compiled]:
        """What was compiled since the last call."""
        entries: list[CompilationMetrics] = []
        for entry in reversed(get_compilation_metrics()):
            if entry is self._last:
                break
            entries.insert(0, entry)
        if entries:
            self._last = entries[-1]
        return [compiled for entry in entries if (compiled := self._compiled(entry)) is not None]

    def _compiled(self, entry: CompilationMetrics) -> Compiled | None:
        compile_id = str(entry.compile_id)
        function = compile_id.partition("/")[0]
        seconds = (entry.duration_us or 0) / 1e6
        if entry.fail_type is not None:
            # A graph break, or an error that ends the rank: torch tells of both.
            if function not in self._names:
                return None
            why = guard_reason(entry.recompile_reason or "")
            return Compiled(self._names[function], seconds, why, given_up=True)
        if entry.is_forward and entry.backend_compile_time_s is not None:
            self._names[function] = f"{entry.co_name} ({Path(entry.co_filename or '').name}:{entry.co_firstlineno})"
            why = self._whys[compile_id] = self._explain(compile_id, function, entry.recompile_reason)
            return Compiled(self._names[function], seconds, why)
        if entry.is_forward is False and not entry.is_runtime:
            return Compiled(
                f"backward of {self._names.get(function, 'a function')}", seconds, self._whys.get(compile_id, "")
            )
        # A frame without a graph, or tuning while it runs.
        return None

    def _explain(self, compile_id: str, function: str, reason: str | None) -> str:
        seen = self._seen.setdefault(function, [])
        inputs = self._inputs.pop(compile_id, None)
        differs = ""
        if inputs is not None:
            differs = difference(inputs, seen)
            seen.append(inputs)
        return differs or (f"its inputs are like those seen, but {guard_reason(reason)}" if reason else "")


def graph_inputs(names: Iterable[str], inputs: Sequence[Any]) -> tuple[GraphInput, ...]:
    """names: of the graph's placeholders, in the order of `inputs`: tensors, and rarely numbers."""
    return tuple(graph_input(_plain(name), value) for name, value in zip(names, inputs, strict=True))


def graph_input(name: str, value: Any) -> GraphInput:
    if not isinstance(value, torch.Tensor):
        return GraphInput(name, repr(value))
    words = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if not value.is_contiguous():
        words += f" with strides {list(value.stride())}"
    # Only a DTensor has placements.
    if (placements := getattr(value, "placements", None)) is not None:
        words += f" placed {placements}"
    if value.requires_grad:
        words += " that wants a gradient"
    return GraphInput(name, words, value.requires_grad)


def difference(inputs: Sequence[GraphInput], seen: Iterable[Sequence[GraphInput]]) -> str:
    """How a graph's inputs differ from the nearest of those seen; "" if they do not, or none were seen.

    The nearest is first of all of the same kind: an evaluation is not compared with training if there was another one.
    """
    nearest: list[str] = []
    least = None
    for before in seen:
        known = {each.name: each for each in before}
        changed = [each for each in inputs if known.get(each.name) != each]
        other_kind = sum(
            each.name in known and known[each.name].wants_gradient != each.wants_gradient for each in changed
        )
        if least is None or (other_kind, len(changed)) < least:
            least = other_kind, len(changed)
            nearest = [
                f"{each.name} is {each.kind}, seen {known[each.name].kind}"
                if each.name in known
                else f"{each.name} is new"
                for each in changed
            ]
    if not nearest:
        return ""
    more = f"; and {len(nearest) - INPUTS_SHOWN} more inputs" if len(nearest) > INPUTS_SHOWN else ""
    return "; ".join(nearest[:INPUTS_SHOWN]) + more


def guard_reason(reason: str) -> str:
    """torch's own words for the first guard that failed, of the newest graph, on one line and without its number."""
    words = " ".join(reason.partition("\nUser stack trace")[0].split())
    return re.sub(r"^\S+/\S+: ", "", words)


def _plain(name: str) -> str:
    """ "hidden_BTD" of torch's "L_hidden_BTD_"; "up.weight" of "L_self_modules_up_parameters_weight_"."""
    name = name.removeprefix("L_").removesuffix("_").removeprefix("self_modules_")
    return name.replace("_modules_", ".").replace("_parameters_", ".")
