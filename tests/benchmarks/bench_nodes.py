"""Nodes and node agents that are lost: python tests/benchmarks/bench_nodes.py

A real Ray cluster of loopback nodes: a head without room for ranks, and nodes of one rank each. A run on two of them
loses the process of a node agent (SIGKILL), or a whole node (SIGKILL to all its processes), with a spare there, with
and without buddy copies; and without one: a new agent is started, or after fault.replace_seconds the run goes on alone
and grows when a node is back. Beside it, on the same nodes, Ray Train's own restart of a group of as many empty workers
(peer_restarts.py), until all workers of the next group run. The model is that of tests/tiny.py: what takes long is
processes.

Then, what buddy copies cost: two runs of quickstart's model with a snapshot at each fifth step, one with copies, one
without, take turns of 20 steps; each is held back while the other one trains. Their ranks have one core, the agents and
all else another one, as on a node whose ranks do not compute on all of its cores. Last, heads that die with the driver
of a run: the supervisor starts it again on the next one.

Passes if the next step comes within 6 s of a lost agent or node (median; where the run goes on on fewer: after the time
that was set; where an agent has to be started: 1.15 times as late as Ray Train's own restart at most), growing back
stops the run for no longer than that, copies make a step at most 2 % slower, and from a new head on the next step takes
at most 1.2 times as long as the first one of a run that is submitted to one.
"""

import contextlib
import itertools
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmark import heading, parser, verdict

sys.path.insert(0, str(Path(__file__).parents[1]))
from heads import LOOPBACK, running_head
from ray_cluster import Cluster, ray_cluster
from tiny import build_documents, job_text
from waiting import wait_for as wait_for_seconds

from raynium import Client, Run, find_run
from raynium.chaos.processes import RunProcesses
from raynium.chaos.sessions import kill_started, pids_of_session
from raynium.chaos.steps import Step, Steps
from raynium.config.load import load_config
from raynium.launch.jobs import connect_jobs
from raynium.rank.armed import CHAOS_VARIABLE, LIMIT_NAME, STEPS_NAME
from raynium.rank.ports import free_port

MOST_SECONDS, MOST_COST, MOST_COLD_STARTS = 6.0, 0.02, 1.2
# Where nobody is there to take a lost one's place, of Ray Train's own restart.
MOST_OF_PEER = 1.15
NO_SPARE = "agent killed, no spare"
HOSTS = ["127.0.0.3", "127.0.0.4", "127.0.0.5"]
REPLACE_SECONDS = 5.0
# A run and a group have found their pace, and Ray has seen that they have.
PAUSE_SECONDS = 3.0
TURN_STEPS = 20
PARTS = ("spare", "buddy", "none", "elastic", "peer", "copies", "heads")
# On a busy machine the first step of a run takes minutes.
wait_for = partial(wait_for_seconds, seconds=600)
PEER = Path(__file__).with_name("peer_restarts.py")
CHANGES = {
    "train.steps": 1_000_000,
    "train.global_batch_size": 8,
    "optimizer.schedule": "constant",
    "checkpoint.every_steps": 20,
    "evaluate.every_steps": 1_000_000,
    "cluster.nodes": 2,
    "cluster.ranks_per_node": 1,
    "preflight.before_run": "none",
    "fault.snapshot_every_steps": 5,
    "fault.max_node_failures_without_progress": 1000,
    # A model that learns a small text by heart leaps, and going back would count as a recovery.
    "fault.spike_score": None,
}


class Restart(NamedTuple):
    """From a fault: seconds to the next step, and to the next one that was not there before; steps done once more."""

    step: float
    new_step: float
    again: int


