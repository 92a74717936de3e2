"""What an agent makes of its ranks' ends: with files in place of the kernel's log, and one real look at it."""

import asyncio
import os
import signal
import threading
from functools import partial
from pathlib import Path

import _dying_ranks
import pytest
import yaml
from tiny import job_text
from waiting import stop, wait_for

from raynium.accelerators.detect import detect
from raynium.config.load import parse_config
from raynium.health.faults import Fault, classify
from raynium.health.neuron_monitor import DeviceSample
from raynium.node import agent as agent_module
from raynium.node import diagnosis
from raynium.node.agent import Node as AgentNode
from raynium.node.agent import NodeAgent
from raynium.node.compile_cache import NodeCache
from raynium.node.diagnosis import KERNEL_LOG, Diagnosis, KernelLog, seconds_for_others
from raynium.node.ranks import RankGroup
from raynium.run import board
from raynium.run.coordinator import RunCoordinator
from raynium.run.on_loop import CoordinatorOnLoop
from raynium.run.protocol import PEER_WORD_SECONDS, AgentInfo, DevicesSeen, GoHome, NodeEnded, RankExit
from raynium.tracking.tracker import MemoryTracker
from raynium.train.link import Failed

FIXTURES = Path(__file__).parent / "fixtures/neuron"
KILLED = RankExit(1, -signal.SIGKILL, "killed by SIGKILL (out of memory?)", retry=True)
LIBRARY_ERROR = RankExit(0, 1, "RuntimeError: the device stopped", retry=True, error="RuntimeError")
OWN_ERROR = RankExit(0, 1, "BadStep: step 3: loss nan", retry=False, error="BadStep")
PID = 4711
HBM = "NEURON_HW_ERR=HBM_UNCORRECTABLE_ERROR instance-id=i-1 nd-id=5 nc-id=0 serial-num=19 action=TERMINATE_INSTANCE"


class Node:
    """A node whose kernel log is a file."""

    def __init__(self, folder: Path):
        self.log = folder / "kmsg"
        self.log.write_text("4,1,10,-;" + HBM + "\n")  # of a time before this agent
        self.kernel_log = KernelLog(self.log)
        self.diagnosis = Diagnosis(self.kernel_log, shared_memory=folder)

    def kernel_says(self, *lines: str) -> None:
        with self.log.open("a") as file:
            for number, line in enumerate(lines):
                file.write(f"3,{number},123456789,-;{line}\n SUBSYSTEM=neuron\n DEVICE=+neuron:0\n")

    def one(self, exit: RankExit, pid: int = PID) -> RankExit:
        (explained,), _ = self.diagnosis.explain([(pid, exit)])
        return explained


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_what_the_kernel_logged_before_is_nobodys_cause(node: Node) -> None:
    assert node.one(LIBRARY_ERROR) == LIBRARY_ERROR
    node.kernel_says(HBM)
    assert node.kernel_log.new_lines() == [HBM]
    assert node.kernel_log.new_lines() == []


def test_an_exit_as_it_should_be_stays_what_it_is(node: Node) -> None:
    done = RankExit(0, 0, None, retry=False, outcome={"step": 4, "reason": "finished"})
    node.diagnosis.note(0, "Timeout waiting for RX (waited 120 sec) - retrying")
    assert node.one(done) == done


def test_a_line_that_scrolled_away_long_ago_is_still_the_cause(node: Node) -> None:
    node.diagnosis.note(0, "[MLA 0][NC 1] DMA TX engine 3 is in an abort state")
    for number in range(500):
        node.diagnosis.note(0, f"2026-Aug-30 00:11:31.312687 26712:26712 ERROR NRT:nrt_infodump  VARIABLE_{number}=1")
    found = node.one(LIBRARY_ERROR)
    assert found.fault is not None and found.fault.name == "dma-abort" and found.retry
    assert found.cause is not None and "DMA engine" in found.cause and "the device stopped" in found.cause
    assert node.one(LIBRARY_ERROR) == LIBRARY_ERROR, "the next generation starts with nothing"


