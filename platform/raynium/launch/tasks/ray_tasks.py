"""Runs tasks on data on a Ray cluster: one CPU each, as many at once as the cluster has."""

import os
from collections.abc import Callable, Generator, Sequence
from itertools import islice
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from raynium.errors import LaunchError, RayniumError

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")

# Of a task whose process or node dies. What it had written is written again.
RETRIES = 4
# Tasks given to Ray for each CPU, so that none of them waits for the driver.
TASKS_PER_CPU = 2


def on_ray(task: Callable[[Shared, Item], Result], shared: Shared, items: Sequence[Item]) -> Generator[Result]:
    """A `Runner` (see `data/runner.py`). Raises LaunchError where a task's process dies again and again."""
    # A build's tokenizer is in it, which may have 35 MB: once for each node.
    reference = ray.put(shared)
    remote = ray.remote(num_cpus=1, max_retries=RETRIES)(_on_one_cpu)
    waiting, running = iter(items), set[Any]()
    try:
        while True:
            # Nodes may come and go meanwhile: more may be running than may be now.
            limit = TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
            more = islice(waiting, max(0, limit - len(running)))
            running.update(remote.remote(task, reference, item) for item in more)
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1)
            running.difference_update(done)
            for each in done:
                yield _result(each)
    finally:
        # Once the driver has left the cluster its tasks are gone, and to cancel one would start another cluster.
        for each in running if ray.is_initialized() else ():
            ray.cancel(each, force=True)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        # Ray's error is one of the task's own kind too, with a traceback in its text.
        if isinstance(error.cause, RayniumError):
            raise error.cause from None
        raise
    except RayError as error:
        raise LaunchError(
            f"a task on the data was lost {RETRIES + 1} times: {' '.join(str(error).split())[:600]}. See whether its "
            "nodes run out of memory (a task takes up to 1 GB); then start again: it goes on"
        ) from error


def _on_one_cpu(task: Callable[[Shared, Item], Result], shared: Shared, item: Item) -> Result:
    # Read by the `tokenizers` library at each call: Ray has given this task one CPU.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return task(shared, item)
