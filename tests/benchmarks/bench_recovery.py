"""From a killed, or a stopped, rank to the next finished step: python tests/benchmarks/bench_recovery.py

Ranks are killed (SIGKILL) at random moments of a run, seeded, and the time is taken until a new rank 0 has finished a
step. Quickstart's model on two CPU ranks. Ours is `raynium train` with its own Ray cluster, and says itself where the
time goes; "notice" is what it does not say: from the kill until the agent sees it. Beside it, on the same model with
DistributedDataParallel and a checkpoint every 5 steps (peer_restarts.py): torchrun's and Ray Train's own restarts, with
their defaults; and the bare fork, a new process group and one step, which recovers nothing. Ray runs its workers, ours
too, at nice 15, torchrun's are at 0: on a busy machine the figures say less. Passes if no other restart is faster.

Then what hangs: ranks are stopped (SIGSTOP) with fault.hang_seconds=5, and the uploader with
fault.upload_silence_seconds=10; of that the longest step after it counts. Passes if each is over within its limit and
a second, the stopped rank is named, and the stacks of both ranks are artifacts. --kills 0: this only.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from benchmark import heading, parser, verdict

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import build_documents

from raynium.chaos.sessions import kill_started
from raynium.config.load import load_config
from raynium.config.schema import Config
from raynium.data.build.store_build import build_store
from raynium.rank.ports import free_port

FOLDER = Path(__file__).parent
TINY = {"model.vocab_size": 512, "model.hidden_size": 32, "model.ffn_size": 64, "model.head_dim": 8, "data.seq_len": 32}
# So long a run may take until its next step.
PATIENCE_SECONDS = 180.0
HANG_SECONDS, UPLOAD_SECONDS, WITHIN_SECONDS = 5.0, 10.0, 1.0
RECOVERED = re.compile(r"the next step was done \S+ s after the failure was seen: (.+)$")


class Contender(Protocol):
    """A run that trains until it is killed for good."""

    process: "subprocess.Popen[bytes]"

    def pids(self) -> dict[int, int]:
        """Rank → its process; empty while there are none."""
        ...

    def newest_step(self) -> tuple[float, int]:
        """When it was done (Unix time), and a number that is another one after each restart."""
        ...

    def first_step_of_another(self, generation: int) -> float | None:
        """When the first step after the next restart was done (Unix time)."""
        ...

    def close(self) -> None: ...


class Ours:
    def __init__(self, folder: Path, config: Config, log: Path):
        self._folder = folder
        (folder / "config.json").write_text(config.model_dump_json())
        job = folder / "job.yaml"
        job.write_text(json.dumps(config.model_dump(mode="json")))
        command = "from raynium.cli.app import main; main()"
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "400"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", command, "train", str(job)],
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            env=environment,
            start_new_session=True,
        )
        # Of each recovery, phase → seconds.
        self.recoveries: list[dict[str, float]] = []
        self.lines: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.decode().strip())
            if found := RECOVERED.search(self.lines[-1]):
                parts = (part.split() for part in found.group(1).split(", "))
                self.recoveries.append({phase: float(seconds) for phase, seconds in parts})

    def pids(self) -> dict[int, int]:
        return {int(name.removeprefix("rank-")): pid for name, pid in self._forked() if name.startswith("rank-")}

    def uploader_pid(self) -> int:
        (pid,) = (pid for name, pid in self._forked() if name == "uploader")
        return pid

    def _forked(self) -> list[tuple[str, int]]:
        """By the agent's template, by name: ranks, spares and the uploader."""
        record = json.loads((self._folder / "runs/recovery/run.json").read_text())
        pids = [pid for template in children(record["agents"][0]["pid"]) for pid in children(template)]
        return [(Path(f"/proc/{pid}/comm").read_text().strip(), pid) for pid in pids]

    def longest_step(self, since: float) -> float:
        """Seconds between two steps, of which the second was done after this time (Unix)."""
        file = f"file:{self._folder}/runs/mlflow.db?mode=ro"
        with contextlib.closing(sqlite3.connect(file, uri=True)) as made:
            rows = made.execute("select timestamp from metrics where key = 'train/loss' order by timestamp").fetchall()
        times = [row[0] / 1000 for row in rows]
        return max(later - earlier for earlier, later in itertools.pairwise(times) if later >= since)

    def artifacts(self, name: str) -> list[str]:
        return [file.read_text() for file in sorted((self._folder / "runs").rglob(name)) if "hangs" in file.parts]

    def newest_step(self) -> tuple[float, int]:
        done = self._query("train/loss", "order by timestamp desc")
        return (done[0], int((self._generation("order by value desc") or (0.0, 1.0))[1])) if done else (0.0, 0)

    def first_step_of_another(self, generation: int) -> float | None:
        found = self._generation(f"and value > {generation} order by timestamp")
        return found[0] if found else None

    def _generation(self, rest: str) -> tuple[float, float] | None:
        return self._query("vitals/run/generation", rest)

    def _query(self, name: str, rest: str) -> tuple[float, float] | None:
        """Of what the run has sent to MLflow, seconds late but with the agent's own times."""
        text = f"select timestamp, value from metrics where key = '{name}' {rest} limit 1"
        file = f"file:{self._folder}/runs/mlflow.db?mode=ro"
        # Nothing is there until the first sender has made it.
        with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(file, uri=True)) as made:
            if row := made.execute(text).fetchone():
                return row[0] / 1000, row[1]
        return None

    def close(self) -> None:
        kill_started([self.process])


