"""Builds a store on a Ray cluster of its own, and does to the tasks what the test asks for.

PLACE SOURCE TOKENIZER CPUS [die | stop]: `die` kills the worker of split 2 in the middle of it, once; `stop` ends the
build after three splits. Every task leaves a line in PLACE.tasks.
"""

import itertools
import os
import signal
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from raynium.data.build import tokenise
from raynium.data.build.store_build import build_from_recipe
from raynium.data.build.work import NumberedSplit, Work
from raynium.data.manifest import Recipe
from raynium.data.tokenizer import Tokenizer

TASKS_VARIABLE, DIES_VARIABLE = "TEST_TASKS", "TEST_DIES"


def recorded(work: Work, numbered: NumberedSplit) -> tokenise.Done:
    """`tokenise_split`, in a worker."""
    with open(os.environ[TASKS_VARIABLE], "a") as file:
        file.write(f"{numbered.number} {os.getpid()} {os.environ['TOKENIZERS_PARALLELISM']}\n")
    marker = Path(os.environ[TASKS_VARIABLE] + ".died")
    if DIES_VARIABLE in os.environ and numbered.number == 2 and not marker.exists():
        marker.touch()
        put_file = tokenise.put_file

        def put_half(*given: Any) -> Any:
            put_file(*given)
            os.kill(os.getpid(), signal.SIGKILL)

        tokenise.put_file = put_half
    return tokenise.tokenise_split(work, numbered)


def main(place: str, source: str, tokenizer: str, cpus: str, then: str = "") -> None:
    os.environ[TASKS_VARIABLE] = f"{place}.tasks"
    if then == "die":
        os.environ[DIES_VARIABLE] = "once"
    from raynium.launch.ray_environment import set_ray_environment

    set_ray_environment(starts_cluster=True)
    from raynium.launch import connect
    from raynium.launch.tasks.ray_tasks import on_ray

    connect.usable_cores = lambda: int(cpus)

    def runner(task: Any, work: Work, items: Sequence[Any]) -> Generator[Any]:
        import _build_on_ray

        results = on_ray(_build_on_ray.recorded if task is tokenise.tokenise_split else task, work, items)
        stops = then == "stop" and task is tokenise.tokenise_split
        yield from itertools.islice(results, 3 if stops else None)
        if stops:
            raise InterruptedError("stopped by the test")

    recipe = Recipe(sources=[source], text_field="text", heldout_fraction=0.2, dedup="exact")
    with connect.connect(None):
        build_from_recipe(
            place, recipe, Tokenizer.load(tokenizer), runner=runner, tell=print, split_bytes=20_000, unit_bytes=4096
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
