"""Whether a run hangs, and who holds it up: the policy alone, on what ranks' agents would tell."""

import json
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raynium.accelerators.timeouts import PROCESS_GROUP_TIMEOUT_SECONDS
from raynium.config.fault import FaultSection
from raynium.config.load import load_config
from raynium.config.world import World
from raynium.node.reports import Reports
from raynium.run.positions import RankPosition
from raynium.run.protocol import Look, Order, Progressed, RanksSeen
from raynium.run.verdicts.hangs import (
    COMPILING_SECONDS,
    LEAST_SECONDS,
    LOADING_SECONDS,
    MOST_SECONDS,
    REMEDIES,
    SLOWEST_STEPS,
    STEPS_KEPT,
    WARM_UP_STEPS,
    Hang,
    Hangs,
    What,
    artifacts_of,
    with_looks,
)
from raynium.tracking.tracker import MemoryTracker
from raynium.train.link import Phase, Stepped

pytestmark = pytest.mark.quick

PHASES = ("start", "group", "build", "restore", "data", "fetch", "compile", "step", "evaluate", "save", "upload")
HOSTS = {0: "10.0.0.1", 1: "10.0.0.2"}


def hangs(*, world_size: int = 2, resume_step: int = 0, hang_seconds: float | None = None) -> Hangs:
    return Hangs(FaultSection(hang_seconds=hang_seconds), world_size=world_size, resume_step=resume_step)


def judged(policy: Hangs, *positions: RankPosition, device_seconds: float = 0.0) -> Hang | None:
    return policy.seen(dict(enumerate(positions)), device_seconds=device_seconds)


def still(seconds: float, step: int = 50, phase: str = "step", *, halted: bool = False) -> RankPosition:
    return RankPosition(step, phase, halted, seconds)


def test_a_run_without_a_limit_is_given_ten_times_its_slowest_step_and_at_least_three_minutes() -> None:
    policy = hangs()
    assert policy.limit_seconds(still(0)) == LOADING_SECONDS, "a coordinator that was started again knows no step"
    policy.stepped(17.0)
    assert LEAST_SECONDS == 180
    assert policy.limit_seconds(still(0)) == LEAST_SECONDS
    policy.stepped(20.0)
    policy.stepped(3.0)
    assert policy.limit_seconds(still(0)) == 200
    for _ in range(STEPS_KEPT):
        policy.stepped(19.0)
    assert policy.limit_seconds(still(0)) == 190, "a slow step of long ago is forgotten"


def test_a_device_that_tells_of_a_hang_itself_is_waited_for() -> None:
    policy = hangs()
    policy.stepped(1.0)
    assert judged(policy, still(200), still(200), device_seconds=600) is None
    assert judged(policy, still(659), still(659), device_seconds=600) is None
    assert judged(policy, still(660), still(660), device_seconds=600) is not None


def test_what_ends_the_ranks_that_wait_comes_after_every_verdict() -> None:
    """It would end the one that is healthy, and keep nothing of the one that is not."""
    policy = hangs()
    policy.stepped(1e6)
    most = FaultSection(hang_seconds=3 * 3600, upload_silence_seconds=3600)
    longest = Hangs(most, world_size=2, resume_step=0)
    for each in (policy, longest):
        limits = [each.limit_seconds(still(0, 9, phase)) for phase in PHASES]
        assert max(limits) + 600 <= PROCESS_GROUP_TIMEOUT_SECONDS


def test_a_limit_of_the_config_is_taken_as_it_is() -> None:
    policy = hangs(hang_seconds=5)
    policy.stepped(100.0)
    assert judged(policy, still(4.9), still(9), device_seconds=600) is None, "the last of two that wait came 4.9 s ago"
    assert judged(policy, still(5), still(9), device_seconds=600) is not None