class Watched:
    """A run of a cluster whose rank 0 writes its steps to this folder. Use as a context manager: it is stopped."""

    def __init__(self, cluster: Cluster, folder: Path, name: str, changes: dict[str, Any]):
        (folder / STEPS_NAME).unlink(missing_ok=True)
        self._cluster = cluster
        self.steps = Steps(folder / STEPS_NAME)
        self.run: Run = cluster.client().submit(cluster.job_file, overrides=changes, name=name)

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:
            print(self.run.logs()[-6000:], file=sys.stderr)
            return
        self.run.stop()
        self.run.wait(600)

    def all_are_there(self) -> None:
        """Returns once it trains and each of its seats, spares too, has an agent that could fork a rank at once."""
        wait_for(self.taken, pause_seconds=0.1)
        cluster = self.run.record().config["cluster"]
        seats, before = cluster["nodes"] + cluster["spares"], {}

        def all_are_warm() -> bool:
            nonlocal before
            time.sleep(PAUSE_SECONDS)
            before, now = template_ticks(self._cluster), before
            return len(before) == seats and before == now

        wait_for(all_are_warm)
        self.trains()

    def trains(self) -> None:
        """Returns once it has for a while, and has a checkpoint to begin with."""
        since = time.time()
        wait_for(lambda: any(step.unix > since + PAUSE_SECONDS for step in self.taken()), pause_seconds=0.1)
        wait_for(lambda: self.run.record().committed_step or 0, pause_seconds=0.1)

    def taken(self) -> list[Step]:
        self.steps.look()
        return self.steps.taken

    def agents(self) -> list[dict[str, Any]]:
        """Host and pid, by node rank."""
        return self.run.record().agents or []

    def hosts(self) -> list[str]:
        return [agent["host"] for agent in self.agents()]

    def next_life(self, since: float) -> list[Step]:
        """The steps, up to the first one that was not there before, of the life of rank 0 after that of this time."""
        taken = wait_for(self.taken)
        process = [step for step in taken if step.unix <= since][-1].process

        def look() -> list[Step]:
            old = [step for step in self.taken() if step.process == process]
            new = self.steps.taken[self.steps.taken.index(old[-1]) + 1 :]
            further = [step for step in new if step.step > old[-1].step]
            return new[: new.index(further[0]) + 1] if further else []

        return wait_for(look, pause_seconds=0.02)

    def restart(self, since: float) -> Restart:
        life = self.next_life(since)
        return Restart(life[0].unix - since, life[-1].unix - since, len(life) - 1)


def start_missing(cluster: Cluster, hosts: list[str]) -> None:
    for host in hosts:
        if host not in cluster.nodes:
            cluster.start_node(host)


def template_ticks(cluster: Cluster) -> dict[int, int]:
    """Of each process that an agent's ranks are forked from: what it has computed so far, as importing makes it."""
    ticks = {}
    for node in cluster.nodes.values():
        processes = RunProcesses.of(node.pid).others
        for each in processes.values():
            parent = processes.get(each.parent)
            if "forkserver" in each.command and parent is not None and parent.command.startswith("ray::"):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    fields = Path(f"/proc/{each.pid}/stat").read_text().rpartition(")")[2].split()
                    ticks[each.pid] = int(fields[11]) + int(fields[12])
    return ticks


# ---- faults ----------------------------------------------------------------------------------------------------------


def lose_agents(watched: Watched, times: int) -> list[Restart]:
    restarts = []
    for turn in range(times):
        watched.all_are_there()
        agents = watched.agents()
        killed = time.time()
        os.kill(agents[turn % len(agents)]["pid"], signal.SIGKILL)
        restarts.append(watched.restart(killed))
    return restarts


def lose_nodes(cluster: Cluster, watched: Watched, times: int) -> list[Restart]:
    """A spare is there each time."""
    restarts = []
    for turn in range(times):
        watched.all_are_there()
        hosts = watched.hosts()
        killed = time.time()
        cluster.kill_node(hosts[(turn + 1) % len(hosts)])
        restarts.append(watched.restart(killed))
        if turn + 1 < times:
            start_missing(cluster, HOSTS)
    return restarts


def shrink_and_grow(cluster: Cluster, watched: Watched, times: int) -> tuple[list[Restart], list[Restart]]:
    """Of growing, the fault is the last step before it."""
    shrunk, grown = [], []
    for turn in range(times):
        watched.trains()
        hosts = watched.hosts()
        (free,) = cluster.nodes.keys() - set(hosts)
        cluster.kill_node(free)
        # Ray Train would be given a place there.
        time.sleep(PAUSE_SECONDS)
        killed = time.time()
        cluster.kill_node(hosts[turn % 2])
        restart = watched.restart(killed)
        shrunk.append(Restart(restart.step - REPLACE_SECONDS, restart.new_step - REPLACE_SECONDS, restart.again))
        watched.trains()
        alone = watched.taken()[-1].process
        cluster.start_node(free)
        wait_for(lambda alone=alone: watched.taken()[-1].process != alone, pause_seconds=0.1)
        last = [step.unix for step in watched.taken() if step.process == alone][-1]
        grown.append(watched.restart(last))
        start_missing(cluster, HOSTS)
    return shrunk, grown


