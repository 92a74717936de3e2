"""Names that libraries keep to themselves and Raynium uses: one list, with the tests that fail without them.

A name that stands in the list and nowhere in the code, or the other way round, fails here.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "platform/raynium"

# Test that fails without them → names as the code spells them. Why each is used stands where it is used.
USED = {
    "test_ranks.py::test_a_killed_agent_takes_stuck_ranks_along_and_its_main_module_was_imported_once": (
        "forkserver._forkserver._forkserver_alive_fd",
    ),
    "test_ranks.py::test_a_template_that_is_dying_is_replaced": ("forkserver._forkserver._forkserver_pid",),
    "test_agent.py::test_a_stopped_rank_is_named_its_stacks_are_kept_and_the_run_goes_on_from_memory": (
        "c10d._dump_fr_trace_json",
        "torch._C._distributed_c10d",
    ),
    "test_audit.py::test_an_audit_of_healthy_ranks_finds_nothing_and_changes_no_bit": (
        "torch.distributed.fsdp._fully_shard._fsdp_collectives.DefaultAllGather",
        "torch.distributed.fsdp._fully_shard._fsdp_collectives.DefaultReduceScatter",
    ),
    "test_agent.py::test_a_killed_rank_costs_one_generation_and_changes_no_bit": (
        "torch.testing._internal.distributed.fake_pg.FakeStore",
    ),
    "test_rank_template.py::test_a_rank_that_is_started_again_imports_nothing": ("torch._inductor.config",),
    "test_simple_fsdp.py::test_two_data_ranks_train_to_the_bits_of_fsdp2": (
        "module._parameters",
        "torch.distributed.tensor.placement_types._StridedShard",
    ),
    "test_ray.py::test_a_job_that_waits_says_what_is_free_and_who_holds_the_rest": (
        "ray._private.state.available_resources_per_node",
        "ray._private.state.state",
        "ray.experimental.internal_kv._internal_kv_get",
        "ray.experimental.internal_kv._internal_kv_put",
        "state._connect_and_get_accessor",
    ),
    "test_end_of_driver.py::test_a_driver_whose_ray_train_still_waits_ends_as_it_should": (
        "ray._private.worker.global_worker",
    ),
    "test_ray_environment.py::test_what_ray_prints_of_its_processes_is_logged_and_not_shown": (
        "ray._private",
        "ray._private.worker",
    ),
    "test_store.py::test_what_is_written_is_read_listed_and_deleted": ("self._fs._call_s3",),
    "test_native_engine.py::test_every_layout_trains_as_a_plain_float64_loop_does": (
        "torch._dynamo",
        "torch._foreach_mul_",
        "torch.distributed.distributed_c10d._set_pg_timeout",
    ),
    "test_compile_watch.py::test_a_second_shape_is_explained_and_equal_shapes_compile_nothing": (
        "torch._dynamo.backends.registry.lookup_backend",
        "torch._dynamo.callback.CallbackArgs",
        "torch._dynamo.callback.callback_handler",
        "torch._dynamo.utils.CompilationMetrics",
        "torch._dynamo.utils.get_compilation_metrics",
        "torch._dynamo.utils.set_compilation_metrics_limit",
        "torch._guards.CompileContext",
    ),
    "test_simple_fsdp.py::test_a_checkpointed_block_keeps_its_input_and_its_attention": ("torch._functorch.config",),
    "test_native_engine.py::test_activation_checkpointing_changes_no_bit": (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.checkpoint_wrapper",
    ),
    "test_native_engine.py::test_each_element_is_saved_once_under_names_that_do_not_know_the_layout": (
        "torch.distributed.tensor._utils.compute_local_shape_and_global_offset",
    ),
    "test_simple_fsdp.py::test_one_graph_of_a_block_holds_its_collectives_and_keeps_no_whole_parameter": (
        "torch.ops._c10d_functional",
    ),
    "test_nodes_ray.py::test_a_lost_node_without_a_spare_is_waited_for_and_its_agent_alone_is_replaced": (
        "ray.train.v2._internal.execution.worker_group.execution_group.ReplicaGroup",
    ),
    "test_backend.py::test_two_agents_on_one_node_are_refused_and_leave_no_workers_behind": (
        "worker_group._clear_state",
    ),
}

# Public, whatever their names look like.
PUBLIC = {"os._exit", *("_replace", "_fields", "_asdict")}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_used(tree: ast.Module) -> Iterator[str]:
    """Dotted names with a private part: those imported, and attributes of anything but self and cls."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_private(node.attr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if any(map(is_private, each.name.split("."))))
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("raynium"):
            names = [f"{node.module}.{each.name}" for each in node.names]
            yield from (name for name in names if any(map(is_private, name.split("."))))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and id(node) not in inner:
            yield ast.unparse(node)


def own_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def test_every_private_name_of_a_library_that_is_used_stands_in_the_list_and_no_other() -> None:
    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")]
    ours = PUBLIC.union(*(filter(is_private, own_names(tree)) for tree in trees))
    used = {name for tree in trees for name in names_used(tree)}
    used = {name for name in used - PUBLIC if name.rpartition(".")[2] not in ours}
    assert used == {name for names in USED.values() for name in names}


@pytest.mark.parametrize("test", USED)
def test_the_test_that_watches_it_exists(test: str) -> None:
    file, _, name = test.partition("::")
    tree = ast.parse((TESTS / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