@pytest.mark.parametrize(
    "position, allowed",
    [
        (still(0, 3), 5.0),
        (still(0, 3, "fetch"), 5.0),
        (still(0, WARM_UP_STEPS), LOADING_SECONDS),
        (still(0, WARM_UP_STEPS, "fetch"), LOADING_SECONDS),
        (still(0, 50, "compile"), COMPILING_SECONDS),
        (still(0, 50, "evaluate"), LOADING_SECONDS),
        (still(0, 50, "save"), LOADING_SECONDS),
        (still(0, 50, "upload"), 300.0 + LEAST_SECONDS),
        (still(0, 0, "restore"), LOADING_SECONDS),
        (still(0, 0, "of a later release"), LOADING_SECONDS),
        (still(0, 50, "compile", halted=True), 5.0),
        (still(0, 0, "start", halted=True), 5.0),
    ],
)
def test_each_phase_has_its_own_time_and_a_stopped_process_that_of_a_step(
    position: RankPosition, allowed: float
) -> None:
    assert hangs(hang_seconds=5).limit_seconds(position) == allowed


def test_the_first_steps_after_a_restart_may_compile_again() -> None:
    policy = hangs(hang_seconds=5, resume_step=48)
    assert judged(policy, still(60, 50), still(60, 50)) is None
    assert judged(policy, still(60, 51), still(60, 51)) is not None


def test_a_long_compilation_is_no_hang_though_all_others_wait_in_a_step() -> None:
    policy = hangs(hang_seconds=5)
    assert judged(policy, still(3600, phase="compile"), still(3590)) is None
    hung = judged(policy, still(COMPILING_SECONDS, phase="compile"), still(3590))
    assert hung is not None and (hung.what, hung.ranks) == ("compilation", (0,))


def test_a_rank_that_was_just_stopped_has_been_so_for_one_look_however_long_it_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a debugger's glance at a compilation of ten minutes would be a hang at once."""
    config = load_config("quickstart", {"cluster.accelerator": "cpu"})
    told: list[RanksSeen] = []
    coordinator = SimpleNamespace(tell=told.append)
    halted: set[int] = set()
    reports = Reports(config, cast(Any, coordinator), peak_flops_per_rank=lambda: None, halted=halted.__contains__)
    now = 1000.0
    monkeypatch.setattr("raynium.node.reports.time.monotonic", lambda: now)
    reports.begin_generation(Order(World.of(config), (0,), (0,), 1, "g1", "127.0.0.1", 1), range(1), None)
    look = reports.positions_seconds

    def looks(times: int) -> RankPosition:
        nonlocal now
        for _ in range(times):
            now += look
            reports.tell_positions()
        return told[-1].positions[0]

    reports.take(0, Phase("compile", 1))
    assert looks(100) == RankPosition(1, "compile", False, pytest.approx(100 * look))
    halted.add(0)
    assert looks(1) == RankPosition(1, "compile", True, pytest.approx(look))
    assert looks(4).still_seconds == pytest.approx(5 * look)
    halted.clear()
    assert looks(1) == RankPosition(1, "compile", False, pytest.approx(106 * look))
    halted.add(0)
    assert looks(1).still_seconds == pytest.approx(look)


def test_a_node_knows_the_newest_step_of_its_ranks_though_it_tells_few() -> None:
    """Those of rank 0 tell a step as done; others, that they wait for the data of the next."""
    config = load_config("quickstart", {"cluster.accelerator": "cpu"})
    told: list[Any] = []

    def tell(event: Any) -> Future[Any]:
        told.append(event)
        return Future()

    reports = Reports(
        config, cast(Any, SimpleNamespace(tell=tell)), peak_flops_per_rank=lambda: None, halted=lambda _: False
    )
    for generation in (1, 2):
        order = Order(World.of(config), (0,), (0,), generation, f"g{generation}", "127.0.0.1", 1, resume_step=50)
        reports.begin_generation(order, range(2), MemoryTracker())
        assert reports.newest_step() == 50
        for step in range(51, 58):
            reports.take(0, Stepped(step, {"train/loss": 2.0}))
        reports.take(1, Phase("step", 57))
        assert reports.newest_step() == 57
        reports.take(1, Phase("fetch", 59))
        assert reports.newest_step() == 58
    # The first step of a generation is told at once.
    assert [(each.generation_id, each.step) for each in told if isinstance(each, Progressed)] == [
        ("g1", 51),
        ("g2", 51),
    ]