# ---- Ray Train's own -------------------------------------------------------------------------------------------------


class Peer:
    """A group of empty workers. Each says in FOLDER/starts that it runs: when, its rank, its pid and its host."""

    def __init__(self, cluster: Cluster, folder: Path):
        self._starts = folder / "starts"
        self._jobs = connect_jobs(cluster.address)
        command = f"{sys.executable} {PEER} empty {folder}"
        self._job = self._jobs.submit_job(entrypoint=command)

    def workers(self, since: float = 0.0) -> list[tuple[float, int, str]]:
        """By rank: since when it runs (Unix time), pid and host; empty until all do that began after `since`."""
        lines = self._starts.read_text().splitlines() if self._starts.exists() else []
        found = {
            int(rank): (float(unix), int(pid), host)
            for unix, rank, pid, host in (line.split() for line in lines)
            if float(unix) > since
        }
        return [found[rank] for rank in range(2)] if len(found) == 2 else []

    def restart(self, kill: Callable[[int, str], None], turn: int) -> float:
        """Seconds until all workers of the next group run. kill: a worker, of this pid and host."""
        workers = wait_for(self.workers, pause_seconds=0.05)
        time.sleep(PAUSE_SECONDS)
        killed = time.time()
        kill(*workers[turn % 2][1:])
        return max(unix for unix, *_ in wait_for(lambda: self.workers(killed), pause_seconds=0.05)) - killed

    def close(self) -> None:
        self._jobs.stop_job(self._job)
        wait_for(lambda: self._jobs.get_job_status(self._job).is_terminal(), pause_seconds=0.2)


def peer_restarts(cluster: Cluster, folder: Path, times: int) -> dict[str, list[float]]:
    folder.mkdir()
    peer = Peer(cluster, folder)
    seconds: dict[str, list[float]] = {"a worker killed": [], "a node killed": []}
    for turn in range(times):
        seconds["a worker killed"].append(peer.restart(lambda pid, _: os.kill(pid, signal.SIGKILL), turn))
    for turn in range(times):
        seconds["a node killed"].append(peer.restart(lambda _, host: cluster.kill_node(host), turn))
        start_missing(cluster, HOSTS)
    peer.close()
    return seconds


# ---- what buddy copies cost ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def held_runs(cluster: Cluster, folder: Path, changes: dict[str, Any]) -> Iterator[dict[bool, Watched]]:
    """Whether with copies → a run on two nodes of its own, held back before its first step."""
    runs: dict[bool, Watched] = {}
    with contextlib.ExitStack() as stack:
        for copies, hosts in ((False, HOSTS[:2]), (True, [HOSTS[2], "127.0.0.6"])):
            chaos = folder / f"copies-{copies}"
            chaos.mkdir()
            cluster.environment[CHAOS_VARIABLE] = str(chaos)
            start_missing(cluster, hosts)
            own = changes | {"fault.buddy_copies": copies}
            runs[copies] = stack.enter_context(Watched(cluster, chaos, f"copies-{copies}".lower(), own))
            let(runs[copies], TURN_STEPS)
            wait_for(lambda copies=copies: len(runs[copies].taken()) >= TURN_STEPS, pause_seconds=0.1)
        keep_ranks_apart(cluster)
        yield runs
        for run in runs.values():
            let(run, 10**9)


def keep_ranks_apart(cluster: Cluster) -> None:
    """Ranks have the first core from now on, all else of the cluster the last: a node has cores beside its ranks'."""
    cores = sorted(os.sched_getaffinity(0))
    for pid in [pid for node in cluster.nodes.values() for pid in pids_of_session(node.pid)]:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            is_rank = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").startswith("rank-")
            for task in os.listdir(f"/proc/{pid}/task"):
                os.sched_setaffinity(int(task), cores[:1] if is_rank else cores[-1:])


def let(watched: Watched, step: int) -> None:
    """It may train until this step."""
    file = watched.steps.file.with_name(LIMIT_NAME)
    file.with_suffix(".new").write_text(str(step))
    file.with_suffix(".new").rename(file)


