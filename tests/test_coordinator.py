"""The coordinator as a state machine: no ray, no ranks; node agents are played by the tests."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from raynium.config.load import parse_config
from raynium.launch.coordinator import RunCoordinator
from raynium.launch.protocol import AgentInfo, RankExit

JOB = """
run: {name: test}
cluster: {accelerator: cpu, nodes: 2, ranks_per_node: 1}
model: {vocab_size: 512, hidden_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 16, ffn_size: 64,
        max_seq_len: 64}
data: {path: /nowhere, seq_len: 16}
train: {steps: 4, global_batch_size: 4}
fault: {max_restarts_without_progress: 1}
"""

DIED = RankExit(1, -9, "killed by SIGKILL", retry=True, last_lines=("last words",))
BROKEN_PIPE = RankExit(0, 1, "RuntimeError: connection closed by peer", retry=True)
BAD_STEP = RankExit(0, 1, "BadStep: step 3: loss nan", retry=False)


def coordinator(folder: Path, **changes: Any) -> RunCoordinator:
    return RunCoordinator(parse_config(JOB, changes).model_dump(mode="json"), str(folder / "run"), last_generation=0)


def agent(node_rank: int, attempt: str = "a") -> AgentInfo:
    return AgentInfo(attempt, node_rank, f"127.0.0.{node_rank + 2}", 29500 + node_rank, pid=1)


def test_a_generation_starts_when_every_node_is_there_and_all_get_the_same_rendezvous(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        first = asyncio.create_task(run.join(agent(1)))
        await asyncio.sleep(0.01)
        assert not first.done()
        second = await run.join(agent(0))
        assert await first == second
        assert (second.kind, second.generation, second.resume_step) == ("run", 1, None)
        assert (second.master_host, second.master_port) == ("127.0.0.2", 29500)

    asyncio.run(play())


def test_a_death_takes_every_node_to_the_next_generation_and_its_cause_is_told(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        watching = asyncio.create_task(run.watch(1, False))
        await run.exited(1, 1, [DIED])
        verdict = await watching
        assert verdict.kind == "over" and "rank 1: killed by SIGKILL" in verdict.cause
        await run.exited(1, 0, [BROKEN_PIPE])  # a consequence: neither counted nor told as a cause
        orders = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        assert {order.generation for order in orders} == {2}
        texts = [event.text for event in (await run.status(0)).events]
        assert any("last words" in text for text in texts)
        assert [text for text in texts if "failed" in text] == ["generation 1 failed: rank 1: killed by SIGKILL"]

    asyncio.run(play())


def test_of_several_deaths_the_signal_is_the_cause(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        await run.exited(1, 0, [BROKEN_PIPE, DIED])
        assert "SIGKILL" in (await run.watch(1, False)).cause

    asyncio.run(play())


def test_it_gives_up_after_failures_without_progress_and_says_so(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        for generation in (1, 2):
            await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
            await run.exited(generation, 1, [DIED])
        assert (await run.join(agent(0))).kind == "end"
        status = await run.status(0)
        assert status.ended == "failed" and status.cause is not None
        assert "max_restarts_without_progress=1" in status.cause and "SIGKILL" in status.cause

    asyncio.run(play())


def test_what_would_happen_again_is_not_tried_again(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        await run.exited(1, 0, [BAD_STEP])
        assert (await run.join(agent(0))).kind == "end"
        assert (await run.status(0)).cause == "rank 0: BadStep: step 3: loss nan"

    asyncio.run(play())


def test_a_new_worker_group_ends_the_old_generation_and_sends_old_agents_home(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        watching = asyncio.create_task(run.watch(1, False))
        zombie = asyncio.create_task(run.join(agent(1)))  # of the old group, ready for another generation
        await asyncio.sleep(0.01)
        orders = await asyncio.gather(run.join(agent(0, "b")), run.join(agent(1, "b")))
        assert (await watching).kind == "over"
        assert (await zombie).kind == "end"
        assert {order.generation for order in orders} == {2}

    asyncio.run(play())


def test_a_stop_reaches_running_ranks_once_and_ends_a_run_that_has_none(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        await run.request_stop()
        assert (await run.watch(1, False)).kind == "stop"
        again = asyncio.create_task(run.watch(1, True))
        await asyncio.sleep(0.01)
        assert not again.done()
        await run.exited(1, 1, [DIED])  # killed while it was saving: the user wanted the end, not another generation
        assert (await again).kind == "over"
        assert (await run.status(0)).ended == "stopped"

        idle = coordinator(tmp_path)
        await idle.request_stop()
        assert (await idle.join(agent(0))).kind == "end"

    asyncio.run(play())


def test_reaching_the_end_without_a_committed_checkpoint_is_a_failure(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path, **{"cluster.nodes": 1})
        await run.join(agent(0))
        await run.shard_failed(1, 4, 0, "disk full")
        await run.exited(1, 0, [RankExit(0, 0, None, retry=False, outcome={"step": 4, "reason": "finished"})])
        status = await run.status(0)
        assert status.ended == "failed" and "could not be committed" in (status.cause or "")
        assert any("disk full" in event.text for event in status.events)

    asyncio.run(play())


def test_a_coordinator_that_was_started_again_sends_agents_back_to_join(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        assert "started again" in (await run.watch(7, False)).cause
        await run.exited(7, 0, [DIED])  # about ranks of its former life: nothing to do
        assert (await run.status(0)).ended is None

    asyncio.run(play())


def test_an_unreadable_store_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the run's folder should be")

    async def play() -> None:
        run = coordinator(tmp_path, **{"cluster.nodes": 1})
        assert (await run.join(agent(0))).kind == "end"
        status = await run.status(0)
        assert status.ended == "failed" and "no checkpoint could be chosen" in (status.cause or "")

    asyncio.run(play())


@pytest.mark.parametrize("events_after, expected", [(0, ["one", "two"]), (1, ["two"]), (2, [])])
def test_events_are_told_once(tmp_path: Path, events_after: int, expected: list[str]) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        await run.tell("one")
        await run.tell("two")
        assert [event.text for event in (await run.status(events_after)).events] == expected

    asyncio.run(play())
