"""The whole path on a real Ray cluster: `ray start`, jobs, Ray Train, agents, ranks, MLflow. One cluster for all.

The cluster asks for a token and listens on loopback. Each test runs the same tiny model; whatever was killed on the
way, its losses must be those of the run that nothing happened to.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from neuron_twin import RECORD_VARIABLE, write_site
from ray_cluster import Cluster, losses, ray_cluster, record_when_saved, same_as
from standalone_ranks import trained
from test_pairs import sums
from test_records import chat, write_lines
from tiny import job_text
from waiting import wait_for

from raynium import Client, Run, find_run
from raynium.checkpoint.catalog import latest
from raynium.checkpoint.compare import differences
from raynium.config.schema import ModelSection
from raynium.data.build.store_build import build_store
from raynium.errors import ConfigError, LaunchError, RunFailed, RunInUse
from raynium.storage.store import Store

# What is waited for in here has limits of its own.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[1]
CHANGES = {
    "optimizer.learning_rate": 3e-3,
    "train.steps": 60,
    "train.global_batch_size": 8,
    "checkpoint.every_steps": 10,
    "evaluate.every_steps": 30,
    "evaluate.max_documents": 2,
    "sample.prompts": ["def "],
    "sample.max_new_tokens": 8,
}
LOOPBACK = "127.0.0.1"
NEURON_CORES = '--resources={"neuron_cores":2}'  # of each node
LONG = 160  # steps of a run that is to be interrupted: some seconds


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "records").mkdir()
    # Every process of the cluster finds a Trainium2; jobs that name the CPU do not ask for it.
    twin = write_site(folder / "twin") | {RECORD_VARIABLE: str(folder / "records")}
    with ray_cluster(folder, CHANGES, head_cpus=4, environment=twin, options=NEURON_CORES) as cluster:
        cluster.start_node("127.0.0.3", NEURON_CORES)
        yield cluster


@dataclass(frozen=True)
class ByScript:
    """A run that `ray job submit` started, and all that it printed."""

    run: Run
    output: str


@pytest.fixture(scope="module")
def by_script(cluster: Cluster) -> ByScript:
    command = [
        *(str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", cluster.address),
        *("--runtime-env", "cluster/runtime_env.yaml", "--", "python", "jobs/train.py", str(cluster.job_file)),
        *(f"train.steps={LONG}", "run.name=uninterrupted"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return ByScript(find_run("uninterrupted", str(cluster.folder)), done.stdout)


@pytest.fixture(scope="module")
def uninterrupted(by_script: ByScript) -> Run:
    """What the runs that the SDK submits are compared with."""
    return by_script.run


def test_ray_job_submit_builds_data(cluster: Cluster) -> None:
    """The same tokens as in one process, in a store whose name stands for a folder below the root."""
    from raynium.data.verify import verify_store

    command = [
        *(str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", cluster.address),
        *("--runtime-env", "cluster/runtime_env.yaml", "--", "python", "jobs/build_data.py", "by-job"),
        *("--from", str(cluster.folder / "text"), "--tokenizer", str(cluster.folder / "data")),
        *("--heldout-fraction", "0.2", "--root", str(cluster.folder)),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    store = cluster.folder / "data/by-job"
    assert verify_store(store).identity == verify_store(cluster.folder / "data").identity
    assert "joining the Ray cluster at auto" in done.stdout and str(store) in done.stdout


def test_ray_job_submit_runs_the_job_script(by_script: ByScript) -> None:
    assert f"run uninterrupted: finished at step {LONG} of {LONG}" in by_script.output
    assert "sampled from the model" in by_script.output
    assert "MLflow page: http://127.0.0.1:5000/#/experiments/" in by_script.output


def test_the_sdk_looks_at_a_run(uninterrupted: Run) -> None:
    record = uninterrupted.record()
    assert record.result is not None and record.result["bits_per_byte"] < record.result["unigram_bits_per_byte"]
    assert uninterrupted.metrics("eval/bits_per_byte")[-1].value == record.result["bits_per_byte"]
    assert [each.step for each in uninterrupted.checkpoints()] == [LONG - 10, LONG]
    assert uninterrupted.sample("def function_1_2(", temperature=0, max_new_tokens=4).startswith("def function_1_2(")
    assert record.result["samples"][0].startswith("def ")


def test_a_run_by_the_sdk_whose_agent_is_killed_changes_no_bit(cluster: Cluster, uninterrupted: Run) -> None:
    run = cluster.client().submit(cluster.job_file, overrides={"train.steps": LONG}, name="agent-killed")
    record = record_when_saved(run, step=20)
    assert record.agents is not None
    os.kill(record.agents[0]["pid"], signal.SIGKILL)
    assert run.wait(240).generation == 2
    assert "a node agent was lost" in run.logs() and "held-out documents" in run.logs()
    same_as(run, uninterrupted, steps=LONG)


def test_a_killed_coordinator_costs_no_generation_and_no_point(cluster: Cluster, uninterrupted: Run) -> None:
    run = cluster.client().submit(cluster.job_file, overrides={"train.steps": LONG}, name="coordinator-killed")
    record_when_saved(run, step=20)
    os.kill(actor_pid(cluster, "RunCoordinator"), signal.SIGKILL)
    assert run.wait(240).generation == 1
    assert "the run coordinator was started again and found generation 1" in run.logs()
    same_as(run, uninterrupted, steps=LONG)


def test_a_killed_controller_of_ray_train_is_started_again_and_changes_no_bit(
    cluster: Cluster, uninterrupted: Run
) -> None:
    run = cluster.client().submit(cluster.job_file, overrides={"train.steps": LONG}, name="controller-killed")
    record_when_saved(run, step=20)
    os.kill(actor_pid(cluster, "TrainController"), signal.SIGKILL)
    assert run.wait(240).generation == 2
    assert "Ray Train's controller died" in run.logs() and "from the checkpoint of step" in run.logs()
    same_as(run, uninterrupted, steps=LONG)


def test_a_job_that_waits_says_what_is_free_and_who_holds_the_rest(cluster: Cluster) -> None:
    endless = {"train.steps": 100_000, "evaluate.every_steps": 100_000}
    holds = cluster.client().submit(cluster.job_file, overrides=endless, name="holds-two")
    record_when_saved(holds, step=10)
    waits = cluster.client().submit(
        cluster.job_file, overrides={"cluster.ranks_per_node": 4, "preflight.before_run": "none"}, name="waits-for-four"
    )
    wait_for(lambda: "waiting for" in waits.logs(), pause_seconds=1)
    assert "127.0.0.2: 2 of 4 free, 2 held by run holds-two" in waits.logs()
    holds.stop()
    stopped = holds.wait(120)
    assert (stopped.state, stopped.stopped_by) == ("stopped", "raynium stop")
    assert holds.client is not None and holds.job_id is not None
    assert holds.client.job_state(holds.job_id) == "SUCCEEDED", "it did as it was asked"
    assert waits.wait(240).state == "finished"


def actor_pid(cluster: Cluster, name: str) -> int:
    """Of the one actor of this class that the cluster has now."""
    found = subprocess.run(["pgrep", "-f", f"^ray::{name}"], capture_output=True, text=True).stdout.split()
    mine = [pid for pid in map(int, found) if str(cluster.folder).encode() in Path(f"/proc/{pid}/environ").read_bytes()]
    assert len(mine) == 1, "of this cluster"
    return mine[0]


def test_two_nodes_compute_the_same_bits_and_restart_together(cluster: Cluster, uninterrupted: Run) -> None:
    two_nodes = {"train.steps": LONG, "cluster.nodes": 2, "cluster.ranks_per_node": 1}
    run = cluster.client().submit(cluster.job_file, overrides=two_nodes, name="two-nodes")
    # While an agent forks its spares, in the first seconds, it says nothing, and a peer's word may be the first.
    record = record_when_saved(run, step=60)
    assert record.agents is not None and {agent["host"] for agent in record.agents} == {"127.0.0.2", "127.0.0.3"}
    os.kill(rank_pid(record.agents[1]["pid"]), signal.SIGKILL)
    finished = run.wait(240)
    assert finished.state == "finished" and finished.generation == 2
    assert "generation 1 failed: rank 1: killed by SIGKILL" in run.logs()
    same_as(run, uninterrupted, steps=LONG)


def test_a_mixture_of_packed_stores_outlives_a_rank_and_its_driver_on_two_nodes(cluster: Cluster) -> None:
    """One dies before the stage that changes the weights, the other in it."""
    tokenizer = cluster.folder / "data/tokenizer.json"
    for name in ("web", "code"):
        (cluster.folder / "mixed" / name).mkdir(parents=True)
        for number in range(60):
            text = "\n".join(f"{name} {number} = {line}" for line in range(number % 7 + 1))
            (cluster.folder / f"mixed/{name}/{number}.txt").write_text(text)
        source = str(cluster.folder / "mixed" / name)
        build_store(
            cluster.folder / "data" / name,
            source=source,
            vocab_size=512,
            heldout_fraction=0.2,
            tokenizer_path=str(tokenizer),
        )
    mixture = {
        "data.path": None,
        "data.mixture": [{"store": "web", "weight": 0.7}, {"store": "code", "weight": 0.3}],
        "data.stages": [{"from_step": 40, "weights": {"web": 1, "code": 5}}],
        "data.packing": "documents",
        "cluster.nodes": 2,
        "cluster.ranks_per_node": 1,
        "train.steps": LONG,
    }
    job_file = cluster.folder / "mixed.yaml"
    job_file.write_text(job_text({"run.root": str(cluster.folder)} | CHANGES | mixture))
    # Without Ray: two ranks that nothing happens to.
    trained(job_file, "run.name=mixed", "cluster.nodes=1", "cluster.ranks_per_node=2")
    killed = cluster.client().submit(job_file, name="mixed-killed")
    record = record_when_saved(killed, step=10)
    assert record.agents is not None and len(record.agents) == 2
    os.kill(rank_pid(record.agents[1]["pid"]), signal.SIGKILL)
    record = record_when_saved(killed, step=50)
    os.kill(record.owner.pid, signal.SIGKILL)
    with pytest.raises(RunFailed, match="its driver died"):
        killed.wait(200)
    assert "generation 1 failed: rank 1: killed by SIGKILL" in killed.logs()
    killed = cluster.client().submit(job_file, name="mixed-killed")
    assert killed.wait(240).state == "finished"
    one, other = (latest(Store(cluster.folder / name)) for name in ("mixed", "mixed-killed"))
    assert one is not None and other is not None and one.step == other.step == LONG
    assert not list(differences(one, other))
    for name in ("train/loss", "data/web/tokens", "data/code/tokens", "data/web/epochs"):
        points = killed.metrics(name)
        assert [each.step for each in points] == list(range(1, LONG + 1))
    seen = sum(killed.metrics(f"data/{name}/tokens")[-1].value for name in ("web", "code"))
    assert 0 < seen <= LONG * 8 * 32


def rank_pid(agent_pid: int) -> int:
    """The rank that this agent's template forked."""
    templates = subprocess.run(["pgrep", "-P", str(agent_pid)], capture_output=True, text=True).stdout.split()
    for template in templates:
        if forked := subprocess.run(["pgrep", "-P", template], capture_output=True, text=True).stdout.split():
            return int(forked[0])
    raise AssertionError(f"agent {agent_pid} has no rank")