def turn_seconds(watched: Watched) -> float:
    """Of a step, on average, of those that the run is let take now but of the first, which it was held back from."""
    first = len(watched.taken())
    let(watched, first + TURN_STEPS)
    wait_for(lambda: len(watched.taken()) >= first + TURN_STEPS, pause_seconds=0.1)
    # So that the last copy falls into nobody else's turn.
    time.sleep(1.0)
    times = [step.unix for step in watched.taken()[first:]]
    return (times[-1] - times[0]) / (len(times) - 1)


def copies_cost(cluster: Cluster, folder: Path, turns: int) -> float:
    """Prints a table; by how much of itself a step with copies takes longer."""
    model = load_config("quickstart", {}).model.model_dump(mode="json")
    changes = {f"model.{name}": value for name, value in model.items()}
    changes |= {"data.seq_len": 256, "train.micro_batch_size": 4, "engine.dtype": "float32"}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with held_runs(cluster, folder, changes) as runs:
        for turn in range(turns):
            for copies in (False, True) if turn % 2 else (True, False):
                seconds[copies].append(turn_seconds(runs[copies]))
    print("\n| snapshots each 5 steps | step, mean of a turn, median of turns, ms | min | max |\n|---|---|---|---|")
    for copies, taken in seconds.items():
        figures = (1000 * each for each in (statistics.median(taken), min(taken), max(taken)))
        print(f"| {'with' if copies else 'without'} copies | " + " | ".join(f"{each:.1f}" for each in figures) + " |")
    ratio = statistics.median(on / off for off, on in zip(*seconds.values(), strict=True))
    noise = statistics.median(abs(after / before - 1) for before, after in itertools.pairwise(seconds[False]))
    print(f"\nwith / without, median of {turns} turns: {ratio:.3f} (at most {1 + MOST_COST:.2f})")
    print(f"one turn without copies and the next one differ by {noise:.1%} (median)")
    return ratio - 1


# ---- heads that die --------------------------------------------------------------------------------------------------


def lose_heads(folder: Path, times: int) -> tuple[list[float], list[float]]:
    """Seconds to the first step of a run that is submitted to a head, and to the next step, from a new head being up
    on, of a run whose head and driver were killed. Nobody but a supervisor starts it again.
    """
    chaos = folder / "chaos"
    chaos.mkdir(parents=True)
    build_documents(folder)
    (folder / "job.yaml").write_text(job_text(CHANGES | {"cluster.nodes": 1}, root=folder))
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAYNIUM_HOME": str(folder)}
    environment, dashboard = {CHAOS_VARIABLE: str(chaos)}, free_port(LOOPBACK)
    address = f"http://{LOOPBACK}:{dashboard}"
    command = ["raynium", "supervisor", "--root", str(folder), "--address", address]
    cold, again = [], []
    with (folder / "supervisor.log").open("wb") as log:
        supervisor = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        for turn in range(times):
            (chaos / STEPS_NAME).unlink(missing_ok=True)
            steps = Steps(chaos / STEPS_NAME)

            def newest(steps: Steps = steps) -> float:
                steps.look()
                return steps.taken[-1].unix if steps.taken else 0.0

            with running_head(folder / "ray.log", environment, dashboard=dashboard) as head:
                submitted = time.time()
                run = Client(address).submit(folder / "job.yaml", name=f"head-{turn}")
                wait_for(newest)
                cold.append(steps.taken[0].unix - submitted)
                wait_for(lambda run=run: run.record().committed_step or 0, pause_seconds=0.1)
                kill_started([head.process])
            with running_head(folder / "ray.log", environment, dashboard=dashboard):
                up = time.time()
                wait_for(lambda newest=newest, up=up: newest() > up)
                again.append(next(step.unix for step in steps.taken if step.unix > up) - up)
                # The new head knows nothing of the job that was submitted to the old one.
                again_found = find_run(f"head-{turn}", str(folder))
                again_found.stop()
                again_found.wait(600)
    finally:
        kill_started([supervisor])
    return cold, again


# ---- all of it -------------------------------------------------------------------------------------------------------