def test_one_ranks_lines_are_not_anothers_cause(node: Node) -> None:
    node.diagnosis.note(0, "RuntimeError: Failed to execute the model status=1003 message=Numerical Error")
    (first, second), fault = node.diagnosis.explain([(1, LIBRARY_ERROR), (2, KILLED)])
    assert first.fault is not None and first.fault.name == "not-a-number" and not first.retry
    assert second.fault is None and second.retry and fault is None


@pytest.mark.parametrize("line", ["RX, connection closed by remote peer", "nrt_execute: status=1003"])
def test_what_a_rank_raised_itself_stays_its_cause(node: Node, line: str) -> None:
    node.diagnosis.note(0, line)
    assert node.one(OWN_ERROR) == OWN_ERROR


def test_but_broken_hardware_explains_its_wrong_numbers_and_the_run_goes_on(node: Node) -> None:
    node.kernel_says(HBM)
    found = node.one(OWN_ERROR)
    assert found.fault is not None and (found.fault.action, found.fault.device) == ("replace", 5)
    assert found.retry and found.cause is not None and found.cause.endswith("(BadStep: step 3: loss nan)")


def test_the_text_of_a_librarys_exception_is_read_too(node: Node) -> None:
    message = "RuntimeError: long story\nFailed to execute the model status=1202 message=parity"
    found = node.one(RankExit(0, 1, message, retry=True, error="RuntimeError"))
    assert found.fault is not None and found.fault.name == "sram-uncorrectable"
    assert found.fault.evidence.startswith("Failed to execute")


def test_a_rank_that_hung_and_was_killed_still_tells_what_is_broken(node: Node) -> None:
    node.diagnosis.note(3, "(FATAL-RT-UNDEFINED-STATE) execution timeout (600000 ms) on Neuron Device 2 NC 1, model a")
    exits, fault = node.diagnosis.explain([])
    assert exits == [] and fault is not None and (fault.name, fault.device, fault.core) == ("compute-hang", 2, 1)
    assert node.diagnosis.explain([]) == ([], None)
    node.diagnosis.note(3, "(FATAL-RT-UNDEFINED-STATE) missing collectives status on Neuron Device 0 NC 0, model 0")
    assert node.diagnosis.explain([]) == ([], None), "a hang that another node caused says nothing about this one"


