"""What a job takes along, what its driver reads, and clusters that do not answer. The path itself is in test_ray.py."""

import getpass
import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from raynium.config.paths import RAY_JOB_VARIABLE
from raynium.errors import LaunchError, RunFailed
from raynium.launch import jobs
from raynium.launch.job_metadata import JOB_CONFIG_VARIABLE, job_metadata
from raynium.launch.jobs import (
    connect_jobs,
    find_token,
    main,
    runtime_env,
    submit_job,
)
from raynium.run.record import Owner, RunRecord

ROOT = Path(__file__).parents[1]


# ------------------------------------------------------------------------------------------------- tokens


@pytest.fixture
def token_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a token, and no variable that names one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_token_is_found_where_ray_looks_in_rays_order(token_places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_token() is None
    (token_places / ".ray").mkdir()
    (token_places / ".ray" / "auth_token").write_text("of the home folder\n")
    assert find_token() == "of the home folder"
    (token_places / "token").write_text("of a path\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token_places / "token"))
    assert find_token() == "of a path"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "itself")
    assert find_token() == "itself"


def test_a_home_of_somebody_else_has_no_token_and_a_named_file_must_be_readable(
    token_places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As root, no permission is missing; but no name may be so long.
    monkeypatch.setenv("HOME", f"{token_places}/{'x' * 300}")
    assert find_token() is None
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", f"{token_places}/{'x' * 300}")
    with pytest.raises(LaunchError, match=r"RAY_AUTH_TOKEN_PATH is .* cannot be read: File name too long"):
        find_token()


def test_the_variable_of_a_jobs_driver_has_one_name() -> None:
    assert JOB_CONFIG_VARIABLE == RAY_JOB_VARIABLE  # which test_config_paths.py compares with Ray's own


# ------------------------------------------------------------------------------------------------- what is submitted


class Jobs:
    def submit_job(self, **options: Any) -> str:
        self.options = options
        folder = Path(options["runtime_env"]["working_dir"])
        self.files = {path.name: path.read_text() for path in folder.iterdir()}
        return options["submission_id"]


def test_a_job_takes_its_config_and_this_very_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no checkout
    fake = Jobs()
    first, second = (submit_job(fake, "first", "run: {name: first}", run_url="file:///runs/first") for _ in range(2))
    assert first != second and first.startswith("raynium-first-")
    assert fake.files == {"config.yaml": "run: {name: first}"}
    assert fake.options["entrypoint"].split()[-1] in fake.files
    metadata = fake.options["metadata"]
    assert (metadata["run"], metadata["mlflow.user"]) == ("first", getpass.getuser())
    assert metadata["mlflow.source.name"].startswith(Path(sys.argv[0]).name)
    (package,) = fake.options["runtime_env"]["py_modules"]
    assert Path(package, "launch", "jobs.py").samefile(jobs.__file__)
    assert not Path(fake.options["runtime_env"]["working_dir"]).exists(), "a temporary folder, and gone"


def test_rays_notes_of_an_upload_stay_off_the_terminal_and_its_warnings_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(logging.getLogger("ray"), "handlers", [logging.StreamHandler(terminal)])
    words = logging.getLogger("ray.dashboard.modules.dashboard_sdk")
    monkeypatch.setattr(words, "level", logging.INFO)

    class Client:
        def submit_job(self, **options: Any) -> str:
            words.info("Uploading package")
            words.warning("too large")
            return "job-1"

    submit_job(Client(), "first", "run: {name: first}", run_url="file:///runs/first")
    words.info("after it")
    assert terminal.getvalue() == "too large\nafter it\n"


def test_the_runtime_env_of_the_sdk_is_that_of_the_checkout() -> None:
    file = yaml.safe_load((ROOT / "cluster/runtime_env.yaml").read_text())
    ours = runtime_env("/somewhere")
    assert ours.keys() == file.keys()
    assert ours["env_vars"] == file["env_vars"]
    assert [Path(each).resolve() for each in ours["py_modules"]] == [ROOT / each for each in file["py_modules"]]


# ------------------------------------------------------------------------------------------------- the driver of a job


def test_a_driver_knows_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(JOB_CONFIG_VARIABLE, raising=False)
    assert job_metadata() == {}
    monkeypatch.setenv(JOB_CONFIG_VARIABLE, json.dumps({"metadata": {"job_submission_id": "job-1"}}))
    assert job_metadata() == {"job_submission_id": "job-1"}
    monkeypatch.setenv(JOB_CONFIG_VARIABLE, "{}")
    assert job_metadata() == {}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `main` asked to be run; the run finishes at once."""
    made: list[dict[str, Any]] = []

    def run(config: Any, **options: Any) -> RunRecord:
        made.append({"name": config.run.name, **options})
        return RunRecord("first", {"train": {"steps": 4}}, "finished", Owner("h", "b", 1, "1"), 0.0, 0.0, step=4)

    monkeypatch.setattr("raynium.launch.run.run", run)
    monkeypatch.delenv(JOB_CONFIG_VARIABLE, raising=False)
    return made


def test_a_submitted_job_joins_its_cluster_and_says_where_its_code_came_from(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    origin = {"mlflow.source.git.commit": "abc", "mlflow.user": "anna", "mlflow.source.type": "LOCAL"}
    metadata = {"job_submission_id": "job-1", "run": "first"} | origin
    monkeypatch.setenv(JOB_CONFIG_VARIABLE, json.dumps({"metadata": metadata}))
    main(["quickstart", "run.name=first"])
    tags = origin | {"mlflow.source.type": "JOB"}
    assert calls == [{"name": "first", "address": "auto", "job_id": "job-1", "tags": tags}]
    assert capsys.readouterr().out == "run first: finished at step 4 of 4\n"


def test_the_script_outside_a_job_starts_its_own_cluster(calls: list[dict[str, Any]]) -> None:
    main(["quickstart"])
    assert calls == [{"name": "quickstart", "address": None, "job_id": None, "tags": {}}]


@pytest.mark.parametrize(("job", "code"), [(True, None), (False, 3)])
def test_a_run_that_was_stopped_is_a_success_of_its_job_and_no_finished_run(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, job: bool, code: int | None
) -> None:
    def stopped(config: Any, **options: Any) -> RunRecord:
        owner = Owner("h", "b", 1, "1")
        return RunRecord("first", {"train": {"steps": 4}}, "stopped", owner, 0.0, 0.0, stopped_by="raynium stop")

    monkeypatch.setattr("raynium.launch.run.run", stopped)
    if job:
        monkeypatch.setenv(JOB_CONFIG_VARIABLE, json.dumps({"metadata": {"job_submission_id": "job-1"}}))
        main(["quickstart"])
    else:
        with pytest.raises(SystemExit) as ended:
            main(["quickstart"])
        assert ended.value.code == code


def test_a_failure_is_one_message_and_an_exit_code(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: Any, **options: Any) -> RunRecord:
        raise RunFailed("run 'first' failed at step 3: rank 0: killed by SIGKILL")

    monkeypatch.setattr("raynium.launch.run.run", fail)
    with pytest.raises(SystemExit) as ended:
        main(["quickstart"])
    assert ended.value.code == "error: run 'first' failed at step 3: rank 0: killed by SIGKILL"
    with pytest.raises(SystemExit, match=r"did you mean train\.steps"):
        main(["quickstart", "train.stepz=3"])


# ------------------------------------------------------------------------------------------------- no answer


@pytest.mark.timeout(150)
@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "http://no-such-host.invalid:8265"])
def test_a_dashboard_that_does_not_answer_is_named(address: str) -> None:
    with pytest.raises(LaunchError, match=rf"cannot reach a Ray cluster at {address}: .*RAY_AUTH_TOKEN"):
        connect_jobs(address)


@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    "address",
    [
        "nonsense",
        "127.0.0.1:1",
    ],
)
def test_a_cluster_that_does_not_answer_is_named(address: str) -> None:
    from raynium.launch.connect import connect

    with pytest.raises(LaunchError, match=f"cannot reach the Ray cluster at {address}"), connect(address):
        pass
