"""Packs a store's rows on a Ray cluster of its own, in small parts: PLACE HOME CPUS [stop]

`stop` ends it after three parts. Every task leaves a line in the file that TEST_TASKS names.
"""

import itertools
import os
import sys
from collections.abc import Generator, Sequence
from typing import Any

from raynium.config.schema import DataSection
from raynium.data.packed_index import PackWork, ensure_index, pack_to
from raynium.data.packing import packer
from raynium.data.packing.index import PartFacts
from raynium.data.rows import packable
from raynium.data.streamed import open_streamed
from raynium.storage.range_cache import RangeCache

SEQ_LEN = 16


def small_parts() -> None:
    packer.window_tokens = lambda seq_len: 1024
    packer.PART_TOKENS = 2048


def recorded(work: PackWork, number: int) -> tuple[int, PartFacts]:
    """`pack_to`, in a worker."""
    small_parts()
    with open(os.environ["TEST_TASKS"], "a", encoding="utf-8") as file:
        file.write(f"{number} {os.getpid()}\n")
    return pack_to(work, number)


def main(place: str, home: str, cpus: str, then: str = "") -> None:
    from raynium.launch.ray_environment import set_ray_environment

    set_ray_environment(starts_cluster=True)
    from raynium.launch import connect
    from raynium.launch.tasks.ray_tasks import on_ray

    connect.usable_cores = lambda: int(cpus)
    small_parts()

    def runner(task: Any, shared: Any, items: Sequence[Any]) -> Generator[Any]:
        import _pack_on_ray

        assert task is pack_to
        yield from itertools.islice(on_ray(_pack_on_ray.recorded, shared, items), 3 if then else None)
        if then:
            raise InterruptedError("stopped by the test")

    store = open_streamed(place, RangeCache(os.environ["TMPDIR"] + "/cache", max_bytes=2**26))
    data = DataSection(path=place, seq_len=SEQ_LEN, packing="documents")
    with connect.connect(None):
        ensure_index(packable(store)._replace(homes=[home]), data, runner=runner, tell=print)


if __name__ == "__main__":
    main(*sys.argv[1:])