class Peer:
    def __init__(self, folder: Path, config: Config, log: Path, command: list[str]):
        (folder / "config.json").write_text(config.model_dump_json())
        self._folder = folder
        environment = os.environ | {
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join([str(FOLDER), *sys.path]),
            # torchrun's. Else gloo finds the addresses of the ranks before in the store that restarts share: one of two
            # restarts hung for minutes, the other one took 15 s (torch 2.13).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdout=log.open("w"),
            stderr=log.open("a"),
            env=environment,
            start_new_session=True,
        )

    def pids(self) -> dict[int, int]:
        return {int(file.name.removeprefix("pid-")): int(file.read_text()) for file in self._folder.glob("pid-?")}

    def newest_step(self) -> tuple[float, int]:
        steps = self._steps()
        return steps[-1] if steps else (0.0, 0)

    def first_step_of_another(self, generation: int) -> float | None:
        steps = self._steps()
        last_of_it = max(index for index, (_, pid) in enumerate(steps) if pid == generation)
        return steps[last_of_it + 1][0] if last_of_it + 1 < len(steps) else None

    def close(self) -> None:
        kill_started([self.process])
        for pid in self.pids().values():  # torchrun's are each in a session of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _steps(self) -> list[tuple[float, int]]:
        file = self._folder / "steps"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(float(line.split()[0]), int(line.split()[1])) for line in lines if len(line.split()) == 3]