def test_two_nodes_with_neuron_cores_train_the_twin(cluster: Cluster, uninterrupted: Run) -> None:
    """Each rank has the core and the root communicator that the runtime must be told of. Needs no Trainium."""
    on_neuron = {
        "preflight.before_run": "host",
        "cluster.accelerator": "neuron",
        "cluster.nodes": 2,
        "cluster.ranks_per_node": 2,
    }
    run = cluster.client().submit(cluster.job_file, overrides=on_neuron, name="on-neuron")
    assert run.wait(240).state == "finished"
    records = [json.loads(path.read_text()) for path in sorted((cluster.folder / "records").iterdir())]
    assert [(each["RANK"], each["LOCAL_RANK"], each["NEURON_RT_VISIBLE_CORES"]) for each in records] == [
        ("0", "0", "0"),
        ("1", "1", "1"),
        ("2", "0", "0"),  # the second node's
        ("3", "1", "1"),
    ]
    (root,) = {each["NEURON_RT_ROOT_COMM_ID"] for each in records}
    assert root.rpartition(":")[0] in ("127.0.0.2", "127.0.0.3")
    assert [each["NEURON_PROCESS_TAG"] for each in records] == [f"on-neuron/rank-{rank:05d}" for rank in range(4)]
    # The schedule is as long as train.steps, so only the first steps are the other run's.
    assert losses(run)[1] == pytest.approx(losses(uninterrupted)[1], rel=1e-6)
    # A counter has points from its first change on.
    assert run.metrics("device/fallback_operators") == []
    assert {point.value for point in run.metrics("throughput/peak_flops_per_rank")} == {45.25e12}
    assert "MFU is a share of 45.25 TFLOP/s, dense float32, of one logical NeuronCore of trn2.3xlarge" in run.logs()


