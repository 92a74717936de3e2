"""Nodes that come and go, on a real Ray cluster: nobody types anything, and no bit and no point differs
where the world is the same.

One node is a head without room for ranks; the others have room for one rank each.
"""

import re
from collections.abc import Iterator

import pytest
from ray_cluster import Cluster, losses, ray_cluster, record_when_saved, same_as
from waiting import wait_for

from raynium import Run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 240
CHANGES = {
    "optimizer.learning_rate": 3e-3,
    # The rate at a step is the same however many there are.
    "optimizer.schedule": "constant",
    "train.steps": STEPS,
    "train.global_batch_size": 8,
    "checkpoint.every_steps": 10,
    "evaluate.every_steps": STEPS,
    "evaluate.max_documents": 2,
    "cluster.nodes": 2,
    "cluster.ranks_per_node": 1,
    "preflight.before_run": "none",
}
HOSTS, FOURTH = ["127.0.0.3", "127.0.0.4", "127.0.0.5"], "127.0.0.6"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ray_cluster(tmp_path_factory.mktemp("cluster"), CHANGES, head_cpus=0) as cluster:
        start_missing(cluster)
        yield cluster


def start_missing(cluster: Cluster) -> None:
    for host in HOSTS:
        if host not in cluster.nodes:
            cluster.start_node(host)


@pytest.fixture(autouse=True)
def all_nodes(cluster: Cluster) -> None:
    """Those that the test before has killed are there again."""
    start_missing(cluster)


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster) -> Run:
    run = cluster.client().submit(cluster.job_file, name="uninterrupted")
    assert run.wait(240).generation == 1
    return run


def test_a_spare_takes_the_place_of_a_lost_node_at_once_from_a_copy_of_its_memory(
    cluster: Cluster, uninterrupted: Run
) -> None:
    changes = {"cluster.spares": 1, "fault.buddy_copies": True, "fault.snapshot_every_steps": 5}
    changes["checkpoint.every_steps"] = 30
    run = cluster.client().submit(cluster.job_file, overrides=changes, name="spare")
    record = record_when_saved(run, step=30)
    assert record.agents is not None and len(record.agents) == 2
    lost = record.agents[1]["host"]
    cluster.kill_node(lost)
    finished = run.wait(240)
    assert finished.generation == 2 and finished.agents is not None
    assert lost not in [agent["host"] for agent in finished.agents]
    assert "generation 2: 2 ranks on 2 node(s), from the snapshot of step" in run.logs()
    same_as(run, uninterrupted, steps=STEPS)


def test_a_lost_node_without_a_spare_is_waited_for_and_its_agent_alone_is_replaced(
    cluster: Cluster, uninterrupted: Run
) -> None:
    for host in HOSTS[2:]:
        cluster.kill_node(host)
    run = cluster.client().submit(cluster.job_file, name="replaced")
    record = record_when_saved(run, step=20)
    assert record.agents is not None
    stays, lost = record.agents
    cluster.kill_node(lost["host"])
    wait_for(lambda: "waiting for 2 nodes" in run.logs(), pause_seconds=0.5)
    cluster.start_node(HOSTS[2])
    finished = run.wait(240)
    assert finished.generation == 2 and finished.agents == [stays, finished.agents[1]]
    assert finished.agents[1]["host"] == HOSTS[2]
    same_as(run, uninterrupted, steps=STEPS)