@pytest.mark.parametrize(
    ("phase", "done"), [("start", 57), ("fetch", 56), ("step", 56), ("evaluate", 56), ("save", 57), ("upload", 57)]
)
def test_where_a_rank_is_says_which_step_it_has_done(phase: str, done: int) -> None:
    assert RankPosition(57, phase).done == done


@pytest.mark.parametrize(
    "positions, what, ranks",
    [
        ((still(9), still(9, halted=True)), "stopped", (1,)),
        ((still(9), still(9, phase="fetch")), "data", (1,)),
        ((still(9), still(9)), "collective", (0, 1)),
        ((still(9, 51), still(9)), "collective", (1,)),
        ((still(9), still(2000, phase="restore", step=0)), "loading", (1,)),
        ((still(2000, phase="evaluate"), still(9, 51)), "evaluation", (0,)),
        ((still(2000, phase="save"), still(9, 51, "fetch")), "save", (0,)),
        ((still(2000, phase="upload"), still(9, 51)), "upload", (0,)),
        # It is stopped, but the other one is farther behind: it waits for that one.
        ((still(9, 51, halted=True), still(9, phase="fetch")), "data", (1,)),
    ],
)
def test_the_rank_that_is_behind_is_judged_by_what_it_does(
    positions: tuple[RankPosition, RankPosition], what: What, ranks: tuple[int, ...]
) -> None:
    hung = judged(hangs(hang_seconds=5), *positions)
    assert hung is not None and (hung.what, hung.ranks) == (what, ranks)


def test_nothing_is_judged_before_every_node_has_told() -> None:
    policy = hangs(hang_seconds=5)
    assert policy.seen({0: still(100)}, device_seconds=0) is None
    assert policy.seen({1: still(1, 51)}, device_seconds=0) is not None


POSITIONS = st.builds(
    RankPosition,
    st.integers(0, 60),
    st.sampled_from(PHASES),
    st.booleans(),
    st.floats(0, 20_000, allow_nan=False),
)


@given(st.lists(POSITIONS, min_size=1, max_size=5), st.one_of(st.none(), st.floats(1, 5000)))
def test_whoever_is_named_is_behind_all_others_and_too_still(
    positions: list[RankPosition], hang_seconds: float | None
) -> None:
    policy = hangs(world_size=len(positions), hang_seconds=hang_seconds)
    hung = judged(policy, *positions)
    least = min(each.progress for each in positions)
    if hung is None:
        # Somebody who may still come is behind.
        assert any(each.progress == least and each.still_seconds < policy.limit_seconds(each) for each in positions)
        return
    assert hung.ranks
    for rank in hung.ranks:
        assert positions[rank].progress == least
        assert positions[rank].still_seconds >= hung.limit_seconds
    named_halted = {positions[rank].halted for rank in hung.ranks}
    assert named_halted == {True} or not any(each.halted for each in positions if each.progress == least)


@given(st.lists(st.floats(0.001, 5000), max_size=300))
def test_no_step_that_is_as_slow_as_the_last_hundred_is_a_hang(seconds: list[float]) -> None:
    policy = hangs()
    for each in seconds:
        policy.stepped(each)
    slowest = max(seconds[-STEPS_KEPT:], default=0.0)
    expected = LOADING_SECONDS if not seconds else max(LEAST_SECONDS, min(SLOWEST_STEPS * slowest, MOST_SECONDS))
    assert policy.limit_seconds(still(0)) == expected


# ---- what is told ----------------------------------------------------------------------------------------------------