def test_a_hang_of_all_chips_at_once_condemns_no_node(node: Node) -> None:
    said = (
        "(FATAL-RT-UNDEFINED-STATE) [ND {}][NC 0] execution timeout (600000 ms) on model a.neff, waiting for execution"
    )
    for rank in range(4):  # of one chip: that may be broken
        node.diagnosis.note(rank, said.format(7))
    assert (fault := node.diagnosis.explain([])[1]) is not None and (fault.action, fault.device) == ("reboot", 7)
    for rank in range(8):
        node.diagnosis.note(rank, said.format(rank // 4))
    exits, fault = node.diagnosis.explain([(4711, RankExit(0, 1, "RuntimeError: status=5", retry=True))])
    assert fault is None and exits[0].fault is not None
    assert (exits[0].fault.action, exits[0].fault.guilty) == ("restart", "unknown") and exits[0].retry
    assert "on 2 chips of this node at once" in (exits[0].cause or "")


def test_a_hang_on_collectives_does_not_blame_this_node(node: Node) -> None:
    node.diagnosis.note(0, "(FATAL-RT-UNDEFINED-STATE) missing collectives status on Neuron Device 0 NC 0, model 0")
    found = node.one(LIBRARY_ERROR)
    assert found.fault is not None and found.fault.guilty == "peer" and not found.fault.names_the_node
    assert found.retry and "this node is not to blame" in (found.cause or "")


@pytest.mark.parametrize(
    "text",
    [
        "RuntimeError: [.../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1",
        "RuntimeError: [.../tcp/pair.cc:581] Read error [127.0.0.1]:28571: Connection reset by peer",
        "RuntimeError: [.../tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete",
        "DistBackendError: NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error",
        "DistNetworkError: failed to recv, got 0 bytes",
        "DistNetworkError: The client socket has timed out after 60000ms while trying to connect",
    ],
)
def test_a_broken_connection_blames_a_peer_and_never_the_rank_that_says_so(node: Node, text: str) -> None:
    error = text.partition(":")[0]
    assert seconds_for_others(Failed(error, text, retry=True), 1) == PEER_WORD_SECONDS
    found = node.one(RankExit(0, 1, text, retry=True, error=error))
    assert found.fault is not None and found.fault.guilty == "peer" and found.retry and text in (found.cause or "")

    own = text.replace(error, "ConnectionError")
    assert seconds_for_others(Failed("ConnectionError", own, retry=True), 1) == 0, "it may be anybody's connection"
    assert node.one(RankExit(0, 1, own, retry=True, error="ConnectionError")).fault is None
    node.diagnosis.note(0, "WARNING s3: Connection reset by peer, trying again")
    shape = "RuntimeError: mat1 and mat2 shapes cannot be multiplied"
    assert 0 < seconds_for_others(Failed("RuntimeError", shape, retry=True), 1) < PEER_WORD_SECONDS
    assert seconds_for_others(None, -signal.SIGKILL) == 0 < seconds_for_others(None, -signal.SIGABRT)
    assert node.one(RankExit(0, 1, shape, retry=True, error="RuntimeError")).fault is None


def test_waiting_for_a_rank_that_compiles_is_told_and_is_no_fault(node: Node) -> None:
    node.diagnosis.note(1, "Timeout waiting for RX (waited 240 sec) - retrying")
    found = node.one(RankExit(1, -signal.SIGTERM, "killed by SIGTERM", retry=True))
    assert found.fault is None and "waited 240 s for another rank" in (found.cause or "")


OOM_KILL = (
    "python invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0",
    "oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0,global_oom,task_memcg=/,task=python,pid=4711,uid=0",
    "Out of memory: Killed process 4711 (python) total-vm:9000kB, anon-rss:8000kB, file-rss:0kB, shmem-rss:0kB, UID:0",
)
OOM_KILL_OF_A_LIMIT = (
    "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,oom_memcg=/a,task_memcg=/a,task=python,pid=4711,uid=0",
    "Memory cgroup out of memory: Killed process 4711 (python) total-vm:9000kB, anon-rss:8000kB, UID:0",
)


@pytest.mark.parametrize(
    "lines, whose", [(OOM_KILL, "the node's memory"), (OOM_KILL_OF_A_LIMIT, "the memory limit of its container")]
)
def test_the_kernels_out_of_memory_killer_is_named(node: Node, lines: tuple[str, ...], whose: str) -> None:
    node.kernel_says(*lines)
    found = node.one(KILLED)
    assert found.fault is not None and found.fault.name == "out-of-memory" and found.retry
    assert (found.cause or "").startswith(f"killed by SIGKILL: {whose}")


def test_the_killer_took_another_process_or_ours_under_another_number(node: Node) -> None:
    node.kernel_says(*OOM_KILL)
    assert "while the kernel ended process 4711" in (node.one(KILLED, pid=7).cause or "")


def test_a_kill_that_the_kernel_does_not_know_of_came_from_a_person_or_a_program(node: Node) -> None:
    node.kernel_says("usb 1-1: new device")
    found = node.one(KILLED)
    assert found.fault is None and "by a person or a program" in (found.cause or "")


def test_without_a_kernel_log_a_kill_stays_a_riddle_and_says_why(tmp_path: Path) -> None:
    log = KernelLog(tmp_path / "missing", programs=[("false",), ("no-such-program",), ("true",)])
    assert log.source is None and not log.readable and log.new_lines() == []
    (found,), fault = Diagnosis(log, shared_memory=tmp_path).explain([(PID, KILLED)])
    assert fault is None and found.fault is None
    assert "by whom is not known, since the kernel's log cannot be read here" in (found.cause or "")
    problems = (
        "missing: No such file",
        "false: exit code 1, no line",
        "program: No such file",
        "true: exit code 0, no",
    )
    assert all(problem in (found.cause or "") for problem in problems)


@pytest.mark.parametrize("prefix", ["", "node7 kernel: "])  # of dmesg and of journalctl
def test_where_the_device_cannot_be_read_a_program_prints_the_kernels_log(tmp_path: Path, prefix: str) -> None:
    printed = tmp_path / "printed"
    printed.write_text(
        f"[    1.000000] {prefix}booted\n[   21.5] {prefix}Out of memory: Killed process {PID} (python)\n"
    )
    log = KernelLog(tmp_path / "missing", programs=[("false",), ("cat", str(printed))])
    assert log.source == f"cat {printed}" and log.new_lines() == []  # an older run's kill is not ours
    with printed.open("a") as file:
        file.write("".join(f"[ 1234.567890] {prefix}{line}\n" for line in OOM_KILL))
    diagnosis = Diagnosis(log, shared_memory=tmp_path)
    (found,), _ = diagnosis.explain([(PID, KILLED)])
    assert found.fault is not None and found.fault.name == "out-of-memory"
    assert not any(line.startswith("[") for line in OOM_KILL) and log.new_lines() == []

    printed.write_text(f"[ 2000.000000] {prefix}what had been read was overwritten\n")
    assert log.new_lines() == ["what had been read was overwritten"]
    printed.unlink()
    assert log.new_lines() == []  # said in the log, and no reason to stop


def test_a_bus_error_on_full_shared_memory(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    bus_error = RankExit(0, -signal.SIGBUS, "killed by SIGBUS", retry=True)
    monkeypatch.setattr(diagnosis, "SHARED_MEMORY_FULL_BYTES", 0)
    assert node.one(bus_error) == bus_error
    monkeypatch.setattr(diagnosis, "SHARED_MEMORY_FULL_BYTES", 2**62)
    found = node.one(bus_error)
    assert found.fault is not None and found.fault.name == "shared-memory-full" and "--shm-size" in (found.cause or "")


def test_cuda_out_of_memory_says_what_to_set(node: Node) -> None:
    message = "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79 GiB"
    found = node.one(RankExit(0, 1, message, retry=True, error="OutOfMemoryError"))
    assert found.fault is not None and found.fault.name == "device-memory"
    assert "engine.activation_checkpointing=full" in (found.cause or "") and "20.00 MiB" in (found.cause or "")


@pytest.mark.parametrize("xid, row", [(x, r) for x, r in yaml.safe_load((FIXTURES / "xids.yaml").read_text()).items()])
def test_gpu_faults_of_the_kernels_log(xid: str, row: list[str] | None) -> None:
    fault = classify([], [xid])
    assert (None if fault is None else [fault.name, fault.action]) == row


@pytest.mark.skipif(not os.access(KERNEL_LOG, os.W_OK), reason="only root may write a line into the kernel's log")
def test_the_kernels_own_log_is_read_from_now_on() -> None:
    log = KernelLog()
    try:
        assert log.readable
        line = f"raynium test of process {os.getpid()}"
        KERNEL_LOG.write_text(line + "\n")
        assert [each for each in log.new_lines() if line in each] == [line]
        assert not [each for each in log.new_lines() if line in each]
    finally:
        log.close()


# ------------------------------------------------------------------------------------------------- the coordinator

JOB = job_text(
    {
        # As in the recorded reports of neuron-monitor.
        "run.name": "replay",
        "cluster.nodes": 2,
        "cluster.ranks_per_node": 1,
        "train.steps": 100_000,
        "checkpoint.every_steps": 1000,
    }
)
ABORT = Fault("dma-abort", "a DMA engine stopped for good", "replace", "node", "[MLA 2][NC 1] DMA TX engine 14", 2, 1)
HANG = Fault("collectives-hang", "a collective operation hung", "restart", "peer", "missing collectives status")
NAN = Fault("not-a-number", "an operation produced NaN", "stop", "job", "status=1003")


def died_of(fault: Fault, rank: int) -> RankExit:
    return RankExit(rank, 1, f"{fault} (RuntimeError: x)", fault.retry, error="RuntimeError", fault=fault)


async def started(folder: Path) -> RunCoordinator:
    """A coordinator whose first generation runs on two nodes."""
    run = RunCoordinator(
        parse_config(JOB).model_dump(mode="json"), str(folder / "run"), last_generation=0, claim_number=1
    )
    agents = [AgentInfo("a", node, 2, f"10.0.0.{node + 2}", 29500 + node, pid=1) for node in range(2)]
    await asyncio.gather(*(run.join(agent) for agent in agents))
    return run


async def ended(
    run: RunCoordinator, generation: int, node_rank: int, exits: list[RankExit], fault: Fault | None = None
) -> None:
    order = run._lives._generations[generation].order
    await run.exited(order_agent(run, node_rank), order, NodeEnded(tuple(exits), fault=fault))


def order_agent(run: RunCoordinator, node_rank: int) -> AgentInfo:
    newest = run._lives.newest
    assert newest is not None
    return newest.agents[node_rank]


async def texts(run: RunCoordinator) -> list[str]:
    return [event.text for event in (await run.status(0)).events]


def test_a_broken_node_is_named_with_what_to_do_and_the_run_goes_on(tmp_path: Path) -> None:
    async def play() -> None:
        run = await started(tmp_path)
        await ended(run, 1, 1, [died_of(ABORT, 1)])
        told = await texts(run)
        assert told[-3:] == [
            "generation 1 failed: rank 1: Neuron device 2, core 1, a DMA engine stopped for good (RuntimeError: x)",
            "  node 1 (10.0.0.3) | [MLA 2][NC 1] DMA TX engine 14",
            "node 1 (10.0.0.3): Neuron device 2, core 1, a DMA engine stopped for good: "
            "replace this instance (terminate it, or stop and start it): it will fail again",
        ]
        status = await run.status(0)
        assert status.ended is None
        (named,) = status.node_faults
        assert (named.generation, named.node_rank, named.host, named.fault) == (1, 1, "10.0.0.3", ABORT)
        assert named.to_json() == {
            **{"generation": 1, "node_rank": 1, "host": "10.0.0.3", "name": "dma-abort", "action": "replace"},
            **{"evidence": ABORT.evidence, "text": told[-1]},
        }

    asyncio.run(play())


def test_a_reset_is_advised_once_a_node_then_another_node(tmp_path: Path) -> None:
    once = classify(["[MLA 2][NC 1] DMA TX engine 14 is in an abort state"])
    assert once is not None

    async def play() -> None:
        run = await started(tmp_path)
        await ended(run, 1, 1, [died_of(once, 1)])
        assert (await texts(run))[-1].endswith("reload its device driver; then it may be used again")
        agents = [AgentInfo("a", node, 2, f"10.0.0.{node + 2}", 29500 + node, pid=1) for node in range(2)]
        await ended(run, 1, 0, [])
        await asyncio.gather(*(run.join(agent) for agent in agents))
        await ended(run, 2, 1, [died_of(once, 1)])
        assert "replace this instance" in (await texts(run))[-1]
        status = await run.status(0)
        assert [each.fault.action for each in status.node_faults] == ["reboot", "replace"]

    asyncio.run(play())


def test_the_node_that_made_others_hang_is_named_though_they_reported_first(tmp_path: Path) -> None:
    async def play() -> None:
        run = await started(tmp_path)
        await ended(run, 1, 0, [died_of(HANG, 0)])
        assert not [text for text in await texts(run) if "10.0.0" in text], "nobody is blamed yet"
        await ended(run, 1, 1, [died_of(ABORT, 1)])
        assert (await texts(run))[-1].startswith("node 1 (10.0.0.3): Neuron device 2, core 1, a DMA engine")
        await ended(run, 1, 1, [], ABORT)
        assert sum("replace this instance" in text for text in await texts(run)) == 1, "once"

    asyncio.run(play())


def test_a_node_whose_ranks_only_hung_is_named_too(tmp_path: Path) -> None:
    async def play() -> None:
        run = await started(tmp_path)
        await ended(run, 1, 0, [died_of(HANG, 0)])
        await ended(run, 1, 1, [], ABORT)
        assert (await texts(run))[-1].startswith("node 1 (10.0.0.3)")

    asyncio.run(play())


def test_what_would_happen_again_ends_the_run(tmp_path: Path) -> None:
    async def play() -> None:
        run = await started(tmp_path)
        await ended(run, 1, 0, [died_of(NAN, 0)])
        status = await run.status(0)
        assert status.ended == "failed" and "produced NaN" in (status.cause or "")

    asyncio.run(play())


@pytest.mark.parametrize(
    "exits, guilty",
    [
        ([died_of(NAN, 0), died_of(ABORT, 1)], 1),  # the wrong numbers came from the broken device
        ([died_of(HANG, 0), RankExit(1, 1, "RuntimeError: x", retry=True)], 1),
        ([died_of(HANG, 0), RankExit(1, -9, "killed by SIGKILL", retry=True)], 1),
        ([died_of(HANG, 0), died_of(NAN, 1)], 1),
        ([RankExit(0, 1, "RuntimeError: x", retry=True), died_of(ABORT, 1)], 1),
    ],
)
def test_of_several_deaths_the_one_that_explains_the_others_is_told(
    tmp_path: Path, exits: list[RankExit], guilty: int
) -> None:
    async def play() -> None:
        run = await started(tmp_path)
        await ended(run, 1, 0, exits)
        assert any(text.startswith(f"generation 1 failed: rank {guilty}: ") for text in await texts(run))

    asyncio.run(play())


def test_device_metrics_are_of_all_nodes_that_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> None:
        run = await started(tmp_path)
        await run.tell(DevicesSeen(1, DeviceSample((0.5,), 10.0)))
        found = (await run.tell(DevicesSeen(0, DeviceSample((0.7,), 30.0)))).metrics
        assert (found["device/reporting_nodes"], found["device/flops_per_second"]) == (2.0, 40.0)
        monkeypatch.setattr(board, "DEVICE_SAMPLE_SECONDS", -1.0)
        assert (await run.tell(DevicesSeen(0, DeviceSample((0.7,), 30.0)))).metrics == {}, "too old to be true now"

    asyncio.run(play())


# ------------------------------------------------------------------------------------------------- the agent


def test_an_agent_reports_its_devices_and_names_what_broke_on_its_node(tmp_path: Path, document_folder: Path) -> None:
    """Real ranks on the CPU, with a recorded neuron-monitor and a file for the kernel's log."""
    program = tmp_path / "neuron-monitor"
    # Its reports come once the node trains: those of a node that has no part in the run yet are nobody's.
    program.write_text(
        f"#!/bin/sh\necho $$ > '{tmp_path}/pid'\nuntil [ -e '{tmp_path}/trains' ]; do sleep 0.05; done\n"
        f"cat '{FIXTURES / 'monitor.jsonl'}'\nexec sleep 300\n"
    )
    program.chmod(0o755)
    (tmp_path / "kmsg").touch()
    config = parse_config(JOB, {"cluster.nodes": 1, "cluster.ranks_per_node": 1})
    coordinator = CoordinatorOnLoop(RunCoordinator(config.model_dump(mode="json"), str(tmp_path / "run"), 0, 1))
    tracker = MemoryTracker()
    agent = NodeAgent(
        config=config,
        run_url=str(tmp_path / "run"),
        node=AgentNode("a", 0, 1, "127.0.0.1"),
        accelerator=detect("cpu"),
        coordinator=coordinator,
        open_tracker=lambda: tracker,
        data_places=lambda: [str(document_folder)],
        kernel_log=tmp_path / "kmsg",
        neuron_monitor=str(program),
    )
    thread = threading.Thread(target=agent.run)
    thread.start()
    try:
        wait_for(lambda: tracker.points)
        (tmp_path / "trains").touch()
        wait_for(lambda: [value for _, value in tracker.values("device/execution_errors")][-1:] == [8])
        with (tmp_path / "kmsg").open("a") as file:
            file.write(f"3,1,123456789,-;{HBM}\n")
        os.kill(agent.rank_pids()[0], signal.SIGKILL)
        status = wait_for(
            lambda: (now := coordinator.run(lambda each: each.status(0)).result()).generation == 2 and now
        )
        wait_for(lambda: coordinator.run(lambda each: each.status(0)).result().step >= 1)
    finally:
        coordinator.run(stop).result()
        thread.join(60)
        coordinator.close()
    told = "\n".join(event.text for event in status.events)
    assert "generation 1 failed: rank 0: Neuron device 5, core 0, its HBM memory had an error" in told
    assert "node 0 (127.0.0.1): Neuron device 5, core 0, its HBM memory" in told and "replace this instance" in told
    steps = [step for step, _ in tracker.values("device/execution_errors")]
    assert 1 <= len(steps) <= 2, "each sample goes with one step"
    assert not thread.is_alive()
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists(), "the monitor outlives its agent"


def test_an_agent_names_the_broken_node_though_the_rank_that_died_was_another(
    tmp_path: Path, document_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two real processes that say what ranks say in a hang; the one on the broken device is killed with the other."""
    monkeypatch.setattr(agent_module, "RankGroup", partial(RankGroup, program=_dying_ranks.hang_on_a_broken_device))
    changes = {"cluster.nodes": 1, "cluster.ranks_per_node": 2, "fault.max_restarts_without_progress": 0}
    config = parse_config(JOB, changes)
    coordinator = CoordinatorOnLoop(RunCoordinator(config.model_dump(mode="json"), str(tmp_path / "run"), 0, 1))
    (tmp_path / "kmsg").touch()
    NodeAgent(
        config=config,
        run_url=str(tmp_path / "run"),
        node=AgentNode("a", 0, 1, "127.0.0.1"),
        accelerator=detect("cpu"),
        coordinator=coordinator,
        open_tracker=MemoryTracker,
        data_places=lambda: [str(document_folder)],
        kernel_log=tmp_path / "kmsg",
    ).run()
    status = coordinator.run(lambda each: each.status(0)).result()
    coordinator.close()
    told = [event.text for event in status.events]
    assert any(text.startswith("generation 1 failed: rank 1: Neuron device 0, core 0, a collective") for text in told)
    assert told[-2] == f"  node 0 (127.0.0.1) | {_dying_ranks.BROKEN_LINE}"
    assert told[-1].startswith("node 0 (127.0.0.1): Neuron device 2, core 1, an execution did not end")


def test_an_agent_removes_a_graph_that_cannot_be_loaded_and_tries_once_more(
    tmp_path: Path, document_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "RankGroup", partial(RankGroup, program=_dying_ranks.cannot_load_a_graph))
    graph = tmp_path / "cache" / _dying_ranks.GRAPH / "model.neff"
    graph.parent.mkdir(parents=True)
    graph.write_bytes(b"broken")
    cache = NodeCache({}, None, (str(tmp_path / "cache"),))
    monkeypatch.setattr(agent_module, "node_cache", lambda *_, **__: cache)
    config = parse_config(JOB, {"cluster.nodes": 1, "cluster.ranks_per_node": 2})
    coordinator = CoordinatorOnLoop(RunCoordinator(config.model_dump(mode="json"), str(tmp_path / "run"), 0, 1))
    NodeAgent(
        config=config,
        run_url=str(tmp_path / "run"),
        node=AgentNode("a", 0, 1, "127.0.0.1"),
        accelerator=detect("cpu"),
        coordinator=coordinator,
        open_tracker=MemoryTracker,
        data_places=lambda: [str(document_folder)],
    ).run()
    status = coordinator.run(lambda each: each.status(0)).result()
    coordinator.close()
    assert not graph.exists()
    assert (status.generation, status.ended) == (2, "failed") and "empty the compile cache" in (status.cause or "")
    told = "\n".join(event.text for event in status.events)
    assert f"(graph {_dying_ranks.GRAPH})" in told and "removed from the compile cache: compiled anew" in told


def test_a_ranks_own_error_ends_the_run_and_not_its_peers_broken_connection(
    tmp_path: Path, document_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two real processes of one gloo group: rank 1 fails in the middle of a step, rank 0 while it waits for it."""
    monkeypatch.setattr(agent_module, "RankGroup", partial(RankGroup, program=_dying_ranks.fail_in_a_step))
    changes = {"cluster.nodes": 1, "cluster.ranks_per_node": 2, "fault.max_restarts_without_progress": 0}
    config = parse_config(JOB, changes)
    coordinator = CoordinatorOnLoop(RunCoordinator(config.model_dump(mode="json"), str(tmp_path / "run"), 0, 1))
    NodeAgent(
        config=config,
        run_url=str(tmp_path / "run"),
        node=AgentNode("a", 0, 1, "127.0.0.1"),
        accelerator=detect("cpu"),
        coordinator=coordinator,
        open_tracker=MemoryTracker,
        data_places=lambda: [str(document_folder)],
    ).run()
    status = coordinator.run(lambda each: each.status(0)).result()
    coordinator.close()
    assert (status.cause or "").startswith("rank 1: IndexError: list index out of range")


def test_agents_that_are_to_leave_go_home_and_others_go_on(tmp_path: Path) -> None:
    async def play() -> None:
        run = await started(tmp_path)
        await ended(run, 1, 1, [died_of(ABORT, 1)])
        waiting = asyncio.create_task(run.join(AgentInfo("a", 1, 2, "10.0.0.3", 29501, pid=1)))
        commits = asyncio.create_task(run.commits(None))
        await asyncio.sleep(0)
        await run.leave("b", "the run leaves this node", "agents")
        assert isinstance(await waiting, GoHome) and await commits is None
        # One that comes late is sent home too, though now all would be there.
        assert isinstance(await run.join(AgentInfo("a", 0, 2, "10.0.0.2", 29500, pid=1)), GoHome)
        status = await run.status(0)
        assert status.ended is None and status.generation == 1

        orders = await asyncio.gather(
            *(run.join(AgentInfo("b", node, 2, f"10.0.0.{node + 4}", 29500, pid=1)) for node in range(2))
        )
        assert [order.generation for order in orders] == [2, 2]

    asyncio.run(asyncio.wait_for(play(), 60))


def test_a_generation_that_runs_while_its_nodes_are_left_ends_and_is_no_failure(tmp_path: Path) -> None:
    async def play() -> None:
        run = await started(tmp_path)
        watch = asyncio.create_task(run.watch(order_agent(run, 0), run._lives._generations[1].order, stop_known=False))
        await asyncio.sleep(0)
        await run.leave("b", "the run leaves this node", "agents")
        verdict = await watch
        assert (verdict.kind, verdict.cause) == ("over", "the run leaves this node")
        await ended(run, 1, 0, [RankExit(0, -signal.SIGKILL, "killed", retry=True)])
        status = await run.status(0)
        assert status.ended is None and not any("failed" in event.text for event in status.events)

    asyncio.run(asyncio.wait_for(play(), 60))
