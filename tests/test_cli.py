"""The `raynium` command on runs as a driver leaves them: a real record, a real checkpoint, no cluster."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from commands import Ended, run_command
from tiny import job_text

from raynium import sdk
from raynium.cli.app import app
from raynium.config.load import parse_config
from raynium.errors import LaunchError
from raynium.models.decoder import Decoder
from raynium.run.record import Owner, RecordKeeper, claim
from raynium.storage.store import Store

SIZES = {"model.vocab_size": 320, "model.num_layers": 1, "model.max_seq_len": 16, "data.seq_len": 16}
COMMANDS = ("train", "submit", "runs", "status", "logs", "stop", "sample", "ui", "checkpoints", "data")


@pytest.fixture
def raynium(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Runs a command in this process, in a folder of its own."""
    for name in ("RAYNIUM_HOME", "RAYNIUM_ROOT", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sdk.run, "POLL_SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)

    return partial(run_command, monkeypatch=monkeypatch, capsys=capsys)


@pytest.fixture
def run(tmp_path: Path, save_run: Callable[..., Store]) -> RecordKeeper:
    """A live run `first` under ./runs with a checkpoint of step 4; this process is its driver."""
    root = tmp_path / "runs"
    config = parse_config(job_text(SIZES | {"run.name": "first", "train.steps": 6}, root=root))
    torch.manual_seed(0)
    store = save_run(Decoder(config.model), config)
    keeper = claim(store, "first", config.model_dump(mode="json"))
    (tmp_path / "driver.log").write_text("generation 1: 1 rank\n")
    keeper.update(
        state="running",
        step=4,
        metrics={"train/loss": 3.25, "eval/bits_per_byte": 2.125},
        mlflow_uri=f"sqlite:///{root}/mlflow.db",
        mlflow_run_id="m1",
        mlflow_experiment_id="1",
        log_path=str(tmp_path / "driver.log"),
    )
    return keeper


def die(keeper: RecordKeeper) -> None:
    record = replace(keeper.record, owner=Owner("elsewhere", "boot", 1, "1"), heartbeat_unix=0.0)
    keeper._store.replace("run.json", record.to_json())


# ------------------------------------------------------------------------------------------------- help


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom raynium.cli import app as cli\nsys.argv = ['raynium', '--help']\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'mlflow', 'rich', 'numpy', 'pydantic', 'yaml', 'fsspec'} & set(sys.modules)\n"
        "sys.stderr.write(' '.join(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    lines = done.stdout.partition("Commands:")[2].strip().splitlines()
    assert {line.split()[0] for line in lines} >= set(COMMANDS)
    assert not any(line.endswith("...") for line in lines), "every command's first sentence fits on its line"


def commands(group: Any, *names: str) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield from commands(command, *names, name) if hasattr(command, "commands") else [(*names, name)]


@pytest.mark.parametrize("command", [*commands(typer.main.get_command(app))], ids=" ".join)
def test_every_command_explains_itself_with_an_example(raynium: Callable[..., Ended], command: tuple[str, ...]) -> None:
    ended = raynium(*command, "--help")
    assert ended.code == 0 and ended.out.startswith(f"Usage: raynium {' '.join(command)}")
    assert f"xample: raynium {' '.join(command)} " in " ".join(ended.out.split()) + " "


def test_the_version_is_the_packages(raynium: Callable[..., Ended]) -> None:
    assert raynium("--version") == Ended(0, f"raynium {metadata.version('raynium')}\n", "")


