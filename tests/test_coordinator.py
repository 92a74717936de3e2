"""The coordinator as a state machine: no ray, no ranks; node agents are played by the tests."""

import asyncio
import json
import pickle
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save as save_checkpoint
from tiny import job_text
from waiting import stop

import raynium.run.coordinator as coordinator_module
from raynium.checkpoint.catalog import list_checkpoints, open_checkpoint
from raynium.checkpoint.format.image import ImageFile, plan_image, write_image
from raynium.checkpoint.state import Chunk
from raynium.checkpoint.upload import upload_shard
from raynium.config.load import parse_config
from raynium.config.world import World
from raynium.errors import RunInUse, StoreError
from raynium.health.faults import Fault, classify
from raynium.rank.plan import RankPlan
from raynium.run import recovery
from raynium.run.coordinator import RunCoordinator
from raynium.run.fence import claim_key
from raynium.run.held_images import HeldImages
from raynium.run.leaps import LeftOut
from raynium.run.positions import RankPosition
from raynium.run.protocol import (
    AgentInfo,
    CannotGoOn,
    Commit,
    GoHome,
    Look,
    MaySend,
    NodeEnded,
    NodeLeaves,
    Order,
    Outcome,
    Progressed,
    RankExit,
    RanksSeen,
    RankTimes,
    Said,
    ShardFailed,
    ShardSaved,
    StacksTaken,
    StandBy,
    StepLeftOut,
    TimesSeen,
    Verdict,
)
from raynium.run.verdicts import failures as failures_module
from raynium.storage.process import Owner
from raynium.storage.store import Store
from raynium.tracking.ledger import Before, Ledger

JOB = job_text({"cluster.nodes": 2, "cluster.ranks_per_node": 1, "fault.max_restarts_without_progress": 1})

DIED = RankExit(1, -9, "killed by SIGKILL", retry=True, last_lines=("last words",))
BROKEN_PIPE = RankExit(0, 1, "RuntimeError: connection closed by peer", retry=True)
BAD_STEP = RankExit(0, 1, "BadStep: step 3: loss nan", retry=False)


def coordinator(folder: Path, **changes: Any) -> RunCoordinator:
    return RunCoordinator(
        parse_config(JOB, changes).model_dump(mode="json"), str(folder / "run"), last_generation=0, claim_number=1
    )


def agent(seat: int, attempt: str = "a", *, nodes: int = 2) -> AgentInfo:
    return AgentInfo(attempt, seat, nodes, f"127.0.0.{seat + 2}", 29500 + seat, pid=1)


ALONE = agent(0, nodes=1)
WORLD = World.of(parse_config(JOB))


def order_of(run: RunCoordinator, generation: int) -> Order:
    return run._lives._generations[generation].order


async def watch(run: RunCoordinator, generation: int = 1, *, stop_known: bool = False) -> Verdict:
    return await run.watch(agent(0), order_of(run, generation), stop_known=stop_known)


async def ended(run: RunCoordinator, generation: int, node_rank: int, exits: list[RankExit]) -> None:
    await run.exited(agent(node_rank), order_of(run, generation), NodeEnded(tuple(exits)))


async def report(run: RunCoordinator, step: int, metrics: dict[str, float]) -> None:
    newest = run._lives.newest
    assert newest is not None
    await run.tell(Progressed(newest.order.generation_id, step, metrics, Ledger()))


async def account(run: RunCoordinator, generation: int, ledger: Ledger) -> Ledger:
    id_ = order_of(run, generation).generation_id
    return (await run.tell(Progressed(id_, ledger.step, {"train/loss": 1.0}, ledger))).ledger