def children(pid: int) -> list[int]:
    """By whichever of its threads."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(child) for file in files for child in file.read_text().split())


def kill_ranks(run: Contender, kills: int, seed: int) -> list[float]:
    """Seconds from each kill to the next step of a new generation."""
    choose = random.Random(seed)
    seconds = []
    for _ in range(kills):
        began = time.time()
        wait_for(run, lambda began=began: run.newest_step()[0] > began)
        time.sleep(choose.uniform(1.0, 3.0))
        generation, ranks = run.newest_step()[1], run.pids()
        victim = ranks[choose.choice(sorted(ranks))]
        killed = time.time()
        os.kill(victim, signal.SIGKILL)
        wait_for(run, lambda generation=generation: run.first_step_of_another(generation) is not None)
        done = run.first_step_of_another(generation)
        assert done is not None
        seconds.append(done - killed)
    return seconds


def stop_ranks(run: Ours, stops: int, seed: int) -> tuple[list[float], list[bool]]:
    """Seconds from each SIGSTOP to the next step of a new generation, and whether that rank was named."""
    choose = random.Random(seed)
    seconds, named = [], []
    for _ in range(stops):
        began = time.time()
        wait_for(run, lambda began=began: run.newest_step()[0] > began + 2)
        time.sleep(choose.uniform(0.0, 2.0))
        generation, ranks = run.newest_step()[1], run.pids()
        rank, known = choose.choice(sorted(ranks)), len(run.lines)
        stopped = time.time()
        os.kill(ranks[rank], signal.SIGSTOP)
        wait_for(run, lambda generation=generation: run.first_step_of_another(generation) is not None)
        done = run.first_step_of_another(generation)
        assert done is not None
        seconds.append(done - stopped)
        named.append(any(f"hang: rank {rank} on node 0 (" in line for line in run.lines[known:]))
    return seconds, named


def stop_uploads(run: Ours, stops: int) -> tuple[list[float], list[bool]]:
    """The longest step after each SIGSTOP of the uploader, and whether it was told that an upload was given up."""
    seconds, told, given_up = [], [], "so its upload was given up"
    for _ in range(stops):
        began = time.time()
        wait_for(run, lambda began=began: run.newest_step()[0] > began + 2)
        known, stopped = len(run.lines), time.time()
        os.kill(run.uploader_pid(), signal.SIGSTOP)
        wait_for(run, lambda known=known: any(given_up in line for line in run.lines[known:]))
        resumed = time.time()
        wait_for(run, lambda resumed=resumed: run.newest_step()[0] > resumed + 2)
        seconds.append(run.longest_step(stopped))
        told.append(any(given_up in line for line in run.lines[known:]))
    return seconds, told


def measure_hangs(folder: Path, config: Config, times: int, seed: int) -> bool:
    """Prints a table; whether all was as it must be."""
    (folder / "ours").mkdir(parents=True)
    run = Ours(folder / "ours", config, folder / "log")
    try:
        stopped, named = stop_ranks(run, times, seed)
        wait_for(run, lambda: len(run.artifacts("stacks.txt")) == times)
        uploads, told = stop_uploads(run, max(1, times // 2))
    except (RuntimeError, OSError, ValueError):
        print((folder / "log").read_text()[-4000:], *run.lines[-20:], sep="\n", file=sys.stderr)
        raise
    finally:
        run.close()
    stacks = run.artifacts("stacks.txt")
    kept = sum(each.count("==== rank ") == 2 and each.count("in train_plan") == 2 for each in stacks)
    print("| what hangs | limit, s | median, s | min | max | named or told | stacks kept |")
    print("|---|---|---|---|---|---|---|")
    for name, limit, seconds, words, artifacts in (
        ("SIGSTOP of a rank → next step", HANG_SECONDS, stopped, named, f"{kept} of {times}"),
        ("SIGSTOP of the uploader → the longest step", UPLOAD_SECONDS, uploads, told, "–"),
    ):
        figures = " | ".join(f"{figure:.2f}" for figure in (statistics.median(seconds), min(seconds), max(seconds)))
        print(f"| {name} | {limit:g} | {figures} | {sum(words)} of {len(words)} | {artifacts} |")
    phases = dict.fromkeys(phase for recovery in run.recoveries for phase in recovery)
    parts = {phase: 1000 * statistics.median(each.get(phase, 0.0) for each in run.recoveries) for phase in phases}
    print(f"\nfrom the verdict on, median, ms: {', '.join(f'{phase} {taken:.0f}' for phase, taken in parts.items())}")
    in_time = max(stopped) <= HANG_SECONDS + WITHIN_SECONDS and max(uploads) <= UPLOAD_SECONDS + WITHIN_SECONDS
    return in_time and all(named) and all(told) and kept == times


def wait_for(run: Contender, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline or run.process.poll() is not None:
            raise RuntimeError(f"no step for {PATIENCE_SECONDS:.0f} s, or the run has ended ({run.process.poll()})")
        time.sleep(0.05)


def bare_forks(folder: Path, config: Config, times: int) -> list[float]:
    """Seconds from the fork of two ranks until rank 0 has done a step, from a process that has torch already."""
    (folder / "config.json").write_text(config.model_dump_json())
    os.environ["PYTHONPATH"] = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])
    multiprocessing.set_forkserver_preload(["__main__", "peer_restarts"])
    context = multiprocessing.get_context("forkserver")
    seconds = []
    for turn in range(times + 1):
        port, began = free_port("127.0.0.1"), time.time()
        ranks = [context.Process(target=bare_fork, args=(folder, rank, port)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        done = float((folder / "steps").read_text().splitlines()[-1].split()[0])
        # The first one waits for the template's imports.
        if turn > 0:
            seconds.append(done - began)
    return seconds


def bare_fork(folder: Path, rank: int, port: int) -> None:
    import peer_restarts

    peer_restarts.bare_fork(folder, rank, 2, port)


def row(name: str, seconds: list[float], ours: float) -> str:
    figures = (statistics.median(seconds), min(seconds), max(seconds), statistics.median(seconds) / ours)
    return f"| {name} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |"


def measure_restarts(folder: Path, config: Config, *, kills: int, seed: int, alone: bool) -> bool:
    """Prints two tables; whether no other restart is faster than ours."""
    seconds: dict[str, list[float]] = {}
    runs: dict[str, Callable[[Path, Path], Ours | Peer]] = {"ours": lambda at, log: Ours(at, config, log)}
    if not alone:
        elastic = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1000"]
        program = str(FOLDER / "peer_restarts.py")
        runs["torchrun"] = lambda at, log: Peer(at, config, log, [*elastic, program, "elastic", str(at)])
        runs["Ray Train"] = lambda at, log: Peer(at, config, log, [program, "ray", str(at)])
    recoveries: list[dict[str, float]] = []
    for name, start in runs.items():
        at = folder / name.split()[0]
        at.mkdir()
        run = start(at, folder / f"{at.name}.log")
        try:
            seconds[name] = kill_ranks(run, kills, seed)
            if isinstance(run, Ours):
                wait_for(run, lambda run=run: len(run.recoveries) >= kills)
                # One that no kill of ours began is shown, and is no figure.
                recoveries = run.recoveries[:kills]
                if len(run.recoveries) > kills:
                    print(*run.lines, sep="\n", file=sys.stderr)
        except (RuntimeError, OSError, ValueError):
            lines = run.lines[-20:] if isinstance(run, Ours) else []
            print((folder / f"{at.name}.log").read_text()[-4000:], *lines, sep="\n", file=sys.stderr)
            raise
        finally:
            run.close()
    (folder / "bare").mkdir()
    seconds["bare fork, group and step"] = bare_forks(folder / "bare", config, kills)

    ours = statistics.median(seconds["ours"])
    print("| restart | median, s | min | max | times ours |")
    print("|---|---|---|---|---|")
    for name, taken in seconds.items():
        print(row(name, taken, ours))
    told = zip(recoveries, seconds["ours"], strict=True)
    phases = [{"notice": whole - sum(recovery.values())} | recovery for recovery, whole in told]
    print("\n| phase of ours | median, ms |\n|---|---|")
    for phase in phases[0]:
        print(f"| {phase} | {1000 * statistics.median(each.get(phase, 0.0) for each in phases):.0f} |")
    print(f"\n{kills} kills each, seed {seed}\n")
    peers = [statistics.median(taken) for name, taken in seconds.items() if name in ("torchrun", "Ray Train")]
    return all(peer >= ours for peer in peers)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--kills", type=int, default=15, help="of each run")
    options.add_argument("--hangs", type=int, default=6, help="stops of a rank, and half as many of the uploader")
    options.add_argument("--alone", action="store_true", help="beside ours only the bare fork")
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    kills, hangs = (1, 1) if arguments.tiny else (arguments.kills, arguments.hangs)
    heading()
    with tempfile.TemporaryDirectory(prefix="recovery") as temporary:
        folder = Path(temporary)
        if arguments.tiny:
            build_documents(folder)
        else:
            build_store(folder / "data", source="python-stdlib", vocab_size=2048)

        def config(runs: Path, **changes: float) -> Config:
            settings = {
                "run.name": "recovery",
                "run.root": str(runs),
                "data.path": str(folder / "data"),
                "train.steps": 1_000_000,
                "checkpoint.every_steps": 5,
                "evaluate.every_steps": 1_000_000,
                "fault.max_restarts_without_progress": 1000,
                # A model that learns a small text by heart leaps, and going back would count as a recovery.
                "fault.spike_score": None,
                "engine.dtype": "float32",
            }
            tiny = TINY | {"data.source": str(folder / "text"), "data.heldout_fraction": 0.2}
            return load_config("quickstart", settings | changes | (tiny if arguments.tiny else {}))

        fine = True
        if kills:
            killed = config(folder / "ours/runs")
            alone = arguments.tiny or arguments.alone
            fine = measure_restarts(folder, killed, kills=kills, seed=arguments.seed, alone=alone)
        if hangs:
            at = folder / "hangs"
            limits = {"fault.hang_seconds": HANG_SECONDS, "fault.upload_silence_seconds": UPLOAD_SECONDS}
            fine &= measure_hangs(at, config(at / "ours/runs", **limits), hangs, arguments.seed)
    return verdict(fine, arguments.tiny)


if __name__ == "__main__":
    sys.exit(main())