def test_the_installed_command_is_this_one() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "raynium"), "no-such-command"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "No such command 'no-such-command'" in done.stderr


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "quickstart", "train.stepz=3"], 2, "did you mean train.steps?"),
        (["train", "quikstart"], 2, "did you mean the preset quickstart?"),
        (["train", "llama3-8b"], 2, "3 problems:\n  - run.root is 's3://YOUR-BUCKET/runs'"),
        (["submit", "quickstart", "train.global_batch_size=3"], 2, "train.global_batch_size is 3"),
        (["runs", "--root", "ftp://host/runs"], 1, "has the scheme 'ftp'"),
        (["status", "nothing"], 1, "no run 'nothing' at"),
        (["logs", "nothing"], 1, "no run 'nothing' at"),
        (["stop", "nothing"], 1, "no run 'nothing' at"),
        (["sample", "nothing", "def"], 1, "has no checkpoint. Check its name"),
        (
            ["data", "verify", "nothing"],
            1,
            "runs/data/nothing is no document store: it has no manifest.json; give the",
        ),
        (["ui"], 1, "mlflow.db yet: runs under runs have tracked nothing there"),
        (["ui", "nothing"], 1, "no run 'nothing' at"),
    ],
)
def test_a_mistake_ends_in_one_message(
    raynium: Callable[..., Ended], arguments: list[str], code: int, message: str
) -> None:
    ended = raynium(*arguments)
    assert (ended.code, ended.out) == (code, "")
    assert ended.err.startswith("error: ") and message in ended.err