def test_a_run_goes_on_on_one_node_and_takes_the_second_again_when_it_is_back_from_memory_both_times(
    cluster: Cluster, uninterrupted: Run
) -> None:
    changes = {"cluster.min_nodes": 1, "fault.replace_seconds": 1.0, "train.steps": 100_000}
    changes |= {"fault.buddy_copies": True, "fault.snapshot_every_steps": 5, "checkpoint.every_steps": 30}
    run = cluster.client().submit(cluster.job_file, overrides=changes, name="shrinks")
    record = record_when_saved(run, step=30)
    assert record.agents is not None
    free = next(host for host in HOSTS if host not in [agent["host"] for agent in record.agents])
    cluster.kill_node(free)
    cluster.kill_node(record.agents[1]["host"])
    shrunk = step_of(run, r"generation 2: 1 ranks on 1 node\(s\), from the snapshot of step (\d+) in memory of 2 ranks")
    cluster.start_node(free)
    grown = step_of(run, r"generation 3: 2 ranks on 2 node\(s\), from the snapshot of step (\d+) in memory of 1 ranks")
    assert "generation 2 saves and ends: there are nodes for more ranks again" in run.logs()
    wait_for(lambda: run.record().step >= max(grown, STEPS) + 10, pause_seconds=0.5)
    run.stop()
    stopped = run.wait(120)
    assert (stopped.state, stopped.generation) == ("stopped", 3)
    # The rank that missed its peer, or Ray: whoever notices first.
    lost = [each for each in stopped.incidents or () if each["what"] in ("agents", "ranks")]
    # Of the newest snapshot the copy may have been on its way.
    assert lost and sum(each["steps"] for each in lost) <= 2 * 5, stopped.incidents
    ours = losses(run)
    assert set(ours) == set(range(1, stopped.step + 1)) and all(len(values) == 1 for values in ours.values())
    # The samples are the same; sums of another order differ in their last bits.
    for step, (loss,) in losses(uninterrupted).items():
        assert ours[step] == [pytest.approx(loss, rel=2e-2 if step > shrunk else 0)]


def test_a_run_for_which_not_all_nodes_come_starts_on_fewer_and_takes_the_others_when_they_do(
    cluster: Cluster, uninterrupted: Run
) -> None:
    changes = {"cluster.nodes": 4, "cluster.min_nodes": 1, "fault.replace_seconds": 2.0, "train.steps": 100_000}
    run = cluster.client().submit(cluster.job_file, overrides=changes, name="starts-on-fewer")
    record_when_saved(run, step=10)
    logs = run.logs()
    assert "the run starts on 2 of 4 nodes (cluster.min_nodes 1): no more have come within 2 s" in logs
    assert "generation 1: 2 ranks on 2 node(s), from step 0" in logs, "three nodes cannot share 8 samples"
    cluster.start_node(FOURTH)
    try:
        grown = step_of(run, r"generation 2: 4 ranks on 4 node\(s\), from the checkpoint of step (\d+)")
        assert "generation 1 saves and ends: there are nodes for more ranks" in run.logs()
        wait_for(lambda: run.record().step >= grown + 5, pause_seconds=0.5)
        run.stop()
        stopped = run.wait(120)
    finally:
        cluster.kill_node(FOURTH)
    assert stopped.state == "stopped" and not stopped.incidents
    ours = losses(run)
    assert set(ours) == set(range(1, stopped.step + 1)) and all(len(values) == 1 for values in ours.values())
    for step, (loss,) in losses(uninterrupted).items():
        if step <= stopped.step:
            assert ours[step] == [pytest.approx(loss, rel=2e-2 if step > grown else 0)]


def step_of(run: Run, line: str) -> int:
    """Waits for this line of the run's output, and returns the step that it names."""
    wait_for(lambda: re.search(line, run.logs()) is not None, pause_seconds=0.5)
    found = re.search(line, run.logs())
    assert found is not None
    return int(found[1])


def test_a_run_that_waits_for_a_node_ends_at_once_when_it_is_stopped(cluster: Cluster) -> None:
    run = cluster.client().submit(cluster.job_file, overrides={"train.steps": 100_000}, name="stopped-while-waiting")
    record = record_when_saved(run, step=20)
    assert record.agents is not None
    hosts = [agent["host"] for agent in record.agents]
    cluster.kill_node(next(host for host in HOSTS if host not in hosts))
    cluster.kill_node(hosts[1])
    wait_for(lambda: "waiting for 2 nodes" in run.logs(), pause_seconds=0.5)
    run.stop()
    assert run.wait(60).state == "stopped"