def test_a_generation_starts_when_every_node_is_there_and_all_get_the_same_rendezvous(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        first = asyncio.create_task(run.join(agent(1)))
        await asyncio.sleep(0.01)
        assert not first.done()
        second = await run.join(agent(0))
        assert await first == second
        assert (second.generation, second.resume_step, second.world) == (1, None, WORLD)
        assert (second.master_host, second.master_port) == ("127.0.0.2", 29500)

    asyncio.run(play())


def test_a_death_takes_every_node_to_the_next_generation_and_its_cause_is_told(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        watching = asyncio.create_task(watch(run))
        await ended(run, 1, 1, [DIED])
        verdict = await watching
        assert verdict.kind == "over" and "rank 1: killed by SIGKILL" in verdict.cause
        await ended(run, 1, 0, [BROKEN_PIPE])  # a consequence: neither counted nor told as a cause
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
        await ended(run, 1, 0, [BROKEN_PIPE, DIED])
        assert "SIGKILL" in (await watch(run)).cause

    asyncio.run(play())


def test_it_gives_up_after_failures_without_progress_and_says_so(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        for generation in (1, 2):
            await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
            await ended(run, generation, 1, [DIED])
        assert isinstance(await run.join(agent(0)), GoHome)
        status = await run.status(0)
        assert status.ended == "failed" and status.cause is not None
        assert "max_restarts_without_progress=1" in status.cause and "SIGKILL" in status.cause

    asyncio.run(play())


def test_a_step_that_leapt_is_left_out_by_all_generations_to_come_and_is_no_failure(tmp_path: Path) -> None:
    leapt = RankExit(1, 1, "Spike: step 7: loss 40", retry=True, error="Spike", undo=7)

    async def play() -> None:
        run = coordinator(tmp_path)
        for generation in (1, 2, 3):
            orders = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
            expected = {1: (), 2: (7,), 3: (7, 47)}[generation]
            assert [order.left_out for order in orders if isinstance(order, Order)] == [LeftOut(expected)] * 2
            await ended(run, generation, 1, [replace(leapt, undo=40 * generation - 33)])
        # Another life of the coordinator, or another driver, knows them from the run's store.
        other = coordinator(tmp_path)
        orders = await asyncio.gather(other.join(agent(0)), other.join(agent(1)))
        # The last one was told when nobody asked for another generation, and is found again when it leaps.
        assert [order.left_out for order in orders if isinstance(order, Order)] == [LeftOut((7, 47))] * 2

    asyncio.run(play())


def test_ranks_with_a_snapshot_do_not_wait_for_a_silent_store_to_know_what_leapt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leapt = RankExit(0, 1, "Spike: step 7: loss 40", retry=True, error="Spike", undo=7)
    answers = threading.Event()

    def silent(self: Store, key: str, content: bytes) -> None:
        answers.wait(60)
        raise StoreError("nobody is there")

    async def play() -> None:
        run = coordinator(tmp_path, **{"cluster.nodes": 1})
        order = await run.join(ALONE)
        assert isinstance(order, Order)
        await ended(run, 1, 0, [leapt])
        monkeypatch.setattr(recovery, "STORE_SECONDS", 0.05)
        monkeypatch.setattr(Store, "replace", silent)
        images = (HeldImages(order.generation_id, 2, (0,), order.world),)
        second = await run.join(replace(ALONE, last_generation=1, images=images))
        assert isinstance(second, Order) and (second.resume_step, second.left_out) == (2, LeftOut((7,)))
        told = [event.text for event in (await run.status(0)).events]
        assert "undone-steps.json, the steps that leapt, is not up to date: the store is silent" in told
        answers.set()

    asyncio.run(play())


def test_a_leap_that_comes_back_is_answered_from_an_older_checkpoint_without_the_steps_before_it(
    tmp_path: Path,
) -> None:
    """The newest one is set aside, and what its generation still uploads does not become one either."""
    store = Store(tmp_path / "run")
    for step in (40, 60, 70):
        save_checkpoint(store, [[Chunk.whole("w", torch.ones(4), saved_here=True)]], step=step)

    async def play() -> None:
        run = coordinator(tmp_path, **{"cluster.nodes": 1})
        orders = []
        for undo in (72, 80, 75, 300):
            generation = len(orders)
            order = await run.join(replace(ALONE, last_generation=generation))
            assert isinstance(order, Order)
            orders.append(order)
            exit = RankExit(0, 1, f"Spike: step {undo}: loss 40", retry=True, error="Spike", undo=undo)
            await ended(run, generation + 1, 0, [exit])
        assert [order.resume_step for order in orders] == [70, 70, 60, 60]
        assert orders[1].left_out == LeftOut((72,))
        assert orders[2].left_out == LeftOut((72, 80), tuple(each for each in range(62, 80) if each != 72))
        # The second time it would take a state before step 32, of which there is none.
        assert orders[3].left_out.undone == (72, 75, 80) and orders[3].left_out.suspected[0] == 32
        texts = [event.text for event in (await run.status(0)).events]
        assert any("step 70 was saved before a leap that came back: it is now" in text for text in texts)
        assert "there is no state of a step before 32, so the newest one is used again" in texts
        assert [each.step for each in list_checkpoints(store)] == [40, 60]
        shard = entry(store, tmp_path / "image", step=65, generation_id=orders[0].generation_id, rank=0)
        await run.tell(ShardSaved(65, 0, shard, 1.0, 60, orders[0].world))
        assert [each.step for each in list_checkpoints(store)] == [40, 60]

    asyncio.run(play())


def test_lost_nodes_are_counted_apart_from_failed_ranks_and_only_without_progress(tmp_path: Path) -> None:
    limits = {"fault.max_restarts_without_progress": 0, "fault.max_node_failures_without_progress": 2}

    async def play() -> None:
        run = coordinator(tmp_path, **limits)
        for number, attempt in enumerate("abcdef"):
            await run.agents_placed(attempt)
            await run.agents_placed(attempt)  # Ray repeats a call whose answer was lost
            order, _ = await asyncio.gather(run.join(agent(0, attempt)), run.join(agent(1, attempt)))
            assert isinstance(order, Order)
            if number in (1, 3, 5):  # else no third loss would be survived
                await save(run, tmp_path, order, 2 * number)
        await run.leave("g", "the run leaves this node", "agents")
        await run.agents_placed("on other nodes")
        await asyncio.gather(run.join(agent(0, "on other nodes")), run.join(agent(1, "on other nodes")))
        for attempt in ("p: whose agents die before they join", "q: likewise"):
            await run.agents_placed(attempt)
            assert (await run.status(0)).ended is None
        await run.agents_placed("r: once too often")
        status = await run.status(0)
        assert status.ended == "failed" and status.cause is not None
        assert "a node agent was lost. That is loss of a node agent number 3 without progress" in status.cause
        assert "fault.max_node_failures_without_progress=2" in status.cause

    asyncio.run(play())


def again(agent: AgentInfo, order: Order | StandBy | GoHome) -> AgentInfo:
    """The same one, which has run that."""
    assert isinstance(order, Order)
    return replace(agent, last_generation=order.generation)


def test_a_spare_takes_over_from_a_lost_agent_whose_replacement_is_the_next_spare(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        await run.agents_placed("a")
        first, _ = await asyncio.gather(run.join(agent(2)), run.join(agent(0)))
        assert isinstance(first, Order) and first.seats == (0, 2), "two of three"
        assert await run.join(agent(1)) == StandBy(1)
        spare = asyncio.create_task(run.join(again(agent(1), first)))
        watching = asyncio.create_task(run.watch(agent(0), first, stop_known=False))
        await asyncio.sleep(0)
        await run.agents_lost("a", {2: 0})
        assert await watching == Verdict("over", "the node agent of 127.0.0.4 was lost")
        second = await run.join(again(agent(0), first))
        assert await spare == second and isinstance(second, Order) and second.seats == (0, 1)
        # The lost one was only cut off, and comes back.
        assert isinstance(await run.join(again(agent(2), first)), GoHome)
        await run.agents_placed("a", {2: 1})
        assert await run.join(replace(agent(2), incarnation=1)) == StandBy(2)
        next_spare = asyncio.create_task(run.join(replace(agent(2), incarnation=1, last_generation=2)))
        await asyncio.sleep(0.01)
        status = await run.status(0)
        assert not next_spare.done() and (status.generation, status.has_spares) == (2, True)
        assert [each.what for each in status.incidents] == ["agents"]
        await stop(run)
        for rank in (0, 1):
            await run.exited(agent(rank), second, NodeEnded())
        next_spare.cancel()

    asyncio.run(play())


def test_a_coordinator_that_was_started_again_finds_ranks_beside_a_spare_that_stands_by(tmp_path: Path) -> None:
    async def play() -> None:
        before = coordinator(tmp_path)
        first, _ = await asyncio.gather(before.join(agent(0)), before.join(agent(2)))
        run = coordinator(tmp_path)
        spare = asyncio.create_task(run.join(again(agent(1), first)))
        await asyncio.sleep(0)
        assert isinstance(first, Order)
        watching = asyncio.create_task(run.watch(agent(0), first, stop_known=False))
        await asyncio.sleep(0.01)
        assert not watching.done() and (await run.status(0)).generation == 1
        # Whoever replaces the other agent has no part in what runs: all begin anew.
        third = asyncio.create_task(run.join(replace(agent(2), incarnation=1)))
        run._lives._generations[1].agents[1] = agent(2)
        await asyncio.sleep(0)
        third.cancel()
        fourth = asyncio.create_task(run.join(replace(agent(2), incarnation=2)))
        assert (await watching).kind == "over"
        fourth.cancel()
        spare.cancel()

    asyncio.run(play())


def test_a_run_goes_on_on_fewer_nodes_and_grows_at_a_checkpoint_once_one_is_back(tmp_path: Path) -> None:
    changes = {"cluster.min_nodes": 1, "fault.replace_seconds": 0.05}

    async def play() -> None:
        run = coordinator(tmp_path, **changes)
        first, _ = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        assert isinstance(first, Order) and first.world.nodes == 2
        await save(run, tmp_path, first, 2)
        # Nobody tells of the death; the other's ranks have missed their peer.
        await run.exited(agent(0), first, NodeEnded((replace(BROKEN_PIPE, rank=0),)))
        joining = asyncio.create_task(run.join(again(agent(0), first)))
        await asyncio.sleep(0.01)
        began = time.monotonic()
        await run.agents_lost("a", {1: 0})
        second = await joining
        assert isinstance(second, Order) and time.monotonic() - began >= 0.05
        told = [event.text for event in (await run.status(0)).events]
        assert "the node agent of 127.0.0.3 was lost" in told, "what rank 0 has said is only that it missed another"
        assert (second.world.nodes, second.world.num_micro_batches, second.resume_step) == (1, 4, 2)
        watching = asyncio.create_task(run.watch(again(agent(0), first), second, stop_known=False))
        replacement = replace(agent(1), incarnation=1)
        assert await run.join(replacement) == StandBy(2, resume_step=2)
        comes_back = asyncio.create_task(run.join(again(replacement, second)))
        assert (await watching).kind == "stop", "it saves first: nothing is taken twice"
        await save(run, tmp_path, second, 4)
        stopped = RankExit(0, 0, None, retry=False, outcome=Outcome(4, "stopped"))
        await run.exited(again(agent(0), first), second, NodeEnded((stopped,)))
        third = await run.join(again(agent(0), second))
        assert await comes_back == third and isinstance(third, Order)
        assert (third.world, third.seats, third.resume_step) == (first.world, (0, 1), 4)
        assert (await run.status(0)).ended is None

    asyncio.run(play())


def test_cores_that_a_killed_rank_still_holds_are_waited_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures_module, "CORES_PAUSE_SECONDS", 0.05)
    fault = classify(["NRT:nrt_init Logical Neuron Core(s) not available - Requested:1 Available:0"], [])
    taken = RankExit(0, 1, str(fault), retry=True, fault=fault)

    async def play() -> None:
        run = coordinator(tmp_path, **{"cluster.nodes": 1})
        order = await run.join(ALONE)
        await save(run, tmp_path, order, 2)
        await report(run, 4, {"train/loss": 3.0})
        await ended(run, 1, 0, [replace(DIED, rank=0)])
        images = replace(ALONE, images=(HeldImages(order.generation_id, 2, (0,), order.world),))
        for generation in range(2, 7):
            assert (await run.join(images)).resume_images is not None, "the snapshot in memory is not to blame"
            failed = time.monotonic()
            await ended(run, generation, 0, [taken])
        assert (await run.join(images)).generation == 7 and time.monotonic() - failed >= 0.05
        monkeypatch.setattr(failures_module, "CORES_RETURN_SECONDS", 0.0)
        await ended(run, 7, 0, [taken])
        assert isinstance(await run.join(images), GoHome)
        assert "max_restarts_without_progress=1" in str((await run.status(0)).cause)

    asyncio.run(play())


def test_what_would_happen_again_is_not_tried_again(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        await ended(run, 1, 0, [BAD_STEP])
        assert isinstance(await run.join(agent(0)), GoHome)
        assert (await run.status(0)).cause == "rank 0: BadStep: step 3: loss nan"

    asyncio.run(play())


def test_a_new_worker_group_ends_the_old_generation_and_sends_old_agents_home(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        watching = asyncio.create_task(watch(run))
        ready_again = replace(agent(1), last_generation=1)
        zombie = asyncio.create_task(run.join(ready_again))  # of the old group
        await asyncio.sleep(0.01)
        orders = await asyncio.gather(run.join(agent(0, "b")), run.join(agent(1, "b")))
        assert (await watching).kind == "over"
        assert isinstance(await zombie, GoHome)
        assert {order.generation for order in orders} == {2}

    asyncio.run(play())


def test_a_stop_reaches_running_ranks_once_and_ends_a_run_that_has_none(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        await stop(run)
        assert (await watch(run)).kind == "stop"
        again = asyncio.create_task(watch(run, stop_known=True))
        await asyncio.sleep(0.01)
        assert not again.done()
        await ended(run, 1, 1, [DIED])  # killed while it was saving: the user wanted the end, not another generation
        assert (await again).kind == "over"
        assert (await run.status(0)).ended == "stopped"

        idle = coordinator(tmp_path)
        await idle.request_stop("another life, since dead")
        assert (await idle.status(0)).ended is None, "it may not know yet of ranks that run"
        await stop(idle)
        assert isinstance(await idle.join(agent(0)), GoHome)

    asyncio.run(play())


def test_why_a_run_finished_before_its_last_step_is_in_its_status(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        order, _ = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        await save(run, tmp_path, order, 2)
        early = Outcome(2, "finished", "ended early at step 2")
        for rank in (0, 1):
            await ended(run, 1, rank, [RankExit(rank, 0, None, retry=False, outcome=early)])
        status = await run.status(0)
        assert (status.ended, status.step, status.cause) == ("finished", 2, "ended early at step 2")

    asyncio.run(play())


def test_reaching_the_end_without_a_committed_checkpoint_is_a_failure(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path, **{"cluster.nodes": 1})
        await run.join(ALONE)
        await run.tell(ShardFailed(4, 0, "disk full"))
        await ended(run, 1, 0, [RankExit(0, 0, None, retry=False, outcome=Outcome(4, "finished"))])
        status = await run.status(0)
        assert status.ended == "failed" and "training reached step 4, but its checkpoint" in (status.cause or "")
        assert "rank 0's shard could not be uploaded: disk full" in (status.cause or "")
        assert any("disk full" in event.text for event in status.events)

    asyncio.run(play())


def test_a_coordinator_that_was_started_again_keeps_a_healthy_generation(tmp_path: Path) -> None:
    async def play() -> None:
        dead = coordinator(tmp_path)
        order, _ = await asyncio.gather(dead.join(agent(0)), dead.join(agent(1)))
        await report(dead, 3, {"train/loss": 3.0})
        run = coordinator(tmp_path)
        # Ray makes the calls again that had no answer.
        watching = [asyncio.create_task(run.watch(agent(rank), order, stop_known=False)) for rank in (0, 1)]
        await asyncio.sleep(0.01)
        assert not any(each.done() for each in watching)
        status = await run.status(0)
        assert (status.generation, status.running, len(status.agents)) == (1, True, 2)
        assert "the run coordinator was started again and found generation 1" in [each.text for each in status.events]
        await report(run, 4, {"train/loss": 2.0})
        assert (await run.status(0)).step == 4
        await save(run, tmp_path, order, 4)
        done = RankExit(0, 0, None, retry=False, outcome=Outcome(4, "finished"))
        await asyncio.gather(*(run.exited(agent(rank), order, NodeEnded((done,))) for rank in (0, 1)))
        assert (await run.status(0)).ended == "finished"
        assert {(await each).kind for each in watching} == {"over"}

    asyncio.run(play())


def test_a_generation_that_ended_while_no_coordinator_lived_is_not_taken_for_running(tmp_path: Path) -> None:
    async def play(*, joins_first: bool) -> None:
        dead, run = coordinator(tmp_path), coordinator(tmp_path)
        order, _ = await asyncio.gather(dead.join(agent(0)), dead.join(agent(1)))
        through = replace(agent(1), last_generation=1)  # its ranks' end was heard by the one that is dead
        calls = [lambda: run.join(through), lambda: run.watch(agent(0), order, stop_known=False)]
        tasks = []
        for call in calls if joins_first else reversed(calls):
            tasks.append(asyncio.create_task(call()))
            await asyncio.sleep(0.01)
        verdict = await (tasks[1] if joins_first else tasks[0])
        assert verdict.kind == "over"
        await run.join(replace(agent(0), last_generation=1))
        assert (await run.status(0)).generation == 2

    asyncio.run(play(joins_first=True))
    asyncio.run(play(joins_first=False))


def test_ranks_that_end_before_their_generation_is_known_again_are_heard(tmp_path: Path) -> None:
    async def play() -> None:
        dead, run = coordinator(tmp_path), coordinator(tmp_path)
        order, _ = await asyncio.gather(dead.join(agent(0)), dead.join(agent(1)))
        await run.exited(agent(1), order, NodeEnded((DIED,)))
        verdict = await run.watch(agent(0), order, stop_known=False)
        assert verdict.kind == "over" and "killed by SIGKILL" in verdict.cause

    asyncio.run(play())


def test_an_agent_that_waits_for_an_order_gets_the_one_that_others_already_run(tmp_path: Path) -> None:
    async def play() -> None:
        dead, run = coordinator(tmp_path), coordinator(tmp_path)
        order, _ = await asyncio.gather(dead.join(agent(0)), dead.join(agent(1)))
        waiting = asyncio.create_task(run.join(agent(1)))
        await asyncio.sleep(0.01)
        watching = asyncio.create_task(run.watch(agent(0), order, stop_known=False))
        assert await asyncio.wait_for(waiting, 60) == order
        await run.exited(agent(0), order, NodeEnded((replace(DIED, rank=0),)))
        assert (await watching).kind == "over"
        again = asyncio.create_task(run.join(replace(agent(0), last_generation=1)))
        await asyncio.sleep(0.05)
        assert not again.done(), "the other one has not joined yet"
        await run.join(replace(agent(1), last_generation=1))
        assert (await again).generation == 2

    asyncio.run(play())


def test_one_agent_that_was_cut_off_does_not_send_a_new_attempt_home(tmp_path: Path) -> None:
    async def play() -> None:
        dead, run = coordinator(tmp_path), coordinator(tmp_path)
        order, _ = await asyncio.gather(dead.join(agent(0)), dead.join(agent(1)))
        first = asyncio.create_task(run.join(agent(0, "b")))
        await asyncio.sleep(0.01)
        assert (await run.watch(agent(1), order, stop_known=False)).kind == "over"
        orders = await asyncio.gather(first, run.join(agent(1, "b")))
        assert all(isinstance(each, Order) for each in orders)

    asyncio.run(play())


def test_a_last_save_that_this_coordinator_did_not_hear_of_is_told_again_and_not_lost(tmp_path: Path) -> None:
    async def play() -> None:
        dead, run = coordinator(tmp_path), coordinator(tmp_path)
        order, _ = await asyncio.gather(dead.join(agent(0)), dead.join(agent(1)))
        done = NodeEnded((RankExit(0, 0, None, retry=False, outcome=Outcome(4, "finished")),))
        for rank in (0, 1):
            await run.exited(agent(rank), order, done)
        assert (await run.status(0)).ended is None
        images = [HeldImages(order.generation_id, 4, (rank,), order.world) for rank in (0, 1)]
        joining = (replace(agent(rank), images=(images[rank],), last_generation=1) for rank in (0, 1))
        again, _ = await asyncio.gather(*(run.join(each) for each in joining))
        assert again.resume_images is not None and again.resume_step == 4
        await save(run, tmp_path, again, 4)
        for rank in (0, 1):
            await run.exited(agent(rank), again, done)
        assert (await run.status(0)).ended == "finished"

    asyncio.run(play())


def test_a_run_that_has_ended_books_its_end_and_hears_of_no_failure(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        await account(run, 1, Ledger(train=1e-9, step=3))
        await run.tell(CannotGoOn("the disk of node 1 is gone"))
        assert not (await run.status(0)).running
        await ended(run, 1, 0, [DIED])
        home = await run.join(replace(agent(0), last_generation=1))
        assert isinstance(home, GoHome) and home.ledger.restart == 0 and home.ledger.finish > 0
        assert not [each for each in (await run.status(0)).events if "failed" in each.text]

    asyncio.run(play())


def test_a_late_word_of_an_earlier_generation_moves_nothing(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        first, _ = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        await ended(run, 1, 1, [DIED])
        await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        await run.tell(Progressed(first.generation_id, 9, {"train/loss": 1.0}, Ledger()))
        status = await run.status(0)
        assert status.step == 0 and status.metrics == {}

    asyncio.run(play())


def test_nobody_is_waited_for_where_all_nodes_have_spoken(tmp_path: Path) -> None:
    missed = replace(BROKEN_PIPE, fault=Fault("peer-lost", "a rank was gone", "restart", "peer"))

    async def play() -> None:
        run = coordinator(tmp_path, **{"cluster.nodes": 1})
        await run.join(ALONE)
        coordinator_module.protocol.PEER_WORD_SECONDS = 3600
        await asyncio.wait_for(ended(run, 1, 0, [missed]), 60)

    try:
        asyncio.run(play())
    finally:
        coordinator_module.protocol.PEER_WORD_SECONDS = 0.5


def test_agents_of_an_attempt_that_is_gone_bring_no_generation_back(tmp_path: Path) -> None:
    async def play() -> None:
        dead, run = coordinator(tmp_path), coordinator(tmp_path)
        order, _ = await asyncio.gather(dead.join(agent(0)), dead.join(agent(1)))
        await asyncio.gather(*(run.join(replace(agent(rank, "b"), last_generation=1)) for rank in (0, 1)))
        assert (await run.watch(agent(0), order, stop_known=False)).kind == "over"
        assert (await run.status(0)).generation == 2

    asyncio.run(play())


def test_a_peer_that_was_missed_is_not_blamed_before_its_own_node_has_spoken(tmp_path: Path) -> None:
    missed = replace(BROKEN_PIPE, fault=Fault("peer-lost", "a rank was gone", "restart", "peer"))
    index_error = RankExit(1, 1, "IndexError: list index out of range", retry=True, error="IndexError")

    async def play() -> None:
        run = coordinator(tmp_path)
        await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        first = asyncio.create_task(ended(run, 1, 0, [missed]))
        await asyncio.sleep(0.01)
        assert not first.done()
        await ended(run, 1, 1, [index_error])
        await first
        assert (await watch(run)).cause == "rank 1: IndexError: list index out of range"

        # Where nobody else speaks, what is known is told.
        await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        await ended(run, 2, 0, [missed])
        assert (await watch(run, 2)).cause == f"rank 0: {BROKEN_PIPE.cause}"

    asyncio.run(play())


def test_a_generation_is_judged_by_the_newest_step_that_its_agents_know_of(tmp_path: Path) -> None:
    """It went on from 50 and died after 57, before anything of it was told: the snapshot was good."""
    bug = RankExit(0, 1, "IndexError: index 57 is out of range", retry=True, error="IndexError")

    async def play() -> None:
        run = coordinator(tmp_path, **{"cluster.nodes": 1, "fault.max_restarts_without_progress": 9})
        order = await run.join(ALONE)
        assert isinstance(order, Order)
        images = (HeldImages("g0", 50, (0,), order.world),)
        await run.exited(ALONE, order, NodeEnded((replace(DIED, rank=0),), step=0))
        for generation, step in ((2, 57), (3, 57), (4, 58)):
            order = await run.join(replace(ALONE, last_generation=generation - 1, images=images))
            assert isinstance(order, Order) and order.resume_step == 50
            await run.exited(ALONE, order, NodeEnded((replace(DIED, rank=0),), step=step))
        pause = run._lives.not_before - time.monotonic()
        status = await run.status(0)
        assert status.step == 58 and pause <= 0, "the last one got farther than the one before"
        assert [(each.step, each.steps) for each in status.incidents] == [(0, 0), (57, 7), (57, 7), (58, 0)]
        assert [each.seconds is None for each in status.incidents] == [False, False, False, True]
        for generation in (5, 6):
            order = await run.join(replace(ALONE, last_generation=generation - 1, images=images))
            assert isinstance(order, Order) and order.resume_step == 50
            await run.exited(ALONE, order, NodeEnded((bug,), step=58))
        assert "at the same place (after step 58)" in str((await run.status(0)).cause)

    asyncio.run(play())


def test_a_run_gets_on_through_snapshots_in_memory_between_rare_checkpoints_or_none(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path, **{"cluster.nodes": 1, "fault.max_restarts_without_progress": 1})
        images: tuple[HeldImages, ...] = ()
        for generation, step in enumerate((12, 22, 32, 42, 52, 54), start=1):
            order = await run.join(replace(ALONE, last_generation=generation - 1, images=images))
            assert isinstance(order, Order) and order.resume_images == (images[0] if images else None)
            await run.exited(ALONE, order, NodeEnded((replace(DIED, rank=0),), step=step))
            images = (HeldImages(order.generation_id, step // 10 * 10, (0,), order.world),)
        # The last two began from 40 and 50, and the next would from 50 again.
        order = await run.join(replace(ALONE, last_generation=6, images=images))
        assert isinstance(order, Order) and (await run.status(0)).ended is None
        await run.exited(ALONE, order, NodeEnded((replace(DIED, rank=0),), step=54))
        assert "failure number 2 without progress" in str((await run.status(0)).cause)

    asyncio.run(play())


def test_a_snapshot_whose_ranks_made_no_step_is_not_tried_again(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path, **{"cluster.nodes": 1, "fault.max_restarts_without_progress": 9})
        order = await run.join(ALONE)
        assert isinstance(order, Order)
        await run.exited(ALONE, order, NodeEnded((replace(DIED, rank=0),)))
        images = (HeldImages("g0", 40, (0,), order.world), HeldImages("g0", 50, (0,), order.world))
        for generation, origin in ((2, 50), (3, 40)):
            order = await run.join(replace(ALONE, last_generation=generation - 1, images=images))
            assert isinstance(order, Order) and order.resume_step == origin
            await run.exited(ALONE, order, NodeEnded((replace(DIED, rank=0),), step=origin))

    asyncio.run(play())


def test_generations_of_different_node_counts_get_the_right_worlds(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path, **{"fault.max_restarts_without_progress": 9})
        first, _ = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        assert isinstance(first, Order)
        assert (first.world.size, first.world.data, first.world.num_micro_batches) == (2, 2, 2)
        await save(run, tmp_path, first, 2)
        images = [HeldImages(first.generation_id, 3, (rank,), first.world) for rank in (0, 1)]

        # A worker group of one node takes over: it holds images of another world, so the checkpoint is its origin.
        alone = replace(agent(0, "b", nodes=1), images=(replace(images[0], ranks=(0,)),), last_generation=1)
        second = await run.join(alone)
        assert isinstance(second, Order) and second.resume_step == 2 and second.resume_images is None
        assert (second.world.nodes, second.world.size, second.world.data, second.world.num_micro_batches) == (
            1,
            1,
            1,
            4,
        )
        shard = entry(Store(tmp_path / "run"), tmp_path / "whole", step=4, generation_id=second.generation_id, rank=0)
        await run.tell(ShardSaved(4, 0, shard, 1.0, 2, second.world))
        plans = [RankPlan(parse_config(JOB), each.world, "run", None, "data", "images") for each in (first, second)]
        assert [RankPlan.from_json(plan.to_json()) for plan in plans] == plans

        # Three nodes cannot share four samples of micro-batches of one.
        three = [run.join(replace(agent(rank, "c", nodes=3), last_generation=2)) for rank in range(3)]
        assert all(isinstance(answer, GoHome) for answer in await asyncio.gather(*three))
        assert "train.global_batch_size 4 is no multiple of 3" in str((await run.status(0)).cause)

    asyncio.run(play())


def test_a_stop_that_ranks_do_not_follow_ends_the_run_after_a_while(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path, **{"fault.stop_seconds": 0.05})
        await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        await stop(run)
        assert (await asyncio.wait_for(watch(run, stop_known=True), 60)).kind == "over"
        status = await run.status(0)
        assert status.ended == "stopped" and any("fault.stop_seconds" in each.text for each in status.events)
        assert isinstance(await run.join(replace(agent(0), last_generation=1)), GoHome)

    asyncio.run(play())


def test_a_coordinator_that_was_started_again_is_known_by_its_life_and_counts_on(tmp_path: Path) -> None:
    async def play() -> None:
        dead, run = coordinator(tmp_path), coordinator(tmp_path)
        assert (await dead.status(0)).ledger.life != (await run.status(0)).ledger.life
        joining = run.join(replace(agent(0), last_generation=5)), run.join(agent(1))
        assert {order.generation for order in await asyncio.gather(*joining)} == {6}

    asyncio.run(play())


def test_an_unreadable_store_ends_the_run_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").write_text("a file where the run's folder should be")
    monkeypatch.setattr(coordinator_module, "pause_before_next_try", lambda tries, waited: 0.01 if tries < 3 else None)

    async def play() -> None:
        run = coordinator(tmp_path, **{"cluster.nodes": 1})
        assert isinstance(await run.join(ALONE), GoHome)
        status = await run.status(0)
        assert status.ended == "failed" and "no checkpoint could be chosen" in (status.cause or "")
        assert [event.text.count("trying again") for event in status.events] == [1, 1]

    asyncio.run(play())


@pytest.mark.parametrize("meanwhile", ["the store is back", "stop", "new attempt"])
def test_a_store_that_does_not_answer_when_a_generation_is_ordered_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    away = tmp_path / "run"
    away.write_text("in the folder's place")
    pause = 0.02 if meanwhile == "the store is back" else 3600.0
    monkeypatch.setattr(coordinator_module, "pause_before_next_try", lambda tries, waited: pause)

    async def play() -> None:
        run = coordinator(tmp_path, **{"cluster.nodes": 1})
        joining = asyncio.create_task(run.join(ALONE))
        while not (await run.status(0)).events:
            await asyncio.sleep(0.01)
        if meanwhile == "stop":
            await stop(run)
            assert (await run.status(0)).ended == "stopped"
        else:
            away.unlink()
        if meanwhile == "new attempt":
            assert (await run.join(agent(0, "b", nodes=1))).generation == 1
        order = await asyncio.wait_for(joining, 60)
        assert isinstance(order, Order if meanwhile == "the store is back" else GoHome)

    asyncio.run(play())


def test_an_order_whose_answer_was_lost_is_given_again(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        orders = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        assert await asyncio.wait_for(run.join(agent(0)), 60) == orders[0]
        first_through = asyncio.create_task(run.join(replace(agent(1), last_generation=1)))  # node 0 still saves
        await asyncio.sleep(0.01)
        assert not first_through.done()
        await run.tell(CannotGoOn("the test is over"))
        assert isinstance(await first_through, GoHome)

    asyncio.run(play())


def test_an_agent_that_ray_took_for_dead_does_not_come_back(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        waiting = asyncio.create_task(run.join(agent(0, "b")))
        await asyncio.sleep(0.01)
        assert isinstance(await run.join(replace(agent(1), last_generation=1)), GoHome)  # its node was cut off
        orders = await asyncio.gather(waiting, run.join(agent(1, "b")))
        assert {order.generation for order in orders} == {2}

    asyncio.run(play())


def test_failed_generations_leave_little_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raynium.run.verdicts.patience.LONGEST_PAUSE_SECONDS", 0.0)

    async def play() -> None:
        run = coordinator(tmp_path, **{"cluster.nodes": 1, "fault.max_restarts_without_progress": 99})
        for generation in range(1, 31):
            last_words = replace(DIED, rank=0, last_lines=(f"{generation}" * 10_000,))
            await run.join(replace(ALONE, last_generation=generation - 1))
            await ended(run, generation, 0, [last_words] * 2)
        assert len(pickle.dumps(run._lives._generations)) < 100_000

    asyncio.run(play())


@pytest.mark.parametrize("events_after, expected", [(0, ["one", "two"]), (1, ["two"]), (2, [])])
def test_events_are_told_once(tmp_path: Path, events_after: int, expected: list[str]) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        await run.tell(Said("one"))
        await run.tell(Said("two"))
        assert [event.text for event in (await run.status(events_after)).events] == expected

    asyncio.run(play())


def test_a_step_that_was_left_out_is_told_and_is_an_incident_that_cost_nothing(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        await run.tell(StepLeftOut(7, "loss nan: not finite"))
        status = await run.status(0)
        assert [event.text for event in status.events] == ["BAD STEP 7: loss nan: not finite"]
        (seen,) = status.incidents
        assert (seen.what, seen.step, seen.cause, seen.seconds) == ("step", 7, "loss nan: not finite", 0.0)

    asyncio.run(play())


def test_bad_steps_close_together_are_one_incident_and_a_replay_of_them_or_what_the_config_left_out_is_none(
    tmp_path: Path,
) -> None:
    async def play() -> None:
        run = coordinator(tmp_path, **{"data.leave_out_steps": [3]})
        for step in (3, 7, 8, 20, 7, 8, 20, 3, 60):
            await run.tell(StepLeftOut(step, f"loss nan in {step}"))
        status = await run.status(0)
        assert len(status.events) == 9, "the log says each"
        assert [(each.step, each.cause, each.seconds) for each in status.incidents] == [
            (20, "loss nan in 7 (the first of 3 bad steps up to step 20)", 0.0),
            (60, "loss nan in 60", 0.0),
        ]
        # A coordinator that was started again finds what it sees in a replay under the same keys.
        other = coordinator(tmp_path)
        await other.tell(StepLeftOut(7, "loss nan in 7"))
        assert [each.key for each in (await other.status(0)).incidents] == [status.incidents[0].key]

    asyncio.run(play())


@pytest.mark.parametrize("tells", ["before the ranks end", "after they have", "never"])
def test_leaps_of_one_burst_and_their_replays_are_one_incident_and_push_no_other_out(
    tmp_path: Path, tells: str
) -> None:
    def leapt(step: int) -> RankExit:
        return RankExit(1, 1, f"Spike: step {step}: loss 40", retry=True, error="Spike", undo=step)

    async def play() -> None:
        run = coordinator(tmp_path)
        await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        await ended(run, 1, 1, [DIED])
        for generation, step in ((2, 202), (3, 205), (4, 207)):
            order, _ = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
            assert isinstance(order, Order)
            await report(run, step - 1, {"train/loss": 2.0})
            for known in (*order.left_out.undone, *order.left_out.suspected):
                await run.tell(StepLeftOut(known, "left out"))
            if tells == "before the ranks end":
                await run.tell(StepLeftOut(step, f"rank 1: Spike: step {step}: loss 40"))
            await ended(run, generation, 1, [leapt(step)])
            if tells == "after they have":
                await run.tell(StepLeftOut(step, "loss 40"))
        assert order.left_out.suspected, "the leap has come back"
        lasts = (await run.status(0)).incidents[-1]
        assert lasts.seconds is None
        await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        await report(run, 1, {"train/loss": 2.0})
        killed, burst = (await run.status(0)).incidents
        assert (killed.what, burst.what, burst.key, burst.where) == ("ranks", "step", lasts.key, "")
        assert burst.cause == "rank 1: Spike: step 202: loss 40 (the first of 3 bad steps up to step 207)"
        assert burst.seconds is not None and burst.seconds > 0 and burst.steps == 201 + 204 + 206

    asyncio.run(play())


def test_what_breaks_beside_the_ranks_and_a_checkpoint_that_is_refused_are_incidents(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        await run.tell(Said("the uploader died (exit code -9)", "uploader", "10.0.0.3"))
        for rank in (0, 1):
            await run.tell(ShardFailed(8, rank, "AccessDenied"))
        seen = (await run.status(0)).incidents
        assert [(each.what, each.where, each.step, each.seconds) for each in seen] == [
            ("uploader", "10.0.0.3", 0, 0.0),
            ("checkpoint", "", 8, 0.0),
        ]
        assert seen[0].cause == "the uploader died (exit code -9)" and "AccessDenied" in seen[1].cause

    asyncio.run(play())


# ---- checkpoints --------------------------------------------------------------------------------------------------


def entry(store: Store, image: Path, *, step: int, generation_id: str, rank: int, ranks: int = 2) -> str:
    """A rank's uploaded shard, as its agent reports it: the ranks hold a part each of one tensor."""
    size = 4 // ranks
    chunks = [Chunk("model/w", (4,), (size * rank,), torch.full((size,), float(10 * step + rank)), saved_here=True)]
    plan = plan_image(chunks)
    with ImageFile(image) as file:
        write_image(plan, chunks, file.reserve(plan.size), step=step)
        info = plan.info(step=step, path=image, stall_seconds=0.5 + rank)
        return upload_shard(store, info, generation=generation_id, rank=rank).to_json()


async def save(run: RunCoordinator, folder: Path, order: Order, step: int) -> None:
    for rank in range(order.world.size):
        shard = entry(
            Store(folder / "run"),
            folder / f"image-{rank}",
            step=step,
            generation_id=order.generation_id,
            rank=rank,
            ranks=order.world.size,
        )
        await run.tell(ShardSaved(step, rank, shard, 3.0 + rank, order.resume_step, order.world))


def holding(node_rank: int, *images: HeldImages) -> AgentInfo:
    return replace(agent(node_rank), images=images)


def take_over(folder: Path) -> None:
    """Another driver claims the run."""
    Store(folder / "run").write_new(claim_key(2), json.dumps(asdict(Owner("elsewhere", "boot", 7, "7"))).encode())


def test_a_coordinator_whose_run_was_taken_over_commits_nothing_and_ends(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        order, _ = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        await save(run, tmp_path, order, 2)
        take_over(tmp_path)
        watching = asyncio.create_task(watch(run))
        await save(run, tmp_path, order, 3)
        assert (await watching).kind == "over"
        assert [each.step for each in list_checkpoints(Store(tmp_path / "run"))] == [2]
        status = await run.status(0)
        assert status.ended == "failed" and status.cause is not None
        assert status.cause.startswith("the run at file://") and "taken over by process 7 on elsewhere" in status.cause

    asyncio.run(play())


def test_a_coordinator_whose_run_was_taken_over_commits_no_last_checkpoint_either(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        order, _ = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "write_new", refused)
            await save(run, tmp_path, order, 4)
        take_over(tmp_path)
        exits = [RankExit(rank, 0, None, retry=False, outcome=Outcome(4, "finished")) for rank in (0, 1)]
        await asyncio.gather(*(ended(run, 1, rank, [each]) for rank, each in enumerate(exits)))
        status = await run.status(0)
        assert status.ended == "failed" and "taken over by process 7 on elsewhere" in (status.cause or "")
        assert list_checkpoints(Store(tmp_path / "run")) == []

    asyncio.run(play())


def refused(self: Store, key: str, data: bytes) -> None:
    raise StoreError(f"{key}: expired")


def test_a_coordinator_whose_run_was_taken_over_orders_no_generation(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        take_over(tmp_path)
        answers = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        assert all(isinstance(each, GoHome) for each in answers)
        assert "taken over by process 7 on elsewhere" in ((await run.status(0)).cause or "")

    asyncio.run(play())


def test_a_commit_that_finds_the_run_taken_over_while_a_generation_is_ordered_ends_the_run(tmp_path: Path) -> None:
    calls, may_end = list[None](), threading.Event()

    def check() -> None:
        calls.append(None)
        if len(calls) == 1:
            assert may_end.wait(60)
            raise RunInUse("taken over by process 7")

    async def play() -> None:
        run = coordinator(tmp_path, **{"fault.max_restarts_without_progress": 9})
        order, _ = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run._fence, "check", check)
            saving = asyncio.create_task(save(run, tmp_path, order, 2))
            while not calls:
                await asyncio.sleep(0.01)
            await ended(run, 1, 0, [DIED])
            joining = [asyncio.create_task(run.join(agent(seat))) for seat in (0, 1)]
            while not run._recovery.choosing._waiters:
                await asyncio.sleep(0.01)
            may_end.set()
            await saving
            await asyncio.gather(*joining)
        status = await run.status(0)
        assert (status.ended, status.cause) == ("failed", "taken over by process 7")

    asyncio.run(asyncio.wait_for(play(), 60))


def test_a_late_commit_does_not_delete_the_checkpoint_that_new_ranks_read(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path, **{"checkpoint.keep_last": 1, "fault.max_restarts_without_progress": 9})
        first, _ = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        await save(run, tmp_path, first, 2)
        await ended(run, 1, 0, [DIED])
        second, _ = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        assert second.resume_step == 2
        await save(run, tmp_path, first, 3)  # its last shard was still on its way
        assert [each.step for each in list_checkpoints(Store(tmp_path / "run"))] == [2, 3]
        await report(run, 3, {"train/loss": 3.0})
        await save(run, tmp_path, second, 4)
        assert [each.step for each in list_checkpoints(Store(tmp_path / "run"))] == [4]

    asyncio.run(play())


def test_a_commit_is_told_with_what_it_cost_and_keeps_the_metrics_of_its_step(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        order, _ = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        await report(run, 2, {"train/loss": 3.0, "eval/loss": 2.5})
        following = asyncio.create_task(run.commits(None))
        await save(run, tmp_path, order, 2)
        [commit] = await following or []
        assert (commit.number, commit.step) == (1, 2)
        assert commit.metrics["checkpoint/longest_stall_seconds"] == 1.5
        assert commit.metrics["checkpoint/upload_seconds"] == 4.0
        manifest = open_checkpoint(Store(tmp_path / "run"), 2).manifest
        assert commit.metrics["checkpoint/bytes"] == manifest.num_bytes
        assert manifest.metrics == {"eval/loss": 2.5}
        assert manifest.timing is not None and manifest.timing.stall_seconds == 1.5
        await save(run, tmp_path, order, 4)
        [again] = await run.commits(commit) or []
        assert [each["step"] for each in json.loads(again.checkpoints)] == [2, 4]
        assert open_checkpoint(Store(tmp_path / "run"), 4).manifest.metrics == {}
        assert [commit.step for commit in await run.commits(None) or []] == [4], (
            "a new agent sends only what none has sent"
        )
        await run.tell(CannotGoOn("enough"))
        assert await run.commits(again) is None

    asyncio.run(play())


def test_commits_after_the_coordinator_was_started_again_are_told_too(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        orders = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        asked = asyncio.create_task(
            run.commits(Commit("of a coordinator that died", 5, 2, {}, ""))
        )  # the agent has five of the coordinator that died
        await asyncio.sleep(0.01)
        await save(run, tmp_path, orders[0], 2)
        told = await asyncio.wait_for(asked, 60)
        assert told is not None and [commit.step for commit in told] == [2], "the dead one's number says nothing here"
        assert told[-1].number == 1

    asyncio.run(play())


def test_the_newest_snapshot_that_every_rank_has_in_memory_comes_before_the_store(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path, **{"fault.max_restarts_without_progress": 9})
        order, _ = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        await save(run, tmp_path, order, 2)
        await report(run, 4, {"train/loss": 3.0})
        await ended(run, 1, 0, [DIED])
        id_ = order.generation_id
        older, newer = HeldImages(id_, 2, (0,), WORLD), HeldImages(id_, 3, (0,), WORLD)
        first, second = await asyncio.gather(
            run.join(holding(0, older, newer)),
            run.join(holding(1, replace(older, ranks=(1,)))),
        )
        assert first == second and first.resume_step == 2, "rank 1 has no snapshot of step 3"
        assert first.resume_images == HeldImages(id_, 2, (0, 1), WORLD)

        # It makes no step from there: the same images are not tried again, the store has the same step.
        await ended(run, 2, 0, [DIED])
        third, _ = await asyncio.gather(run.join(holding(0, older)), run.join(holding(1, replace(older, ranks=(1,)))))
        assert (third.resume_step, third.resume_images) == (2, None)

        # It goes on: images of a step that was never committed will do.
        await report(run, 4, {"train/loss": 3.0})
        await ended(run, 3, 0, [DIED])
        uncommitted = [HeldImages(third.generation_id, 3, (rank,), WORLD) for rank in (0, 1)]
        fourth, _ = await asyncio.gather(*(run.join(holding(rank, uncommitted[rank])) for rank in (0, 1)))
        assert fourth.resume_step == 3 and fourth.resume_images is not None

    asyncio.run(play())


def test_a_smaller_world_begins_with_what_the_larger_one_left_in_memory_unless_the_store_is_newer(
    tmp_path: Path,
) -> None:
    async def play() -> None:
        changes = {"cluster.min_nodes": 1, "fault.replace_seconds": 0.05, "fault.max_restarts_without_progress": 9}
        run = coordinator(tmp_path, **changes)
        order, _ = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        await save(run, tmp_path, order, 2)
        await run.agents_lost("a", {1: 0})
        own, copy = (HeldImages(order.generation_id, 3, (rank,), WORLD) for rank in (0, 1))
        survivor = replace(agent(0), images=(own,), copies=(copy,), buddy_port=7000, last_generation=1)
        second = await run.join(survivor)
        assert isinstance(second, Order) and second.world.nodes == 1
        assert (second.resume_step, second.resume_images) == (3, HeldImages(order.generation_id, 3, (0, 1), WORLD))
        assert second.reshapes and second.copies == {("127.0.0.2", 7000): range(2)}
        texts = [event.text for event in (await run.status(0)).events]
        assert "generation 2: 1 ranks on 1 node(s), from the snapshot of step 3 in memory of 2 ranks" in texts

        # Nobody could read it: it is not tried again, and the store has an older step.
        unread = RankExit(0, 1, "the snapshot of step 3 could not be had from 127.0.0.2", retry=True)
        await ended(run, 2, 0, [unread])
        third = await run.join(replace(survivor, images=(), copies=(own, copy), last_generation=2))
        assert isinstance(third, Order) and (third.resume_step, third.resume_images, third.copies) == (2, None, {})

        # A snapshot as old as the newest checkpoint will do, and an older one not.
        await report(run, 6, {"train/loss": 3.0})
        await save(run, tmp_path, third, 5)
        await ended(run, 3, 0, [replace(DIED, rank=0)])
        left = tuple(HeldImages("g9", step, (0, 1), WORLD) for step in (4, 5))
        fourth = await run.join(replace(survivor, images=left, last_generation=3))
        assert isinstance(fourth, Order) and fourth.resume_images == left[1]
        await report(run, 6, {"train/loss": 3.0})
        await ended(run, 4, 0, [replace(DIED, rank=0)])
        fifth = await run.join(replace(survivor, images=left[:1], last_generation=4))
        assert isinstance(fifth, Order) and (fifth.resume_step, fifth.resume_images) == (5, None)

    asyncio.run(play())


def test_agents_that_are_to_leave_do_so_once_their_ranks_have_saved_or_failed(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        order, _ = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        watching = asyncio.create_task(watch(run))
        await run.leave("b", "there are nodes for more ranks")
        assert (await watching).kind == "stop"
        await save(run, tmp_path, order, 2)
        exits = [RankExit(rank, 0, None, retry=False, outcome=Outcome(2, "stopped")) for rank in (0, 1)]
        await asyncio.gather(*(ended(run, 1, rank, [each]) for rank, each in enumerate(exits)))
        assert all(isinstance(each, GoHome) for each in await asyncio.gather(run.join(agent(0)), run.join(agent(1))))
        status = await run.status(0)
        assert status.ended is None and not status.incidents, "others go on"
        assert "generation 1 saves and ends: there are nodes for more ranks" in [each.text for each in status.events]

        orders = await asyncio.gather(*(run.join(agent(seat, "b")) for seat in (0, 1)))
        assert [order.resume_step for order in orders if isinstance(order, Order)] == [2, 2]
        await run.leave("c", "there are nodes for more ranks")
        await run.exited(agent(1, "b"), order_of(run, 2), NodeEnded((DIED,)))
        assert isinstance(await run.join(agent(1, "b")), GoHome), "it need not fail again to leave"

        # The next ones are not meant, and of those that wait nobody has anything to save.
        await run.join(agent(0, "c", nodes=1))
        await run.exited(agent(0, "c", nodes=1), order_of(run, 3), NodeEnded((replace(DIED, rank=0),)))
        waiting = asyncio.create_task(run.join(agent(0, "d")))
        await asyncio.sleep(0.01)
        await run.leave("e", "there are nodes for more ranks")
        assert isinstance(await waiting, GoHome)

    asyncio.run(play())


def on_node(seat: int, attempt: str = "a") -> AgentInfo:
    return replace(agent(seat, attempt), node_id=f"n{seat}")


LEAVES = NodeLeaves("n1", "EC2 will take it")


@pytest.mark.parametrize("when", ["before its agent joins", "while its ranks end"])
def test_a_notice_that_finds_no_agent_is_kept_for_the_one_that_comes_and_is_one_incident(
    tmp_path: Path, when: str
) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        if when == "before its agent joins":
            await run.tell(LEAVES)
        first, _ = await asyncio.gather(run.join(on_node(0)), run.join(on_node(1)))
        assert isinstance(first, Order) and first.seats == (0, 1), "there is no other"
        watching = asyncio.create_task(run.watch(on_node(0), first, stop_known=False))
        await asyncio.sleep(0)
        assert await run.join(on_node(2)) == StandBy(1)
        if when == "before its agent joins":
            assert (await watching).kind == "stop", "it can be left now"
        spare = asyncio.create_task(run.join(again(on_node(2), first)))
        await run.exited(on_node(1), first, NodeEnded((DIED,)))
        await watching
        for _ in range(3):
            await run.tell(LEAVES)
        joining = asyncio.create_task(run.join(again(on_node(1), first)))
        second = await run.join(again(on_node(0), first))
        assert isinstance(second, Order) and second.seats == (0, 2) and await spare == second
        assert await joining == StandBy(2)
        # Ray Train starts all agents again, on the same nodes.
        orders = [asyncio.create_task(run.join(on_node(seat, "b"))) for seat in (1, 0)]
        assert [isinstance(await each, Order) for each in orders] == [True, True]
        status = await run.status(0)
        told = [event.text for event in status.events if event.text.startswith("node ")]
        assert told == ["node 1 (127.0.0.3) will leave: EC2 will take it"]
        assert [each.cause for each in status.incidents if each.what == "node"] == ["EC2 will take it"]

    asyncio.run(asyncio.wait_for(play(), 60))


@pytest.mark.parametrize("bad", [False, True])
def test_a_node_whose_notice_was_withdrawn_runs_ranks_again_unless_a_verdict_named_it(
    tmp_path: Path, bad: bool
) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        await run.tell(LEAVES)
        if bad:
            await run.knows_bad_nodes(["n1"])
        first, _ = await asyncio.gather(run.join(on_node(0)), run.join(on_node(2)))
        assert isinstance(first, Order) and await run.join(on_node(1)) == StandBy(1)
        stands_by = asyncio.create_task(run.join(again(on_node(1), first)))
        await asyncio.sleep(0)
        for _ in range(2):
            await run.tell(NodeLeaves("n1", None))
        await run.exited(on_node(2), first, NodeEnded((DIED,)))
        # The other one's node is lost.
        await run.agents_lost("a", {2: 0})
        joining = asyncio.create_task(run.join(replace(on_node(2), incarnation=1, node_id="n3")))
        await asyncio.sleep(0.01)
        second = await run.join(again(on_node(0), first))
        assert isinstance(second, Order) and second.seats == ((0, 2) if bad else (0, 1))
        assert await (joining if bad else stands_by) == second
        await run.tell(LEAVES)
        texts = [event.text for event in (await run.status(0)).events]
        said = [text for text in texts if text.startswith("node 1")]
        leaves = "node 1 (127.0.0.3) will leave: EC2 will take it"
        assert said == [leaves, "node 1 (127.0.0.3) stays: its notice was withdrawn", leaves]
        stands_by.cancel()
        joining.cancel()

    asyncio.run(asyncio.wait_for(play(), 60))


def test_a_coordinator_that_was_started_again_hears_of_a_notice_before_it_knows_any_agent(tmp_path: Path) -> None:
    async def play() -> None:
        dead, run = coordinator(tmp_path), coordinator(tmp_path)
        order, _ = await asyncio.gather(dead.join(on_node(0)), dead.join(on_node(1)))
        assert isinstance(order, Order)
        await dead.tell(LEAVES)
        await run.tell(LEAVES)
        watching = [asyncio.create_task(run.watch(on_node(seat), order, stop_known=False)) for seat in (0, 1)]
        assert [(await each).kind for each in watching] == ["stop", "stop"]
        keys = [each.key for life in (dead, run) for each in (await life.status(0)).incidents]
        assert keys == ["leaves-n1", "leaves-n1"], "one incident of the run's record"

    asyncio.run(asyncio.wait_for(play(), 60))


@pytest.mark.parametrize("speaks_first", ["the driver", "the ranks' agents", "the spare"])
def test_a_coordinator_that_was_started_again_does_without_a_node_that_a_verdict_named(
    tmp_path: Path, speaks_first: str
) -> None:
    async def play() -> None:
        dead, run = coordinator(tmp_path), coordinator(tmp_path)
        order, _ = await asyncio.gather(dead.join(on_node(0)), dead.join(on_node(1)))
        assert isinstance(order, Order)
        if speaks_first == "the driver":
            await run.knows_bad_nodes(["n1", "of another life"])
        if speaks_first == "the spare":
            joining = asyncio.create_task(run.join(on_node(2)))
            await asyncio.sleep(0)
        watching = [asyncio.create_task(run.watch(on_node(seat), order, stop_known=False)) for seat in (0, 1)]
        await asyncio.sleep(0)
        if speaks_first != "the spare":
            joining = asyncio.create_task(run.join(on_node(2)))
            await asyncio.sleep(0)
        if speaks_first != "the driver":
            await run.knows_bad_nodes(["n1", "of another life"])
        assert [(await each).kind for each in watching] == ["stop", "stop"]
        assert await joining == StandBy(1)
        spare = asyncio.create_task(run.join(again(on_node(2), order)))
        for seat in (0, 1):
            await run.exited(on_node(seat), order, NodeEnded((DIED,)))
        bad = asyncio.create_task(run.join(again(on_node(1), order)))
        second = await run.join(again(on_node(0), order))
        assert isinstance(second, Order) and second.seats == (0, 2) and await spare == second
        assert await bad == StandBy(2)

    asyncio.run(asyncio.wait_for(play(), 60))


def test_who_was_lost_or_is_of_an_earlier_attempt_is_displaced(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)

        async def displaced(*who: Any) -> bool:
            return (await run.tell(MaySend(*who))).displaced

        assert not await displaced("a", 1, 0), "a coordinator that was just started knows nobody"
        await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        assert not await displaced("a", 1, 0)
        await run.agents_lost("a", {1: 0})
        assert await displaced("a", 1, 0) and not await displaced("a", 1, 1) and not await displaced("a", 0, 0)
        joining = [asyncio.create_task(run.join(agent(seat, "b"))) for seat in (0, 1)]
        await asyncio.gather(*joining)
        assert await displaced("a", 0, 0) and not await displaced("b", 0, 0)

    asyncio.run(asyncio.wait_for(play(), 60))


def test_a_loss_that_is_told_before_any_agent_speaks_ends_the_generation_once_it_is_found(tmp_path: Path) -> None:
    changes = {"cluster.min_nodes": 1, "fault.replace_seconds": 0.05}

    async def play() -> None:
        dead, run = coordinator(tmp_path), coordinator(tmp_path, **changes)
        order, _ = await asyncio.gather(dead.join(agent(0)), dead.join(agent(1)))
        assert isinstance(order, Order)
        await run.agents_lost("a", {1: 0})
        verdict = await run.watch(agent(0), order, stop_known=False)
        assert verdict == Verdict("over", "the node agent of node 1 was lost")
        second = await run.join(again(agent(0), order))
        assert isinstance(second, Order) and second.seats == (0,)
        assert [each.what for each in (await run.status(0)).incidents] == ["agents"]
        assert isinstance(await run.join(again(agent(1), order)), GoHome), "it was only cut off"

    asyncio.run(asyncio.wait_for(play(), 60))


@pytest.mark.parametrize("speaks_first", ["an agent that waits", "one whose ranks run"])
@pytest.mark.parametrize("what", ["agents", None])
def test_agents_that_are_to_leave_do_so_though_their_coordinator_was_started_again_before_they_speak(
    tmp_path: Path, what: Any, speaks_first: str
) -> None:
    async def play() -> None:
        dead, run = coordinator(tmp_path), coordinator(tmp_path)
        order, _ = await asyncio.gather(dead.join(agent(0)), dead.join(agent(1)))
        assert isinstance(order, Order)
        await run.leave("b", "others are to go on", what)
        if speaks_first == "an agent that waits":
            assert isinstance(await run.join(again(agent(2), order)), GoHome)
        verdicts = [await run.watch(agent(seat), order, stop_known=False) for seat in (0, 1)]
        if what is None:
            assert [each.kind for each in verdicts] == ["stop", "stop"], "they save before"
            await save(run, tmp_path, order, 2)
            exits = [RankExit(rank, 0, None, retry=False, outcome=Outcome(2, "stopped")) for rank in (0, 1)]
            await asyncio.gather(*(run.exited(agent(rank), order, NodeEnded((exits[rank],))) for rank in (0, 1)))
        else:
            assert verdicts == 2 * [Verdict("over", "others are to go on")]
        for seat in (0, 1):
            assert isinstance(await run.join(again(agent(seat), order)), GoHome)
        orders = await asyncio.gather(*(run.join(agent(seat, "b")) for seat in (0, 1)))
        assert [isinstance(each, Order) for each in orders] == [True, True] and (await run.status(0)).ended is None

    asyncio.run(asyncio.wait_for(play(), 60))


@pytest.mark.parametrize("call", ["join", "watch"])
@pytest.mark.parametrize("newer", ["the seat", "the attempt"])
@pytest.mark.parametrize("speaks", ["first", "last"])
def test_who_comes_back_from_a_cut_off_node_displaces_nobody_after_a_coordinator_was_started_again(
    tmp_path: Path, call: str, newer: str, speaks: str
) -> None:
    """It had the seat before, or is of an attempt before: either way it is the older."""

    async def play() -> None:
        dead, run, cut_off = coordinator(tmp_path), coordinator(tmp_path), agent(1)
        first, _ = await asyncio.gather(dead.join(agent(0)), dead.join(cut_off))
        assert isinstance(first, Order)
        if newer == "the seat":
            await dead.agents_lost("a", {1: 0})
            crew = again(agent(0), first), replace(agent(1), incarnation=1)
        else:
            crew = agent(0, "b"), agent(1, "b")
        second, _ = await asyncio.gather(*map(dead.join, crew))
        assert isinstance(second, Order)

        async def comes_back() -> None:
            if call == "watch":
                assert (await run.watch(cut_off, first, stop_known=False)).kind == "over"
            assert isinstance(await run.join(again(cut_off, first)), GoHome)

        back = asyncio.create_task(comes_back())
        if speaks == "first":
            await asyncio.sleep(0.01)
        watching = [asyncio.create_task(run.watch(each, second, stop_known=False)) for each in crew]
        await back
        await asyncio.sleep(0.01)
        status = await run.status(0)
        assert (status.generation, status.running, status.agents) == (2, True, crew)
        assert not any(each.done() for each in watching) and not status.incidents
        for each in watching:
            each.cancel()

    asyncio.run(asyncio.wait_for(play(), 60))


def test_a_run_that_cannot_save_before_it_leaves_a_node_goes_on_from_what_there_is(tmp_path: Path) -> None:
    """A store that is away at that moment ends no run that nobody asked to end."""

    async def play() -> None:
        run = coordinator(tmp_path)
        nodes = [replace(agent(seat), node_id=f"n{seat}") for seat in range(3)]
        order, _ = await asyncio.gather(run.join(nodes[0]), run.join(nodes[1]))
        assert isinstance(order, Order) and await run.join(nodes[2]) == StandBy(1)
        spare = asyncio.create_task(run.join(again(nodes[2], order)))
        await save(run, tmp_path, order, 2)
        await run.tell(NodeLeaves("n1", "a notice"))
        await run.tell(ShardFailed(4, 0, "no answer of S3"))
        exits = [RankExit(rank, 0, None, retry=False, outcome=Outcome(4, "stopped")) for rank in (0, 1)]
        await asyncio.gather(*(run.exited(nodes[rank], order, NodeEnded((each,))) for rank, each in enumerate(exits)))
        assert (await run.status(0)).ended is None
        second, stands_by = await asyncio.gather(*(run.join(again(each, order)) for each in nodes[:2]))
        assert isinstance(second, Order) and (second.seats, second.resume_step) == ((0, 2), 2)
        assert stands_by == StandBy(2, resume_step=2) and await spare == second

    asyncio.run(play())


def test_a_node_that_is_left_lends_its_images_to_the_spare_and_is_busy_until_the_first_step(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        nodes = [replace(on_node(seat), buddy_port=7000 + seat) for seat in range(3)]
        order, _ = await asyncio.gather(run.join(nodes[0]), run.join(nodes[1]))
        assert isinstance(order, Order) and await run.join(nodes[2]) == StandBy(1)
        spare = asyncio.create_task(run.join(again(nodes[2], order)))
        await run.tell(LEAVES)
        await save(run, tmp_path, order, 4)
        exits = [RankExit(rank, 0, None, retry=False, outcome=Outcome(4, "stopped")) for rank in (0, 1)]
        await asyncio.gather(*(run.exited(nodes[rank], order, NodeEnded((each,))) for rank, each in enumerate(exits)))
        own = [HeldImages(order.generation_id, 4, (rank,), WORLD) for rank in (0, 1)]
        holders = [replace(again(nodes[rank], order), images=(own[rank],)) for rank in (0, 1)]
        second, stands_by = await asyncio.gather(*map(run.join, holders))
        assert isinstance(second, Order) and await spare == second
        assert (second.seats, second.resume_images) == ((0, 2), HeldImages(order.generation_id, 4, (0, 1), WORLD))
        assert not second.reshapes and second.copies == {("127.0.0.3", 7001): range(1, 2)}
        assert stands_by == StandBy(2, second.resume_images, second.resume_step)
        assert "n1" in (await run.status(0)).busy_nodes, "it is read"
        await report(run, 5, {"train/loss": 3.0})
        assert "n1" not in (await run.status(0)).busy_nodes

    asyncio.run(asyncio.wait_for(play(), 60))


def test_who_stands_by_lends_what_ranks_of_another_world_begin_with(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path, **{"cluster.min_nodes": 1, "cluster.spares": 1})
        old = World.of(parse_config(JOB), nodes=1)
        has_all = replace(agent(0), images=(HeldImages("g1", 3, (0,), old),), buddy_port=7000)
        order, _ = await asyncio.gather(run.join(has_all), run.join(agent(1)))
        assert isinstance(order, Order) and order.reshapes and order.copies == {("127.0.0.2", 7000): range(1)}
        assert await run.join(agent(2)) == StandBy(1, order.resume_images, order.resume_step)

    asyncio.run(play())


def test_each_second_of_a_run_is_booked_whatever_happens_to_its_generations(tmp_path: Path) -> None:
    async def play() -> None:
        began = time.monotonic()
        run = coordinator(tmp_path, **{"cluster.nodes": 1, "fault.max_restarts_without_progress": 9})
        made = time.monotonic()
        before = Ledger(train=50, down=30, step=8)
        await run.ran_before(2, Before(before))
        await run.ran_before(1, Before(Ledger(train=50, step=8)))  # an earlier word that comes later
        order = await run.join(ALONE)
        assert order.ledger.total > 80 and order.ledger.step == 8, "steps up to 8 are repeated, not trained"
        await asyncio.sleep(0.02)
        await account(run, 1, Ledger(load=0.004, repeat=0.003, train=0.003, step=9))
        whole = await account(run, 1, Ledger(load=0.004, step=8))
        assert (whole.train, whole.step) == (50.003, 9)
        await ended(run, 1, 0, [replace(DIED, rank=0)])
        await asyncio.sleep(0.01)
        second = await run.join(ALONE)
        assert second.ledger.restart >= 0.01 and (second.ledger.repeat, second.ledger.step) == (0.003, 9)
        await account(run, 1, Ledger(train=1000))  # the last word of a life that is over comes late
        booked = (await run.status(0)).ledger.booked
        assert booked.train == 0.003 and booked.restore > 0, "the second is being restored"
        await asyncio.sleep(0.01)
        await account(run, 2, Ledger(load=0.001, train=0.001, step=10))
        await run.leave("b", "the run leaves this node", "agents")
        home = await run.join(ALONE)
        assert isinstance(home, GoHome) and home.ledger.restart > second.ledger.restart
        asked = time.monotonic()
        total = (await run.status(0)).ledger.booked.total
        assert asked - made <= total <= time.monotonic() - began, "nothing is missing, and nothing counted twice"
        assert home.ledger.total - before.total <= total

    asyncio.run(play())


def test_the_upload_of_the_last_checkpoint_is_part_of_the_end(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        order, _ = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        await account(run, 1, Ledger(step=4))
        await save(run, tmp_path, order, 4)
        done = RankExit(0, 0, None, retry=False, outcome=Outcome(4, "finished"))
        await ended(run, 1, 0, [done])
        assert (await run.status(0)).ledger.booked.finish == 0
        await ended(run, 1, 1, [done])
        status = await run.status(0)
        assert status.ended == "finished" and status.ledger.booked.finish > 0
        assert (status.ledger.booked.other, status.ledger.booked.restart) == (0, 0)

    asyncio.run(play())


DAMAGED = RankExit(0, 1, "CheckpointDamaged: shard-00000 is damaged", retry=True, error="CheckpointDamaged")


@pytest.mark.parametrize("if_damaged", ["stop", "use_older"])
def test_damage_that_ranks_find_while_they_read_is_handled_as_the_policy_says(tmp_path: Path, if_damaged: str) -> None:
    async def play() -> None:
        first = coordinator(tmp_path)
        order, _ = await asyncio.gather(first.join(agent(0)), first.join(agent(1)))
        await save(first, tmp_path, order, 2)
        await save(first, tmp_path, order, 4)

        run = coordinator(tmp_path, **{"checkpoint.if_damaged": if_damaged})
        orders = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        assert orders[0].resume_step == 4
        await ended(run, 1, 0, [DAMAGED])
        orders = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        status = await run.status(0)
        told = "\n".join(event.text for event in status.events)
        if if_damaged == "stop":
            assert isinstance(orders[0], GoHome) and status.ended == "failed"
            assert "checkpoint of step 4 is damaged" in told and "checkpoint.if_damaged=use_older" in told
        else:
            assert orders[0].resume_step == 2
            assert "CHECKPOINT DAMAGED" in told and "manifest-damaged.json" in told

    asyncio.run(play())


def test_uploads_that_a_dead_attempt_left_open_are_removed_and_living_ones_are_not(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path, **{"fault.max_restarts_without_progress": 9})
        folder = tmp_path / "run/checkpoints/step-000000002/g1"
        folder.mkdir(parents=True)
        (folder / ".tmp-left").write_bytes(b"half")
        await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        assert not (folder / ".tmp-left").exists()
        (folder / ".tmp-living").write_bytes(b"half")
        await ended(run, 1, 0, [DIED])
        await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        assert (folder / ".tmp-living").exists(), "the agents of this attempt may still upload"
        restarted = coordinator(tmp_path)
        late = replace(agent(1), uploading=("g1",))
        await asyncio.gather(restarted.join(agent(0)), restarted.join(late))
        assert (folder / ".tmp-living").exists(), "one that knows nothing is told so by the agents"
        await asyncio.gather(*(asyncio.create_task(run.join(agent(rank, "b"))) for rank in (0, 1)))
        assert not (folder / ".tmp-living").exists()

    asyncio.run(play())


# ---- hangs -----------------------------------------------------------------------------------------------------------

HANGING = {"fault.hang_seconds": 5, "fault.max_restarts_without_progress": 0}


def seen(node_rank: int, position: RankPosition, generation: int = 1) -> RanksSeen:
    return RanksSeen(generation, {node_rank: position})


async def hangs(run: RunCoordinator) -> None:
    """Two nodes of which the second's rank waits for data."""
    await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
    await run.tell(seen(0, RankPosition(9, still_seconds=5.25)))
    await run.tell(seen(1, RankPosition(9, "fetch", still_seconds=5.5)))


def test_every_node_is_looked_at_before_any_rank_may_be_killed(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path, **HANGING | {"fault.max_restarts_without_progress": 1})
        await hangs(run)
        assert (await watch(run)).kind == "look"
        told = asyncio.create_task(run.tell(StacksTaken(1, 0, {0: Look("waits", '{"entries": []}')})))
        again = asyncio.create_task(watch(run))
        await asyncio.sleep(0.05)
        assert not told.done() and not again.done(), "node 1 has not told"
        await run.tell(StacksTaken(1, 1, {1: Look("hangs")}))
        artifacts = (await told).artifacts
        assert set(artifacts) == {"hangs/generation-00001/stacks.txt", "hangs/generation-00001/collectives.json"}
        assert "rank 0, node 0: waits" in artifacts["hangs/generation-00001/stacks.txt"]
        assert "rank 1, node 1: hangs" in artifacts["hangs/generation-00001/stacks.txt"]
        verdict = await again
        assert verdict.kind == "over"
        assert verdict.cause.startswith("hang: rank 1 on node 1 (127.0.0.3) is waiting for the data of step 9: ")
        orders = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        assert {order.generation for order in orders} == {2}
        # A word of the generation before judges nobody.
        await run.tell(seen(1, RankPosition(9, "fetch", still_seconds=60)))
        assert (await run.tell(StacksTaken(1, 1, {1: Look("late")}))).artifacts == {}
        assert (await run.status(0)).running

    asyncio.run(play())


@pytest.mark.parametrize("action", ["name", "leave"])
def test_a_straggler_is_named_and_an_incident_where_the_run_leaves_it(tmp_path: Path, action: str) -> None:
    def times(node_rank: int, step: int) -> TimesSeen:
        own = 0.1 + 0.5 * node_rank
        return TimesSeen(1, node_rank, {node_rank: RankTimes(step, own, own, own, 0.6)})

    async def play() -> None:
        run = coordinator(tmp_path, **{"fault.stragglers": action})
        await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        for step in (20, 40, 60, 80):
            for node_rank in (0, 1):
                await run.tell(times(node_rank, step))
        status = await run.status(0)
        assert any("straggler: rank 1 on node 1 (127.0.0.3): it needs" in each.text for each in status.events)
        assert len(status.incidents) == (action == "leave")
        for incident in status.incidents:
            assert (incident.what, incident.where, incident.seconds) == ("node", "127.0.0.3", 0.0)
            assert incident.cause.startswith("straggler: rank 1: it needs 600.0 ms of a step of 600.0 ms")
        assert status.running

    asyncio.run(play())


def test_a_node_that_cannot_tell_what_its_ranks_do_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raynium.run.protocol.LOOKS_SECONDS", 0.05)

    async def play() -> None:
        run = coordinator(tmp_path, **HANGING)
        await hangs(run)
        told = await run.tell(StacksTaken(1, 0, {0: Look("waits")}))
        assert list(told.artifacts) == ["hangs/generation-00001/stacks.txt"]
        verdict = await watch(run)
        assert verdict.kind == "over" and "rank 1 on node 1" in verdict.cause
        status = await run.status(0)
        assert status.ended == "failed" and status.cause is not None
        assert "hang: rank 1 on node 1" in status.cause and "max_restarts_without_progress=0" in status.cause

    asyncio.run(play())


def test_ranks_that_die_while_they_are_looked_at_are_the_cause(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path, **HANGING | {"fault.max_restarts_without_progress": 1})
        await hangs(run)
        await ended(run, 1, 1, [DIED])
        verdict = await watch(run)
        assert verdict.kind == "over" and "SIGKILL" in verdict.cause
        await run.tell(StacksTaken(1, 0, {0: Look("waits")}))
        assert [each.text for each in (await run.status(0)).events if "hang:" in each.text] == []

    asyncio.run(play())