def restarts_of(
    cluster: Cluster, chaos: Path, parts: Collection[str], times: int, *, tiny: bool
) -> Iterator[tuple[str, list[Restart]]]:
    hosts, few = (HOSTS[:2], {"cluster.nodes": 1}) if tiny else (HOSTS, {})
    if "spare" in parts:
        start_missing(cluster, hosts)
        with Watched(cluster, chaos, "spare", {"cluster.spares": 1} | few) as watched:
            yield "agent killed, a spare there", lose_agents(watched, times)
            # Starting a node again is what takes long, and tests/test_nodes_ray.py loses some.
            if not tiny:
                yield "node killed, a spare there, no copies", lose_nodes(cluster, watched, times)
    if "buddy" in parts:
        start_missing(cluster, hosts)
        with Watched(cluster, chaos, "buddy", {"cluster.spares": 1, "fault.buddy_copies": True}) as watched:
            yield "node killed, a spare there, buddy copies", lose_nodes(cluster, watched, times)
    if "none" in parts:
        start_missing(cluster, hosts)
        with Watched(cluster, chaos, "none", {}) as watched:
            yield NO_SPARE, lose_agents(watched, times)
    if "elastic" in parts:
        start_missing(cluster, hosts)
        changes = {"cluster.min_nodes": 1, "fault.replace_seconds": REPLACE_SECONDS}
        with Watched(cluster, chaos, "elastic", changes) as watched:
            shrunk, grown = shrink_and_grow(cluster, watched, times)
        yield f"node killed, no spare: from {REPLACE_SECONDS:g} s later on", shrunk
        yield "growing back, from the last step before it", grown


def print_row(
    name: str, seconds: Sequence[float], peer: float | None, new_step: str = "", again: str = ""
) -> float | None:
    """Returns its median by that of the peer."""
    median = statistics.median(seconds)
    figures = " | ".join(f"{each:.2f}" for each in (median, min(seconds), max(seconds)))
    ratio = None if peer is None else median / peer
    shown = "" if ratio is None else f"{ratio:.2f}"
    print(f"| {name} | {len(seconds)} | {figures} | {shown} | {new_step} | {again} |", flush=True)
    return ratio


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--times", type=int, default=4, help="each fault")
    options.add_argument("--turns", type=int, default=12, help="of the runs with and without copies")
    options.add_argument("--heads", type=int, default=2, help="that die")
    options.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="of the whole, which takes half an hour"
    )
    arguments = options.parse_args()
    parts = ["spare"] if arguments.tiny else arguments.parts
    tiny, times = arguments.tiny, 1 if arguments.tiny else arguments.times
    heading()
    print(
        "| fault | times | to the next step, median s | min | max | by Ray Train's | to a new step, s | steps again |"
    )
    print("|---|---|---|---|---|---|---|---|")
    fine, peer = True, None
    with tempfile.TemporaryDirectory(prefix="nodes") as temporary:
        folder, chaos = Path(temporary), Path(temporary, "chaos")
        chaos.mkdir()
        with ray_cluster(folder, CHANGES, head_cpus=0, environment={CHAOS_VARIABLE: str(chaos)}) as cluster:
            if "peer" in parts:
                start_missing(cluster, HOSTS)
                found = peer_restarts(cluster, folder / "peer", times)
                peer = statistics.median(found["a worker killed"])
                for name, seconds in found.items():
                    print_row(f"Ray Train, empty workers, {name}", seconds, peer)
            for name, restarts in restarts_of(cluster, chaos, parts, times, tiny=tiny):
                step, new_step, again = zip(*restarts, strict=True)
                ratio = print_row(
                    name, step, peer, f"{statistics.median(new_step):.2f}", f"{statistics.median(again):g}"
                )
                if name == NO_SPARE:
                    fine &= ratio is None or ratio <= MOST_OF_PEER
                else:
                    fine &= statistics.median(step) <= MOST_SECONDS
            if "copies" in parts:
                for host in list(cluster.nodes):
                    cluster.kill_node(host)
                fine &= copies_cost(cluster, folder, arguments.turns) <= MOST_COST
        if "heads" in parts:
            cold, again = lose_heads(folder / "heads", arguments.heads)
            print("\n| | times | median, s | min | max |\n|---|---|---|---|---|")
            for name, seconds in (
                ("a run is submitted → its first step", cold),
                ("a new head is up → next step", again),
            ):
                figures = statistics.median(seconds), min(seconds), max(seconds)
                print(f"| {name} | {len(seconds)} | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |")
            fine &= statistics.median(again) <= MOST_COLD_STARTS * statistics.median(cold)
    return verdict(fine, tiny)


if __name__ == "__main__":
    sys.exit(main())
