"""The coordinator as a state machine: no ray, no ranks; node agents are played by the tests."""

import asyncio
import json
import pickle
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import job_text

import raynium.run.coordinator as coordinator_module
from raynium.checkpoint.catalog import list_checkpoints, open_checkpoint
from raynium.checkpoint.format.image import ImageFile, plan_image, write_image
from raynium.checkpoint.state import Chunk
from raynium.checkpoint.upload import upload_shard
from raynium.config.load import parse_config
from raynium.health.faults import classify
from raynium.run.coordinator import RunCoordinator
from raynium.run.protocol import AgentInfo, HeldImages, Order, RankExit
from raynium.storage.store import Store
from raynium.tracking.ledger import Ledger

JOB = job_text({"cluster.nodes": 2, "cluster.ranks_per_node": 1, "fault.max_restarts_without_progress": 1})

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


def test_lost_nodes_are_counted_apart_from_failed_ranks_and_only_without_progress(tmp_path: Path) -> None:
    limits = {"fault.max_restarts_without_progress": 0, "fault.max_node_failures_without_progress": 2}

    async def play() -> None:
        run = coordinator(tmp_path, **limits)
        for number, attempt in enumerate("abcdef"):
            await run.attempt_begins(attempt)
            await run.attempt_begins(attempt)  # Ray repeats a call whose answer was lost
            order, _ = await asyncio.gather(run.join(agent(0, attempt)), run.join(agent(1, attempt)))
            assert order.kind == "run"
            if number in (1, 3, 5):  # else no third loss would be survived
                await save(run, tmp_path, order, 2 * number)
        await run.leave()
        await run.attempt_begins("on other nodes")
        await asyncio.gather(run.join(agent(0, "on other nodes")), run.join(agent(1, "on other nodes")))
        for attempt in ("whose agents die before they join", "likewise"):
            await run.attempt_begins(attempt)
            assert (await run.status(0)).ended is None
        await run.attempt_begins("once too often")
        status = await run.status(0)
        assert status.ended == "failed" and status.cause is not None
        assert "a node agent was lost. That is loss of a node agent number 3 without a new checkpoint" in status.cause
        assert "fault.max_node_failures_without_progress=2" in status.cause

    asyncio.run(play())


def test_cores_that_a_killed_rank_still_holds_are_waited_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_module, "CORES_PAUSE_SECONDS", 0.05)
    fault = classify(["NRT:nrt_init Logical Neuron Core(s) not available - Requested:1 Available:0"], [])
    taken = RankExit(0, 1, str(fault), retry=True, fault=fault)

    async def play() -> None:
        run = coordinator(tmp_path, **{"cluster.nodes": 1})
        order = await run.join(agent(0))
        await save(run, tmp_path, order, 2)
        await run.report(4, {"train/loss": 3.0})
        await run.exited(1, 0, [replace(DIED, rank=0)])
        images = holding(0, HeldImages(order.generation_id, 2, (0,)))
        for generation in range(2, 7):
            assert (await run.join(images)).resume_images is not None, "the snapshot in memory is not to blame"
            failed = time.monotonic()
            await run.exited(generation, 0, [taken])
        assert (await run.join(images)).generation == 7 and time.monotonic() - failed >= 0.05
        monkeypatch.setattr(coordinator_module, "CORES_RETURN_SECONDS", 0.0)
        await run.exited(7, 0, [taken])
        assert (await run.join(images)).kind == "end"
        assert "max_restarts_without_progress=1" in str((await run.status(0)).cause)

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
        ready_again = replace(agent(1), last_generation=1)
        zombie = asyncio.create_task(run.join(ready_again))  # of the old group
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
        await run.shard_failed(4, 0, "disk full")
        await run.exited(1, 0, [RankExit(0, 0, None, retry=False, outcome={"step": 4, "reason": "finished"})])
        status = await run.status(0)
        assert status.ended == "failed" and "training reached step 4, but its checkpoint" in (status.cause or "")
        assert "rank 0's shard could not be uploaded: disk full" in (status.cause or "")
        assert any("disk full" in event.text for event in status.events)

    asyncio.run(play())


