"""A small fake of neuronx-distributed's NxDPPModel, part of `_nxd_fake.py`: stages over gloo, all forwards first.

As the library it traces the model with torch.fx, cuts it behind the given modules and gives memory to this rank's
stage only, so the tests see whether the decoder can be traced and that only hidden states travel between stages.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module


class _Tracer(fx.Tracer):
    def __init__(self, leaves: list[str]):
        super().__init__()
        self._leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return any(leaf in type(m).__name__ for leaf in self._leaves) or super().is_leaf_module(
            m, module_qualified_name
        )


class NxDPPModel(nn.Module):
    def __init__(
        self,
        module: nn.Module,
        transformer_layer_cls: Any = None,
        num_microbatches: int = 1,
        virtual_pipeline_size: int = 1,
        output_loss_value_spec: Any = None,
        return_mb_loss: bool = False,
        broadcast_and_average_loss: bool = False,
        use_zero1_optimizer: bool = False,
        use_model_wrapper: bool = False,
        use_optimizer_wrapper: bool = False,
        pipeline_cuts: Any = None,
        input_names: Any = None,
        leaf_module_cls: Any = None,
    ):
        super().__init__()
        from _nxd_fake import PARALLEL_MODULES, pipeline_ranks

        assert virtual_pipeline_size == 1 and output_loss_value_spec is True and return_mb_loss
        assert use_model_wrapper and use_optimizer_wrapper, "the optimizer reduces gradients over data ranks"
        self.original_torch_module = module
        self._num_micro_batches = num_microbatches
        self.shape_traced = False
        self._ranks = pipeline_ranks()
        self._stage = self._ranks.index(dist.get_rank())
        leaves = [*leaf_module_cls, *(kind.__name__ for kind in (transformer_layer_cls, *PARALLEL_MODULES))]
        local = _stages(module, input_names, leaves=leaves, cuts=pipeline_cuts)[self._stage]
        self.local_stage_modules = [local]
        placeholders = [node.name for node in local.graph.nodes if node.op == "placeholder"]
        assert input_names[:2] == ["tokens", "labels"]
        self._inputs = [name if name in input_names else None for name in placeholders]
        assert self._inputs.count(None) == (self._stage > 0), "a stage is sent the hidden states and nothing else"
        self._names = {name.replace(".", "_"): name for name, _ in module.named_modules()}
        # One parameter on the first and the last stage: both hold it, and the last one's does not count in the norm.
        tied = module.head.weight is module.embedding.weight  # pyright: ignore[reportAttributeAccessIssue]
        ends = [self._ranks[0], self._ranks[-1]]
        self._tied_group = dist.new_group(ends, use_local_synchronization=True) if self._is_end() and tied else None
        for parameter in local.parameters():
            vars(parameter)["shared"] = False
        if self._tied_group is not None and self.is_last_stage():
            vars(local.get_parameter("head.weight"))["shared"] = True

    def _is_end(self) -> bool:
        return self._stage == 0 or self.is_last_stage()

    def is_last_stage(self) -> bool:
        return self._stage == len(self._ranks) - 1

    def local_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.local_stage_modules[0].named_parameters():
            child, _, rest = name.partition(".")
            yield f"{self._names[child]}.{rest}", parameter

    def run_train(self, **inputs: Tensor) -> list[Tensor] | None:
        self._trace_shapes(inputs)
        passes = [self._forward(micro_batch) for micro_batch in self._micro_batches(inputs)]
        for received, sent in passes:
            if self.is_last_stage():
                (sent / self._num_micro_batches).backward()
            else:
                gradient = torch.empty_like(sent)
                dist.recv(gradient, self._ranks[self._stage + 1])
                sent.backward(gradient)
            if received is not None:
                assert received.grad is not None
                dist.send(received.grad, self._ranks[self._stage - 1])
        if self._tied_group is not None:
            module = self.local_stage_modules[0].get_submodule("head" if self._stage else "embedding")
            dist.all_reduce(module.weight.grad, group=self._tied_group)
        return [loss.detach() for _, loss in passes] if self.is_last_stage() else None

    def run_eval(self, **inputs: Tensor) -> list[Tensor] | None:
        self._trace_shapes(inputs)
        with torch.no_grad():
            losses = [self._forward(micro_batch)[1] for micro_batch in self._micro_batches(inputs)]
        return losses if self.is_last_stage() else None

    def _trace_shapes(self, inputs: dict[str, Tensor]) -> None:
        """As the library: the first call of all runs one micro-batch forward, and throws away what comes out."""
        if not self.shape_traced:
            self._forward(self._micro_batches(inputs)[0])
            self.shape_traced = True

    def _micro_batches(self, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        assert all(value.device.type == "cpu" for value in inputs.values())
        parts = {name: value.chunk(self._num_micro_batches) for name, value in inputs.items()}
        return [{name: parts[name][i] for name in parts} for i in range(self._num_micro_batches)]

    def _forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor | None, Tensor]:
        """(hidden states from the stage before, hidden states for the next one or the loss)."""
        received = self._receive() if self._stage else None
        output = self.local_stage_modules[0](*(inputs[name] if name else received for name in self._inputs))
        if not self.is_last_stage():
            dist.send(torch.tensor(output.shape), self._ranks[self._stage + 1])
            dist.send(output.detach().contiguous(), self._ranks[self._stage + 1])
        return received, output

    def _receive(self) -> Tensor:
        shape = torch.zeros(3, dtype=torch.int64)
        dist.recv(shape, self._ranks[self._stage - 1])
        hidden = torch.empty(shape.tolist())
        dist.recv(hidden, self._ranks[self._stage - 1])
        return hidden.requires_grad_()


def _stages(module: nn.Module, input_names: list[str], *, leaves: list[str], cuts: list[str]) -> list[fx.GraphModule]:
    parameters = inspect.signature(module.forward).parameters.values()
    left_out = {each.name: each.default for each in parameters if each.name not in input_names}
    traced = fx.GraphModule(module, _Tracer(leaves).trace(module, concrete_args=left_out))
    traced.graph.eliminate_dead_code()
    stage = 0
    stage_of_node: dict[fx.Node, int] = {}
    for node in traced.graph.nodes:
        stage_of_node[node] = stage
        stage += node.target in cuts
    assert stage == len(cuts), f"not every cut of {cuts} is in the graph"
    split = split_module(traced, None, stage_of_node.__getitem__, keep_original_order=True)  # pyright: ignore
    return list(split.children())  # pyright: ignore[reportReturnType]
