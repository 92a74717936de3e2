"""What a compiled block keeps from its forward pass for its backward pass, where torch's own choice is not ours.

torch traces both passes into one graph and cuts it in two; nodes may be marked as kept or as made again. It hands the
graph to `joint_custom_pass` before the cut. That hook is not public, but any backend that is built on AOT autograd
calls it, and SimpleFSDP in torchtitan is built on it too.
"""

import logging
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch._dynamo.backends.registry import lookup_backend
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from raynium.engines.torch_compiles import Backend

logger = logging.getLogger(__name__)


def with_recompute_marks(backend: Backend | str, *, data_group: str | None, keep_gathered: bool) -> Backend:
    """torch.compile's backend, with marks on what its graphs keep.

    data_group: name of the process group whose all-gathers make whole parameters (SimpleFSDP's); None: there are none.
    keep_gathered: keep whole parameters from forward to backward, rather than gather them again.
    """
    told = False

    def marked(graph: GraphModule, inputs: list[Any], **options: Any) -> Any:
        nonlocal told
        compile_graph = lookup_backend(backend) if isinstance(backend, str) else backend
        saw_joint_graph = False

        def mark(joint: GraphModule, _: Any) -> GraphModule:
            nonlocal saw_joint_graph
            saw_joint_graph = True
            if data_group is not None:
                _mark_gathers(joint, data_group, keep_gathered)
            _keep_attention(joint)
            return joint

        # Not through torch's cache of cut graphs: its key leaves out the marks.
        with functorch_config.patch(joint_custom_pass=mark, enable_autograd_cache=False):
            compiled = compile_graph(graph, inputs, **options)
        trains = torch.is_grad_enabled() and any(
            isinstance(each, torch.Tensor) and each.requires_grad for each in inputs
        )
        if trains and not saw_joint_graph and not told:
            told = True
            logger.warning(
                "the compile backend showed no joint graph (it is not built on AOT autograd): blocks may keep whole "
                "parameters from forward to backward. If memory is short, set engine.fsdp to fsdp2"
            )
        return compiled

    return marked


def _mark_gathers(joint: GraphModule, data_group: str, keep_gathered: bool) -> None:
    """Marks what is made of one parameter alone: from its shard, through the gather, to the views that layers read."""
    functional = torch.ops._c10d_functional
    made: set[Node] = set()
    for node in joint.graph.nodes:
        if node.target is functional.all_gather_into_tensor.default and node.args[2] == data_group:
            made |= _cast_and_padding(node)
        elif node.op == "call_function" and node.all_input_nodes and made.issuperset(node.all_input_nodes):
            made.add(node)
    for node in made:
        if not keep_gathered:
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        elif node.target is functional.wait_tensor.default:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _cast_and_padding(gather: Node) -> set[Node]:
    """The gather and all before it, up to the graph's inputs."""
    found, ahead = set[Node](), [gather]
    while ahead:
        node = ahead.pop()
        if node.op == "call_function" and node not in found:
            found.add(node)
            ahead += node.all_input_nodes
    return found


def _keep_attention(joint: GraphModule) -> None:
    """Results of attention are kept, also where activation checkpointing makes all else again.

    torch counts it among the random operations (it may drop out; ours does not), and where random operations are made
    again it hands their state from forward to backward. In graphs with DTensors that goes wrong (torch 2.13:
    functionalize_rng_ops puts the state behind the DeviceMesh, and the graph fails with "expected all
    tensors_saved_with_vc_check to be Tensors") on all devices but CUDA.
    """
    for node in joint.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags and node.meta.pop("recompute", None) is not None:
            for result in node.users:
                result.meta["recompute"] = CheckpointPolicy.MUST_SAVE