def test_a_killed_driver_is_continued_by_the_next_one(cluster: Cluster, uninterrupted: Run) -> None:
    run = cluster.client().submit(cluster.job_file, overrides={"train.steps": LONG}, name="driver-killed")
    record = record_when_saved(run, step=20)
    os.kill(record.owner.pid, signal.SIGKILL)
    with pytest.raises(RunFailed, match="its driver died"):
        run.wait(200)
    again = cluster.client().submit(cluster.job_file, overrides={"train.steps": LONG}, name="driver-killed")
    finished = again.wait(240)
    assert finished.mlflow_run_id == record.mlflow_run_id
    assert "from the checkpoint of step" in again.logs()
    ledger = finished.ledger
    assert ledger.down > 0 and ledger.train > 0 and ledger.step == LONG and "goodput: " in again.logs()
    assert ledger.total == pytest.approx(finished.heartbeat_unix - finished.created_unix, abs=1)
    shown = {name: again.metrics(f"goodput/{name}_seconds")[-1].value for name in ("down", "start", "train")}
    assert shown == pytest.approx({"down": ledger.down, "start": ledger.start, "train": ledger.train})
    same_as(again, uninterrupted, steps=LONG)


def test_ray_job_stop_saves_first_and_the_same_job_goes_on(cluster: Cluster, uninterrupted: Run) -> None:
    client = cluster.client()
    run = client.submit(cluster.job_file, overrides={"train.steps": LONG}, name="job-stopped")
    record_when_saved(run, step=20)
    with pytest.raises(RunInUse, match="in use"):
        client.submit(cluster.job_file, name="job-stopped")
    client._connected().stop_job(run.job_id)
    stopped = run.wait(120)
    assert stopped.state == "stopped" and run.checkpoints()[-1].step == stopped.step
    again = client.submit(cluster.job_file, overrides={"train.steps": LONG}, name="job-stopped")
    assert again.wait(240).state == "finished"
    same_as(again, uninterrupted, steps=LONG)