def test_the_message_names_rank_node_place_limit_and_what_to_do() -> None:
    hung = Hang("data", (3,), 4, still(7.25, 12, "fetch"), 5.0)
    assert hung.describe(HOSTS, ranks_per_node=2) == (
        "rank 3 on node 1 (10.0.0.2) is waiting for the data of step 12: nothing came from there for 7.2 s (limit 5 s, "
        "fault.hang_seconds); 3 other rank(s) wait; its loader gets no data: look whether data.path or data.mixture "
        "answer on its node (S3, NFS, the disk)"
    )


def test_each_kind_of_hang_has_its_own_words() -> None:
    said = {what: Hang(what, (0,), 2, still(9, phase="x"), 5.0).describe(HOSTS, ranks_per_node=1) for what in REMEDIES}
    assert len({text.partition(" wait; ")[2] for text in said.values()}) == len(REMEDIES) == 8


def record(*collectives: tuple[str, int, str], p2p: bool = False) -> str:
    entries = [
        {"process_group": [group, "of a mesh"], "collective_seq_id": number, "profiling_name": name, "is_p2p": p2p}
        for group, number, name in collectives
    ]
    return json.dumps({"version": "2.10", "entries": entries})


ALL = Hang("collective", (0, 1, 2, 3), 4, still(9, 12), 5.0)


def test_of_ranks_in_one_step_the_one_that_has_not_come_to_a_collective_is_named() -> None:
    looks = {
        0: Look("", record(("0", 40, "nccl:all_reduce"), ("0", 41, "nccl:all_gather"), ("1", 7, "nccl:broadcast"))),
        1: Look("", record(("0", 40, "nccl:all_reduce"), ("1", 7, "nccl:broadcast"))),
        2: Look("", record(("0", 40, "nccl:all_reduce"), ("0", 41, "nccl:all_gather"))),
        3: Look("", record(("0", 41, "nccl:all_gather"), ("2", 9, "nccl:send"))),
    }
    hung = with_looks(ALL, looks)
    assert hung.ranks == (1,)
    assert hung.describe(HOSTS, ranks_per_node=2).startswith(
        "rank 1 on node 0 (10.0.0.1) is in step 12, and has not come to collective 41 of its group (nccl:all_gather): "
    )


def test_a_rank_whose_interpreter_answers_nobody_is_named() -> None:
    looks = {rank: Look("", record(("0", 41, "gloo:all_reduce"))) for rank in (0, 1, 3)} | {2: Look("")}
    assert with_looks(ALL, looks).ranks == (2,)


def test_where_all_wait_in_one_collective_the_network_is_suspected() -> None:
    hung = with_looks(ALL, {rank: Look("", record(("0", 41, "gloo:all_reduce"))) for rank in range(4)})
    assert hung.ranks == ALL.ranks
    text = hung.describe(HOSTS, ranks_per_node=2)
    assert text.startswith(
        "all 4 ranks are in step 12, none of them behind, and wait in the same collective (gloo:all_"
    )
    assert "look at the network between the nodes" in text


def test_without_records_and_of_other_hangs_the_verdict_stays() -> None:
    assert with_looks(ALL, {rank: Look("stacks") for rank in range(4)}) == ALL
    assert with_looks(ALL, {0: Look("", record(("0", 1, "x"), p2p=True))}) == ALL
    stopped = replace(ALL, what="stopped", ranks=(2,))
    looks = {0: Look("", record(("0", 5, "x"))), 1: Look("", record(("0", 4, "x")))}
    assert with_looks(stopped, looks) == stopped


def test_artifacts_hold_all_ranks_in_order_with_their_nodes() -> None:
    looks = {1: {2: Look("S\nthere\n")}, 0: {1: Look("R\nhere\n", '{"entries": []}')}}
    found = artifacts_of(7, looks)
    assert found == {
        "hangs/generation-00007/stacks.txt": "==== rank 1, node 0: R\nhere\n\n==== rank 2, node 1: S\nthere\n",
        "hangs/generation-00007/collectives.json": '{"1": {"entries": []}}',
    }
    assert list(artifacts_of(7, {0: {0: Look("x")}})) == ["hangs/generation-00007/stacks.txt"]
