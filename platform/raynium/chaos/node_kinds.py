"""Faults of a cluster of several nodes, played on this machine: nodes that come and go, and a head that dies."""

import os
import signal
import time
from dataclasses import dataclass
from random import Random

from raynium.chaos.loopback import GIVEN_UP_SECONDS, LoopbackCluster
from raynium.chaos.processes import RunProcesses
from raynium.chaos.scene import LASTS_SECONDS, Kind, NotThere, Scene, Struck

# Between a notice that a node will be taken and that.
NOTICE_SECONDS = 60.0


def _a_node(scene: Scene, dice: Random, *, trains: bool = True) -> tuple[LoopbackCluster, str]:
    """A cluster and a host of it that has ranks, or has none."""
    assert scene.cluster is not None
    busy = {rank.session for rank in scene.processes.ranks()}
    found = [host for host, node in scene.cluster.nodes.items() if (node.pid in busy) is trains]
    # Between two generations all nodes are without.
    if not found or not busy:
        raise NotThere(f"the run has no node {'with' if trains else 'without'} ranks now")
    return scene.cluster, dice.choice(found)


@dataclass(frozen=True)
class _LoseNode:
    """All its processes and what was in its memory. After a while there is another at its address."""

    name: str
    needs: str
    what: str
    trains: bool

    def strike(self, scene: Scene, dice: Random) -> Struck:
        cluster, host = _a_node(scene, dice, trains=self.trains)
        seconds = dice.uniform(*LASTS_SECONDS)
        cluster.kill_node(host)
        words = f"{self.what} {host} is lost, and another started {seconds:.1f} s later"
        return Struck(words, seconds, cluster.start_missing, ends_ranks=self.trains)


class SlowNode:
    name, needs = "slow-node", "nodes"

    def strike(self, scene: Scene, dice: Random) -> Struck:
        cluster, host = _a_node(scene, dice)
        seconds = dice.uniform(*LASTS_SECONDS)
        cluster.signal_node(host, signal.SIGSTOP)

        def goes_on() -> None:
            cluster.signal_node(host, signal.SIGCONT)

        return Struck(f"all of node {host} stands still for {seconds:.1f} s", seconds, goes_on)


class CutNode:
    """As one that is cut off: it says nothing until Ray has given it up, and then goes on as if nothing had been."""

    name, needs = "cut-node", "nodes"

    def strike(self, scene: Scene, dice: Random) -> Struck:
        cluster, host = _a_node(scene, dice)
        cluster.signal_node(host, signal.SIGSTOP)

        def comes_back() -> None:
            cluster.signal_node(host, signal.SIGCONT)
            time.sleep(dice.uniform(*LASTS_SECONDS))
            cluster.kill_node(host)
            cluster.start_missing()

        words = f"node {host} is cut off for {GIVEN_UP_SECONDS:g} s, comes back, and is started anew"
        return Struck(words, GIVEN_UP_SECONDS, comes_back, ends_ranks=True)


class DrainNode:
    """The notice that it will be taken away, and it is, once the run has left it or the time is over."""

    name, needs = "drain-node", "nodes"

    def strike(self, scene: Scene, dice: Random) -> Struck:
        cluster, host = _a_node(scene, dice)
        leader, driver = cluster.nodes[host].pid, scene.processes.driver
        cluster.drain_node(host, seconds=int(NOTICE_SECONDS))

        def is_left() -> bool:
            return all(rank.session != leader for rank in RunProcesses.of(driver, cluster.leaders()).ranks())

        def is_taken() -> None:
            cluster.kill_node(host)
            cluster.start_missing()

        return Struck(
            f"Ray drains node {host}, which is taken in {NOTICE_SECONDS:g} s", NOTICE_SECONDS, is_taken, is_left, True
        )


class LoseHead:
    """The driver with it. Ranks go on for a while, and nobody hears them; then the nodes are gone too."""

    name, needs = "lose-head", "nodes"

    def strike(self, scene: Scene, dice: Random) -> Struck:
        assert scene.cluster is not None
        os.kill(scene.processes.driver, signal.SIGKILL)
        scene.cluster.kill_head()
        time.sleep(dice.uniform(*LASTS_SECONDS))
        scene.cluster.kill()
        scene.cluster.start()
        return Struck(
            "head and driver are killed, then the nodes; all are started again", ends_ranks=True, ends_driver=True
        )


NODE_KINDS: tuple[Kind, ...] = (
    _LoseNode("lose-node", "nodes", "node", trains=True),
    _LoseNode("lose-spare", "spares", "spare", trains=False),
    *(SlowNode(), CutNode(), DrainNode(), LoseHead()),
)