def test_a_coordinator_that_was_started_again_sends_agents_back_to_join(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        assert "started again" in (await run.watch(7, False)).cause
        await run.exited(7, 0, [DIED])  # about ranks of its former life: nothing to do
        assert (await run.status(0)).ended is None

    asyncio.run(play())


def test_a_coordinator_that_was_started_again_is_known_by_its_life_and_counts_on(tmp_path: Path) -> None:
    async def play() -> None:
        dead, run = coordinator(tmp_path), coordinator(tmp_path)
        assert (await dead.status(0)).life != (await run.status(0)).life
        joining = run.join(replace(agent(0), last_generation=5)), run.join(agent(1))
        assert {order.generation for order in await asyncio.gather(*joining)} == {6}

    asyncio.run(play())


def test_an_unreadable_store_ends_the_run_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").write_text("a file where the run's folder should be")
    monkeypatch.setattr(coordinator_module, "pause_before_next_try", lambda tries, waited: 0.01 if tries < 3 else None)

    async def play() -> None:
        run = coordinator(tmp_path, **{"cluster.nodes": 1})
        assert (await run.join(agent(0))).kind == "end"
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
        joining = asyncio.create_task(run.join(agent(0)))
        while not (await run.status(0)).events:
            await asyncio.sleep(0.01)
        if meanwhile == "stop":
            await run.request_stop()
            assert (await run.status(0)).ended == "stopped"
        else:
            away.unlink()
        if meanwhile == "new attempt":
            assert (await run.join(agent(0, "b"))).generation == 1
        order = await asyncio.wait_for(joining, 60)
        assert order.kind == ("run" if meanwhile == "the store is back" else "end")

    asyncio.run(play())


def test_an_order_whose_answer_was_lost_is_given_again(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        orders = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        assert await asyncio.wait_for(run.join(agent(0)), 60) == orders[0]
        first_through = asyncio.create_task(run.join(replace(agent(1), last_generation=1)))  # node 0 still saves
        await asyncio.sleep(0.01)
        assert not first_through.done()
        await run.give_up("the test is over")
        assert (await first_through).kind == "end"

    asyncio.run(play())


def test_an_agent_that_ray_took_for_dead_does_not_come_back(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        waiting = asyncio.create_task(run.join(agent(0, "b")))
        await asyncio.sleep(0.01)
        assert (await run.join(replace(agent(1), last_generation=1))).kind == "end"  # its node was cut off
        orders = await asyncio.gather(waiting, run.join(agent(1, "b")))
        assert {(order.kind, order.generation) for order in orders} == {("run", 2)}

    asyncio.run(play())


def test_failed_generations_leave_little_behind(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path, **{"cluster.nodes": 1, "fault.max_restarts_without_progress": 99})
        for generation in range(1, 31):
            last_words = replace(DIED, rank=0, last_lines=(f"{generation}" * 10_000,))
            await run.join(replace(agent(0), last_generation=generation - 1))
            await run.exited(generation, 0, [last_words] * 2)
        assert len(pickle.dumps(run._generations)) < 100_000

    asyncio.run(play())


@pytest.mark.parametrize("events_after, expected", [(0, ["one", "two"]), (1, ["two"]), (2, [])])
def test_events_are_told_once(tmp_path: Path, events_after: int, expected: list[str]) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        await run.tell("one")
        await run.tell("two")
        assert [event.text for event in (await run.status(events_after)).events] == expected

    asyncio.run(play())


# ---- checkpoints --------------------------------------------------------------------------------------------------


def entry(store: Store, image: Path, *, step: int, generation_id: str, rank: int) -> str:
    """A rank's uploaded shard, as its agent reports it: the ranks hold a half each of one tensor."""
    halves = [torch.full((2,), float(10 * step + rank))]
    chunks = [Chunk("model/w", (4,), (2 * rank,), half, saved_here=True) for half in halves]
    plan = plan_image(chunks)
    with ImageFile(image) as file:
        write_image(plan, chunks, file.reserve(plan.size), step=step)
        info = plan.info(step=step, path=image, stall_seconds=0.5 + rank)
        return upload_shard(store, info, generation=generation_id, rank=rank).to_json()


async def save(run: RunCoordinator, folder: Path, order: Order, step: int) -> None:
    for rank in (0, 1):
        shard = entry(run.store, folder / f"image-{rank}", step=step, generation_id=order.generation_id, rank=rank)
        await run.shard_saved(step, rank, shard, 3.0 + rank, order.resume_step)


def holding(node_rank: int, *images: HeldImages) -> AgentInfo:
    return replace(agent(node_rank), images=images)


def test_a_late_commit_does_not_delete_the_checkpoint_that_new_ranks_read(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path, **{"checkpoint.keep_last": 1, "fault.max_restarts_without_progress": 9})
        first, _ = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        await save(run, tmp_path, first, 2)
        await run.exited(1, 0, [DIED])
        second, _ = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        assert second.resume_step == 2
        await save(run, tmp_path, first, 3)  # its last shard was still on its way
        assert [each.step for each in list_checkpoints(run.store)] == [2, 3]
        await run.report(3, {"train/loss": 3.0})
        await save(run, tmp_path, second, 4)
        assert [each.step for each in list_checkpoints(run.store)] == [4]

    asyncio.run(play())


def test_a_commit_is_told_with_what_it_cost_and_keeps_the_metrics_of_its_step(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        order, _ = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        await run.report(2, {"train/loss": 3.0, "eval/loss": 2.5})
        following = asyncio.create_task(run.commits(0))
        await save(run, tmp_path, order, 2)
        [commit] = await following or []
        assert (commit.number, commit.step) == (1, 2)
        assert commit.metrics["checkpoint/longest_stall_seconds"] == 1.5
        assert commit.metrics["checkpoint/upload_seconds"] == 4.0
        manifest = open_checkpoint(run.store, 2).manifest
        assert commit.metrics["checkpoint/bytes"] == manifest.num_bytes
        assert manifest.metrics == {"eval/loss": 2.5}
        assert manifest.timing is not None and manifest.timing.stall_seconds == 1.5
        await save(run, tmp_path, order, 4)
        [again] = await run.commits(1) or []
        assert [each["step"] for each in json.loads(again.checkpoints)] == [2, 4]
        assert open_checkpoint(run.store, 4).manifest.metrics == {}
        assert [commit.step for commit in await run.commits(0) or []] == [4], (
            "a new agent sends only what none has sent"
        )
        await run.give_up("enough")
        assert await run.commits(2) is None

    asyncio.run(play())


def test_commits_after_the_coordinator_was_started_again_are_told_too(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        orders = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        asked = asyncio.create_task(run.commits(5))  # the agent has five of the coordinator that died
        await asyncio.sleep(0.01)
        await save(run, tmp_path, orders[0], 2)
        told = await asyncio.wait_for(asked, 60)
        assert told is not None and [commit.step for commit in told] == [2]
        assert told[-1].number == 1

    asyncio.run(play())


def test_the_newest_snapshot_that_every_rank_has_in_memory_comes_before_the_store(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path, **{"fault.max_restarts_without_progress": 9})
        order, _ = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        await save(run, tmp_path, order, 2)
        await run.report(4, {"train/loss": 3.0})
        await run.exited(1, 0, [DIED])
        id_ = order.generation_id
        older, newer = HeldImages(id_, 2, (0,)), HeldImages(id_, 3, (0,))
        first, second = await asyncio.gather(
            run.join(holding(0, older, newer)),
            run.join(holding(1, replace(older, ranks=(1,)))),
        )
        assert first == second and first.resume_step == 2, "rank 1 has no snapshot of step 3"
        assert first.resume_images == HeldImages(id_, 2, (0, 1))

        # It makes no step from there: the same images are not tried again, the store has the same step.
        await run.exited(2, 0, [DIED])
        third, _ = await asyncio.gather(run.join(holding(0, older)), run.join(holding(1, replace(older, ranks=(1,)))))
        assert (third.resume_step, third.resume_images) == (2, None)

        # It goes on: images of a step that was never committed will do.
        await run.report(4, {"train/loss": 3.0})
        await run.exited(3, 0, [DIED])
        uncommitted = [HeldImages(third.generation_id, 3, (rank,)) for rank in (0, 1)]
        fourth, _ = await asyncio.gather(*(run.join(holding(rank, uncommitted[rank])) for rank in (0, 1)))
        assert fourth.resume_step == 3 and fourth.resume_images is not None

    asyncio.run(play())


def test_each_second_of_a_run_is_booked_whatever_happens_to_its_generations(tmp_path: Path) -> None:
    async def play() -> None:
        began = time.monotonic()
        run = coordinator(tmp_path, **{"cluster.nodes": 1, "fault.max_restarts_without_progress": 9})
        made = time.monotonic()
        before = Ledger(train=50, down=30, step=8)
        await run.ran_before(before)
        await run.ran_before(Ledger(train=50, step=8))  # an earlier word that comes later
        order = await run.join(agent(0))
        assert order.ledger.total > 80 and order.ledger.step == 8, "steps up to 8 are repeated, not trained"
        await asyncio.sleep(0.02)
        await run.account(1, Ledger(load=0.004, repeat=0.003, train=0.003, step=9))
        whole = await run.account(1, Ledger(load=0.004, step=8))
        assert (whole.train, whole.step) == (50.003, 9)
        await run.exited(1, 0, [replace(DIED, rank=0)])
        await asyncio.sleep(0.01)
        second = await run.join(agent(0))
        assert second.ledger.restart >= 0.01 and (second.ledger.repeat, second.ledger.step) == (0.003, 9)
        await run.account(1, Ledger(train=1000))  # the last word of a life that is over comes late
        booked = (await run.status(0)).ledger
        assert booked.train == 0.003 and booked.load > 0.004, "the second is being loaded"
        await asyncio.sleep(0.01)
        await run.account(2, Ledger(load=0.001, train=0.001, step=10))
        await run.leave()
        home = await run.join(agent(0))
        assert home.kind == "end" and home.ledger.restart > second.ledger.restart
        asked = time.monotonic()
        total = (await run.status(0)).ledger.total
        assert asked - made <= total <= time.monotonic() - began, "nothing is missing, and nothing counted twice"
        assert home.ledger.total - before.total <= total

    asyncio.run(play())


def test_the_upload_of_the_last_checkpoint_is_part_of_the_end(tmp_path: Path) -> None:
    async def play() -> None:
        run = coordinator(tmp_path)
        order, _ = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        await run.account(1, Ledger(step=4))
        await save(run, tmp_path, order, 4)
        done = RankExit(0, 0, None, retry=False, outcome={"step": 4, "reason": "finished"})
        await run.exited(1, 0, [done])
        assert (await run.status(0)).ledger.finish == 0
        await run.exited(1, 1, [done])
        status = await run.status(0)
        assert status.ended == "finished" and status.ledger.finish > 0
        assert (status.ledger.other, status.ledger.restart) == (0, 0)

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
        await run.exited(1, 0, [DAMAGED])
        orders = await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        status = await run.status(0)
        told = "\n".join(event.text for event in status.events)
        if if_damaged == "stop":
            assert orders[0].kind == "end" and status.ended == "failed"
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
        await run.exited(1, 0, [DIED])
        await asyncio.gather(run.join(agent(0)), run.join(agent(1)))
        assert (folder / ".tmp-living").exists(), "the agents of this attempt may still upload"
        restarted = coordinator(tmp_path)
        late = replace(agent(1), uploading=("g1",))
        await asyncio.gather(restarted.join(agent(0)), restarted.join(late))
        assert (folder / ".tmp-living").exists(), "one that knows nothing is told so by the agents"
        await asyncio.gather(*(asyncio.create_task(run.join(agent(rank, "b"))) for rank in (0, 1)))
        assert not (folder / ".tmp-living").exists()

    asyncio.run(play())
