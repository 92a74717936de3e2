"""What a generation change costs the coordinator of a large run: python tests/benchmarks/bench_coordinator.py

Fake agents of nodes with 64 ranks each join, watch their generation, lose one rank, say how theirs ended, and join
again with their snapshots: the coordinator itself, on its own loop, without Ray's calls between. Seconds are of its
thread's processor time. "First": from the first agent that joins until all have their order; "change": from the word
that a rank has died until all have the next order; "seen": one round of every rank's position. Twice the agents should
cost twice as much: passes if the largest number changes its generation within 1 s, and no step takes more than thrice
what half the agents take.
"""

import asyncio
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import benchmark

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import job_text

from raynium.config.load import parse_config
from raynium.config.world import World
from raynium.health.faults import Fault
from raynium.run.coordinator import RunCoordinator
from raynium.run.held_images import HeldImages
from raynium.run.positions import RankPosition
from raynium.run.protocol import AgentInfo, NodeEnded, Order, RankExit, RanksSeen

Result = TypeVar("Result")
RANKS = 64
# Of the loop, between two calls: enough for all that one wakes.
TURNS = 8
MISSED = RankExit(0, 1, "connection closed", retry=True, fault=Fault("peer", "gone", "restart", "peer"))
DIED = RankExit(0, -9, "killed by SIGKILL", retry=True)


async def measure(nodes: int, folder: Path) -> dict[str, float]:
    changes = {"cluster.nodes": nodes, "cluster.ranks_per_node": RANKS, "train.global_batch_size": nodes * RANKS}
    config = parse_config(job_text(changes, root=folder))
    world = World.of(config)
    run = RunCoordinator(config.model_dump(mode="json"), str(folder / f"run-{nodes}"), 0, 1)
    agents = [AgentInfo("a", seat, nodes, f"10.0.{seat // 256}.{seat % 256}", 29500, 1) for seat in range(nodes)]
    found, began = {}, time.thread_time()

    def took(name: str) -> None:
        nonlocal began
        found[name], began = time.thread_time() - began, time.thread_time()

    async def each_in_turn(calls: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
        """One after the other, as they come over the network: who waits may look after each."""
        tasks = []
        for call in calls:
            tasks.append(asyncio.create_task(call))
            for _ in range(TURNS):
                await asyncio.sleep(0)
        return await asyncio.gather(*tasks)

    async def joined(asking: list[AgentInfo]) -> list[Order]:
        orders = await each_in_turn(map(run.join, asking))
        return [order for order in orders if isinstance(order, Order)]

    orders = await joined(agents)
    assert len(orders) == nodes
    took("first")
    watching = [asyncio.create_task(run.watch(*pair, stop_known=False)) for pair in zip(agents, orders, strict=True)]
    await asyncio.sleep(0)
    for node in range(nodes):
        places = {rank: RankPosition(7) for rank in world.ranks_of(node)}
        await run.tell(RanksSeen(1, places))
    took("seen")
    held = [HeldImages(orders[0].generation_id, 5, tuple(world.ranks_of(node)), world) for node in range(nodes)]
    # All miss a peer; the node where it died is the last to say so.
    missed = [NodeEnded(tuple(replace(MISSED, rank=rank) for rank in world.ranks_of(node))) for node in range(nodes)]
    ends = [*missed[1:], NodeEnded((DIED,))]
    told = [run.exited(*each) for each in zip([*agents[1:], agents[0]], [*orders[1:], orders[0]], ends, strict=True)]
    await each_in_turn(told)
    assert {verdict.kind for verdict in await asyncio.gather(*watching)} == {"over"}
    again = [replace(agent, last_generation=1, images=(mine,)) for agent, mine in zip(agents, held, strict=True)]
    orders = await joined(again)
    assert len(orders) == nodes and orders[0].resume_step == 5
    took("change")
    return found


def main() -> int:
    parser = benchmark.parser(__doc__)
    parser.add_argument("--agents", type=int, default=1024, help="of the largest run")
    arguments = parser.parse_args()
    largest = 8 if arguments.tiny else arguments.agents
    benchmark.heading()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for nodes in (largest // 4, largest // 2, largest):
            found[nodes] = asyncio.run(measure(nodes, Path(folder)))
    print("| agents | ranks | " + " | ".join(f"{name}, s" for name in found[largest]) + " |")
    print("|---|---|" + "---|" * len(found[largest]))
    for nodes, seconds in found.items():
        print(f"| {nodes} | {nodes * RANKS} | " + " | ".join(f"{each:.3f}" for each in seconds.values()) + " |")
    grows = {name: found[largest][name] / max(found[largest // 2][name], 1e-9) for name in found[largest]}
    print("\ntwice the agents cost: " + ", ".join(f"{name} {times:.1f} ×" for name, times in grows.items()))
    return benchmark.verdict(found[largest]["change"] <= 1.0 and max(grows.values()) <= 3.0, arguments.tiny)


if __name__ == "__main__":
    raise SystemExit(main())