def test_a_cluster_that_does_not_answer_is_one_message(
    raynium: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(address: str) -> Any:
        raise LaunchError(f"cannot reach a Ray cluster at {address}")

    monkeypatch.setattr("raynium.launch.jobs.connect_jobs", connect)
    ended = raynium("submit", "quickstart", "--address", "http://127.0.0.1:1")
    assert (ended.code, ended.err) == (1, "error: cannot reach a Ray cluster at http://127.0.0.1:1\n")


# ------------------------------------------------------------------------------------------------- looking


def test_runs_lists_what_is_there(raynium: Callable[..., Ended], run: RecordKeeper) -> None:
    listed = raynium("runs").out.splitlines()
    assert listed[1].split()[:4] == ["first", "running", "4/6", "2.125"]
    die(run)
    assert raynium("runs", "--root", str(Path("runs").absolute())).out.splitlines()[1].split()[1] == "interrupted"


def test_names_in_the_list_are_whole(raynium: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"{'llama3-8b-long-' * 3}{number:018d}" for number in range(2)]
    for name in names:
        claim(Store(Path("runs", name).absolute()), name, {"run": {"root": "runs"}, "train": {"steps": 6}})
    assert sorted(line.split()[0] for line in raynium("runs").out.splitlines()[1:]) == names


def test_without_runs_it_says_so_and_without_their_folder_it_is_a_mistake(raynium: Callable[..., Ended]) -> None:
    ended = raynium("runs")
    assert (ended.code, ended.out) == (1, "") and f"there is no folder {Path('runs').absolute()}: runs are" in ended.err
    Path("runs").mkdir()
    assert raynium("runs") == Ended(0, "no runs under runs\n", "")
    assert raynium("runs", "--json") == Ended(0, "[]\n", "")


@pytest.mark.parametrize(
    "command",
    [
        *(["runs", "--root", "PATH"], ["ui", "--root", "PATH"], ["status", "a", "--root", "PATH"]),
        *(["train", "PATH"], ["train", "./PATH"], ["config", "--diff", "PATH.yaml"], ["data", "verify", "PATH"]),
        *(["checkpoints", "import", "PATH", "base"], ["checkpoints", "ls", "PATH"]),
        *(["checkpoints", "export", "first", "PATH"], ["checkpoints", "import", "x", "y", "--tokenizer", "PATH"]),
    ],
    ids=" ".join,
)
def test_a_path_that_the_system_does_not_look_at_is_one_message(
    raynium: Callable[..., Ended], run: RecordKeeper, command: list[str]
) -> None:
    # As root, no permission is missing; but no name may be so long.
    ended = raynium(*(word.replace("PATH", "x" * 300) for word in command))
    assert ended.code in (1, 2) and ended.err.startswith("error: ") and ended.err.count("\n") == 1


def test_a_record_that_is_none_hides_no_other_run(raynium: Callable[..., Ended], run: RecordKeeper) -> None:
    for name, text in {"deep": "[" * 100_000, "list": "[]", "null": "null", "empty": "{}"}.items():
        Path("runs", name).mkdir()
        Path("runs", name, "run.json").write_text(text)
        ended = raynium("status", name)
        assert ended.code == 1 and "run.json is not a run record" in ended.err
    assert "first" in raynium("runs").out


@pytest.mark.parametrize("port", ["0", "-1", "65536"])
def test_what_is_no_port_is_refused(raynium: Callable[..., Ended], run: RecordKeeper, port: str) -> None:
    ended = raynium("ui", "--port", port)
    assert ended.code == 2 and "Invalid value for '--port'" in ended.err


def test_runs_and_status_as_json(raynium: Callable[..., Ended], run: RecordKeeper) -> None:
    run.update(metrics={"train/loss": 3.25, "eval/loss": float("nan")})
    (listed,) = json.loads(raynium("runs", "--json").out)
    assert (listed["name"], listed["state"], listed["step"], listed["steps"]) == ("first", "running", 4, 6)
    assert listed["metrics"] == {"train/loss": 3.25, "eval/loss": None}
    assert listed["page"] == "http://127.0.0.1:5000/#/experiments/1/runs/m1?workflowType=machine_learning"
    shown = json.loads(raynium("status", "first", "--json").out)
    (checkpoint,) = shown.pop("checkpoints")
    assert shown.keys() == listed.keys() and checkpoint["step"] == 4 and checkpoint["kept_for"]
    die(run)
    (listed,) = json.loads(raynium("runs", "--json").out)
    assert listed["state"] == "interrupted" and "ended without a word" in listed["cause"]


def test_status_shows_state_numbers_checkpoints_and_page(raynium: Callable[..., Ended], run: RecordKeeper) -> None:
    out = raynium("status", "first").out
    assert out.startswith("run first: running at step 4 of 6\n")
    assert "MLflow page: http://127.0.0.1:5000/#/experiments/1/runs/m1?workflowType=machine_learning" in out
    assert "  train/loss                                 3.25\n" in out
    assert "  checkpoint of step 4: 0.4 MB\n" in out
    die(run)
    assert "start it again to go on" in raynium("status", "first").out
    manifest = next(Path("runs/first/checkpoints").rglob("manifest.json"))
    manifest.write_bytes(manifest.read_bytes()[:-10])
    assert "  checkpoint of step 4: 0.0 MB (damaged: " in raynium("status", "first").out


def test_logs_are_the_drivers_or_the_ranks(
    raynium: Callable[..., Ended], run: RecordKeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert raynium("logs", "first") == Ended(0, "generation 1: 1 rank\n", "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert "no rank of run 'first' has run on this host" in raynium("logs", "first", "--ranks").err
    ended = raynium("logs", "first", "--ranks", "--follow")
    assert ended.code == 2 and "--follow is for the driver's log" in ended.err


def test_logs_of_a_job_come_from_its_cluster(
    raynium: Callable[..., Ended], run: RecordKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.update(job_id="job-1")
    monkeypatch.setattr(sdk.Client, "job_logs", lambda client, job_id: f"{job_id} at {client.address}\n")
    assert raynium("logs", "first", "--address", "http://host:1").out == "job-1 at http://host:1\n"


def test_logs_are_followed_until_the_run_has_ended(
    raynium: Callable[..., Ended], run: RecordKeeper, tmp_path: Path
) -> None:
    def go_on() -> None:
        with (tmp_path / "driver.log").open("a") as log:
            log.write("step 5\n")
        run.update(state="finished", step=6)

    driver = threading.Timer(0.1, go_on)
    driver.start()
    assert raynium("logs", "first", "-f") == Ended(0, "generation 1: 1 rank\nstep 5\n", "")
    driver.join()


def test_logs_outlive_the_cluster_on_the_disk_of_the_driver(
    raynium: Callable[..., Ended], run: RecordKeeper, tmp_path: Path
) -> None:
    run.update(job_id="job-1", state="finished")
    nobody = ("--address", "http://127.0.0.1:9")
    assert raynium("logs", "first", *nobody).out == "generation 1: 1 rank\n"
    assert raynium("logs", "first", "-f", *nobody).out == "generation 1: 1 rank\n"
    (tmp_path / "driver.log").unlink()
    for options in ((), ("-f",)):
        ended = raynium("logs", "first", *options, *nobody)
        assert ended.code == 1 and "cannot reach a Ray cluster at http://127.0.0.1:9" in ended.err


def test_a_sample_begins_with_its_prompt_and_repeats(raynium: Callable[..., Ended], run: RecordKeeper) -> None:
    out = [raynium("sample", "first", "def ", "--max-new-tokens", "8", "--seed", seed).out for seed in "112"]
    assert out[0].startswith("def ") and out[0] == out[1] != out[2]
    assert raynium("sample", "first@4", "def ", "--max-new-tokens", "8", "--seed", "1").out == out[0]
    assert "no checkpoint of step 3" in raynium("sample", "first@3", "def ").err
    ended = raynium("sample", "first", "def ", "--step", "3")
    assert ended.code == 1 and "no checkpoint of step 3" in ended.err
    assert raynium("sample", "first", "def ", "--temperature", "-1").code == 2
    assert "top_p is 0.0: it must be above 0" in raynium("sample", "first", "def ", "--top-p", "0").err


def test_several_prompts_are_continued_together(raynium: Callable[..., Ended], run: RecordKeeper) -> None:
    options = ("--max-new-tokens", "8", "--seed", "1")
    alone = raynium("sample", "first", "def ", *options).out
    together = raynium("sample", "first", "def ", "def main", *options).out
    assert together.startswith(f"{alone}----------\ndef main")
    first, second = json.loads(raynium("sample", "first", "def ", "def main", *options, "--json").out)
    assert f"def {first['text']}\n----------\ndef main{second['text']}\n" == together
    assert (first["prompt"], second["prompt"], {first["ended"], second["ended"]}) == ("def ", "def main", {"length"})
    stop = first["text"][2:4]
    [ended] = json.loads(raynium("sample", "first", "def ", *options, "--stop", stop, "--json").out)
    assert (ended["text"], ended["ended"]) == (first["text"][: first["text"].find(stop)], "stop")


# ------------------------------------------------------------------------------------------------- acting


def test_stop_asks_and_waits(raynium: Callable[..., Ended], run: RecordKeeper) -> None:
    def save_and_end() -> None:
        while not run.stop_requested():
            pass
        run.update(state="stopped", step=5)

    driver = threading.Thread(target=save_and_end)
    driver.start()
    out = raynium("stop", "first").out
    driver.join()
    assert out.startswith("asked run first to save and end\nrun first: stopped at step 5 of 6\n")


def test_stop_without_waiting_only_asks(raynium: Callable[..., Ended], run: RecordKeeper) -> None:
    assert raynium("stop", "first", "--no-wait") == Ended(0, "asked run first to save and end\n", "")
    assert run.stop_requested()


def test_stop_of_a_run_that_does_not_run_leaves_no_request(raynium: Callable[..., Ended], run: RecordKeeper) -> None:
    die(run)
    assert raynium("stop", "first").out == "run first does not run: it is interrupted at step 4\n"
    run.take_over(state="finished", step=6)
    assert raynium("stop", "first").out == "run first does not run: it is finished at step 6\n"
    assert not run.stop_requested()


def test_stop_of_a_submitted_run_that_nobody_runs_keeps_supervisors_from_it(
    raynium: Callable[..., Ended], run: RecordKeeper
) -> None:
    run.take_over(job_id="raynium-first-1")
    die(run)
    out = raynium("stop", "first").out
    assert out.startswith("run first does not run: it is interrupted at step 4\nno supervisor starts it again; ")
    assert run.stop_requested()


def test_submit_prints_the_job_and_with_wait_its_log(
    raynium: Callable[..., Ended], run: RecordKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[tuple[Any, ...]] = []

    def submit(client: sdk.Client, config: str, overrides: list[str]) -> sdk.Run:
        submitted.append((client.address, config, overrides))
        return sdk.Run("first", str(Path("runs/first").absolute()), client, "job-1")

    monkeypatch.setattr(sdk.Client, "submit", submit)
    monkeypatch.setattr(sdk.Client, "job_state", lambda client, job_id: "FAILED")
    monkeypatch.setattr(sdk.Client, "job_logs", lambda client, job_id: "the log of job-1")
    out = raynium("submit", "job.yaml", "train.steps=3", "--address", "http://host:1").out
    assert out == f"run first is job job-1\nit writes to {Path('runs/first').absolute()}\n"
    assert submitted == [("http://host:1", "job.yaml", ["train.steps=3"])]
    ended = raynium("submit", "job.yaml", "--wait")
    assert ended.code == 1 and "the log of job-1" in ended.out
    assert "the job of run 'first' ended as FAILED" in ended.err
    assert submitted[1][0] == "http://127.0.0.1:8265"

    monkeypatch.setattr(sdk.Client, "job_state", lambda client, job_id: "SUCCEEDED")
    for changes, code in (({"state": "finished"}, 0), ({"state": "stopped", "stopped_by": "raynium stop"}, 3)):
        run.update(job_id="job-1", **changes)
        ended = raynium("submit", "job.yaml", "--wait")
        assert ended.code == code and ended.out.endswith("the log of job-1")

    def interrupt(run: sdk.Run) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sdk.Run, "follow", interrupt)
    ended = raynium("submit", "job.yaml", "--wait")
    assert ended.code == 130 and "the run goes on. `raynium logs -f first` follows it" in ended.out


# ------------------------------------------------------------------------------------------------- ui


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """What the process would have become."""
    commands: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda path, command, env: commands.append((command, env)))
    return commands


def test_ui_serves_the_store_of_a_root_or_of_a_run(
    raynium: Callable[..., Ended], run: RecordKeeper, executed: list[tuple[list[str], dict[str, str]]]
) -> None:
    Path("runs/mlflow.db").write_text("")
    assert (
        raynium("ui", "--port", "5001").out
        == "MLflow: http://127.0.0.1:5001/#/experiments?workflowType=machine_learning\n"
    )
    page = "MLflow page: http://127.0.0.1:5000/#/experiments/1/runs/m1?workflowType=machine_learning\n"
    assert raynium("ui", "first").out == page
    for command, environment in executed:
        assert command[:4] == [sys.executable, "-m", "mlflow", "ui"]
        assert f"sqlite:///{Path('runs').absolute()}/mlflow.db" in command
        assert command[command.index("--host") + 1] == "127.0.0.1"
        assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true" and environment["PATH"] == os.environ["PATH"]
    assert [command[command.index("--port") + 1] for command, _ in executed] == ["5001", "5000"]


def test_a_taken_port_is_no_page(
    raynium: Callable[..., Ended], run: RecordKeeper, executed: list[tuple[list[str], dict[str, str]]]
) -> None:
    Path("runs/mlflow.db").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = raynium("ui", "first", "--port", str(port))
    assert (ended.code, ended.out, executed) == (1, "", [])
    assert f"port {port} of 127.0.0.1 is in use" in ended.err and "--port" in ended.err


def test_ui_of_a_server_is_its_address(
    raynium: Callable[..., Ended], run: RecordKeeper, executed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run.update(mlflow_uri="https://mlflow.example.com")
    assert (
        raynium("ui", "first").out
        == "MLflow page: https://mlflow.example.com/#/experiments/1/runs/m1?workflowType=machine_learning\n"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.com")
    assert raynium("ui").out == "MLflow: https://mlflow.example.com/#/experiments?workflowType=machine_learning\n"
    assert executed == []


@pytest.mark.parametrize("command", [["--help"], ["config", "--markdown"]])
def test_output_that_finds_no_space_is_one_message(command: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "raynium.cli.app", *command], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (ended.returncode, ended.stderr) == (1, "error: no space is left where the output goes\n")