def test_raynium_stop_reaches_a_job(cluster: Cluster) -> None:
    run = cluster.client().submit(cluster.job_file, overrides={"train.steps": 100_000}, name="asked-to-stop")
    record_when_saved(run, step=20)
    find_run("asked-to-stop", str(cluster.folder)).stop()
    stopped = run.wait(120)
    assert stopped.state == "stopped" and run.checkpoints()[-1].step == stopped.step > 20


def test_a_job_that_cannot_run_ends_with_the_reason(cluster: Cluster) -> None:
    run = cluster.client().submit(
        cluster.job_file, overrides={"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 1e30}, name="bad-rate"
    )
    with pytest.raises(RunFailed, match="not finite, so nothing was learned from it"):
        run.wait(120)


def test_bad_input_is_refused_before_anything_is_submitted(cluster: Cluster) -> None:
    client = cluster.client()
    before = len(client._connected().list_jobs())
    with pytest.raises(ConfigError, match="did you mean"):
        client.submit(cluster.job_file, overrides={"train.stepz": 3})
    with pytest.raises(ConfigError, match="global_batch_size"):
        client.submit(cluster.job_file, overrides={"train.global_batch_size": 3})
    assert len(client._connected().list_jobs()) == before


def test_a_cluster_that_does_not_answer_is_named() -> None:
    with pytest.raises(LaunchError, match=r"cannot reach a Ray cluster at http://127\.0\.0\.1:1"):
        Client("http://127.0.0.1:1").submit("quickstart", overrides={"run.name": "nowhere"})


def test_a_refused_token_is_named(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(LaunchError, match="RAY_AUTH_TOKEN"):
        Client(cluster.address).submit(cluster.job_file, name="wrong-token")


def test_a_job_begins_with_published_weights_that_its_ranks_read(
    cluster: Cluster, hugging_face: Callable[..., Path], tmp_path: Path
) -> None:
    """Submitted from Python, by a job file that says nothing else of the model."""
    fields = yaml.safe_load(job_text(CHANGES, root=cluster.folder))
    dimensions = fields.pop("model")
    folder = hugging_face(ModelSection(**dimensions))
    shutil.copy(cluster.folder / "data/tokenizer.json", folder)
    fields |= {"model": {"init": str(folder)}}
    fields["train"]["steps"], fields["run"]["name"] = 3, "from-weights"
    job_file = tmp_path / "job.yaml"
    job_file.write_text(yaml.safe_dump(fields))
    run = cluster.client().submit(job_file)
    record = run.wait(timeout_seconds=300)
    assert record.state == "finished" and record.step == 3
    model = record.config["model"]
    assert model["init"] == str(folder) and len(model["init_identity"]) == 64 and model["hidden_size"] == 32
    assert "begins with" in run.logs()
    # The driver leaves them where they are.
    assert not list(Path(run.url.removeprefix("file://")).glob("*.safetensors"))


def fine_tuning(cluster: Cluster, task: str, records: list[dict[str, Any]], **data: Any) -> Path:
    """The job file of two steps on these records, whose store and tokenizer the driver makes."""
    fields = yaml.safe_load(
        job_text(CHANGES | {"train.steps": 2, "train.micro_batch_size": 2, "data.path": None}, root=cluster.folder)
    )
    source = write_lines(cluster.folder / f"{task}.jsonl", records)
    fields["data"] = {"source": str(source), "seq_len": 64, "chat_template": "chatml"} | data
    fields["run"]["name"] = fields["task"] = task
    del fields["sample"]
    path = cluster.folder / f"{task}.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def test_a_job_by_the_sdk_learns_from_chats_and_the_run_can_be_talked_to(cluster: Cluster, tmp_path: Path) -> None:
    job_file = fine_tuning(cluster, "sft", [chat(number, 2) for number in range(80)], packing="documents")
    run = cluster.client().submit(job_file)
    record = run.wait(timeout_seconds=300)
    assert (record.state, record.step, record.config["task"]) == ("finished", 2, "sft")
    assert [point.step for point in run.metrics("eval/perplexity")] == [2] and set(losses(run)) == {1, 2}
    answer = run.chat(system="Be brief.").say("what is 3 and 4?")
    assert isinstance(next(answer), str)
    questions = write_lines(tmp_path / "asked.jsonl", [{"context": "it is", "choices": ["3", "four"], "answer": 0}])
    assert run.evaluate(questions).keys() == {"eval/asked/acc", "eval/asked/acc_norm"}


def test_a_job_by_the_command_learns_preferences(cluster: Cluster) -> None:
    job_file = fine_tuning(cluster, "dpo", [sums(number) for number in range(80)])
    command = [str(Path(sys.executable).parent / "raynium"), "submit", str(job_file), "--address", cluster.address]
    done = subprocess.run([*command, "--wait"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    run = find_run("dpo", str(cluster.folder))
    # The first policy is its own reference.
    assert losses(run)[1] == [pytest.approx(0.693147, abs=1e-5)]
    assert [point.step for point in run.metrics("rewards/margins")] == [1, 2]
    assert list((cluster.folder / "data").rglob("reference/*/*.bin"))
