"""The scripts that run on a cluster's nodes: real bash, with a stub for what would change this machine."""

import configparser
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

CLUSTER = Path(__file__).parents[1] / "cluster"
BIN = Path(sys.executable).parent


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    (folder / ".ray").mkdir(parents=True)
    (folder / ".ray/auth_token").write_text("secret")
    (folder / ".ray/auth_token").chmod(0o644)
    (folder / ".bashrc").touch()
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return tmp_path / "opt"


def fake_environment(folder: Path) -> None:
    """An image's Python environment with a pip that lists some packages, and keeps what it was told."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/pip").write_text(
        """#!/bin/bash
if [ "$1" = list ]; then
    printf '%s\\n' torch==2.14.0 torch-neuronx==2.14.3.0 neuronx-cc==2.28.7631.0 libneuronxla==2.2 nki==0.7.0 \\
        numpy==2.1.0 ray==2.10.0 boto3==1.30.0 raynium==0.0.1
else
    echo "$*" >>"$HOME/pip.log"
    cat "$5" >"$HOME/constraints.txt"
fi
"""
    )
    (folder / "bin/pip").chmod(0o755)


def setup_node(
    kind: str, home: Path, images: Path, *, path: str = os.environ["PATH"]
) -> subprocess.CompletedProcess[str]:
    env = {"HOME": str(home), "PATH": path, "RAYNIUM_IMAGE_VENVS": str(images)}
    return subprocess.run(
        ["bash", str(CLUSTER / "setup_node.sh"), kind], env=env, capture_output=True, text=True, timeout=60
    )


def test_a_neuron_node_keeps_what_its_image_brings(home: Path, images: Path):
    environment = images / "aws_neuronx_venv_torch_neuronx_2_14_0"
    fake_environment(environment)
    fake_environment(images / "aws_neuronx_venv_pytorch_inference_vllm_0_24_0")

    for _ in range(2):  # Ray runs it again when the cluster file changes
        done = setup_node("neuron", home, images)
        assert done.returncode == 0, done.stderr

    (ray,) = (line for line in (CLUSTER / "../constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    assert (home / "constraints.txt").read_text().splitlines() == [
        ray,
        *("torch==2.14.0", "torch-neuronx==2.14.3.0", "neuronx-cc==2.28.7631.0", "libneuronxla==2.2", "nki==0.7.0"),
        "numpy==2.1.0",
    ]
    assert f"-e {CLUSTER.parent}" in (home / "pip.log").read_text()
    environment_file = (home / ".raynium-env").read_text()
    assert f"source {environment}/bin/activate" in environment_file
    assert "export RAY_AUTH_MODE=token" in environment_file and "export RAY_worker_niceness=0" in environment_file
    assert (home / ".bashrc").read_text().count(".raynium-env") == 1
    assert (home / ".ray/auth_token").stat().st_mode & 0o777 == 0o600


def test_a_plain_node_waits_for_the_updates_of_its_first_boot(home: Path, images: Path, tmp_path: Path):
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    fake_environment(home / "made")
    for name, script in {
        "sudo": 'exec "$@"',
        "sleep": "exit 0",
        # Ubuntu's cloud images have no ensurepip.
        "python3": '[ "$1" = -c ] && exit 1\n[ "$1 $2" = "-m venv" ] && mv "$HOME/made" "$3"',
        # apt-get of Ubuntu waits for dpkg's lock if it is told to, and never for that of the lists.
        "apt-get": 'echo "$*" >>"$HOME/apt.log"\n[ "$1" = install ] || [ "$(wc -l <"$HOME/apt.log")" -ge 3 ]',
    }.items():
        (stubs / name).write_text(f"#!/bin/bash\n{script}\n")
        (stubs / name).chmod(0o755)
    done = setup_node("cpu", home, images, path=f"{stubs}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    *updates, install = (home / "apt.log").read_text().splitlines()
    assert updates == ["update -qq"] * 3 and "DPkg::Lock::Timeout" in install and install.endswith("python3-venv")
    assert f"-e {CLUSTER.parent}" in (home / "pip.log").read_text()


def test_an_image_without_pytorch_for_training_is_named(home: Path, images: Path):
    fake_environment(images / "aws_neuronx_venv_pytorch_inference_vllm_0_24_0")
    done = setup_node("neuron", home, images)
    assert done.returncode == 1
    assert f"no aws_neuronx_venv_* for training under {images}" in done.stderr and "--image" in done.stderr
    assert not (home / ".raynium-env").exists()


def test_an_unknown_kind_is_refused(home: Path, images: Path):
    assert "takes neuron or cpu, not gpu" in setup_node("gpu", home, images).stderr


def test_mlflow_answers_on_its_own_address_to_its_own_names(home: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.2", 0))
        port = free.getsockname()[1]
    (home / ".raynium-env").write_text(f"PATH={BIN}:$PATH\n")
    env = {"HOME": str(home), "PATH": os.environ["PATH"], "RAYNIUM_MLFLOW_PORT": str(port)}
    command = ["bash", str(CLUSTER / "mlflow.sh"), "serve", "s3://bucket/folder", "127.0.0.2"]
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(command, env=env, cwd=home, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.2:{port}"
        deadline = time.monotonic() + 120
        while True:
            try:
                assert requests.get(f"{url}/health", timeout=10).ok
                break
            except requests.ConnectionError:
                assert server.poll() is None and time.monotonic() < deadline, (home / "log").read_text()
                time.sleep(0.3)
        with pytest.raises(requests.ConnectionError):
            requests.get(f"http://127.0.0.1:{port}/health", timeout=10)

        search = f"{url}/api/2.0/mlflow/experiments/search?max_results=1"
        for host, answer in ((f"127.0.0.2:{port}", 200), (f"localhost:{port}", 200), ("evil.example", 403)):
            assert requests.get(search, headers={"Host": host}, timeout=30).status_code == answer, host
        experiment = requests.get(search, timeout=30).json()["experiments"][0]
        assert experiment["artifact_location"].startswith("mlflow-artifacts:")  # through the server, into the bucket
    finally:
        server.terminate()
        server.wait(120)  # it ends within a second on a machine that is not busy


def test_the_supervisor_is_a_service_of_the_head_that_reads_its_environment(home: Path, tmp_path: Path):
    """What would change this machine goes to stubs; what the service runs is run."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    (stubs / "sudo").write_text(
        f'#!/bin/bash\n[ "$1" = tee ] && exec tee {tmp_path}/unit\necho "$*" >>{tmp_path}/sudo\n'
    )
    (stubs / "raynium").write_text(f'#!/bin/bash\necho "$TOKEN_OF_THE_CLUSTER $*" >{tmp_path}/asked\n')
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    (home / ".raynium-env").write_text("export TOKEN_OF_THE_CLUSTER=secret\n")
    env = {"HOME": str(home), "PATH": f"{stubs}:{os.environ['PATH']}"}
    command = ["bash", str(CLUSTER / "supervisor.sh"), "install", "s3://bucket/folder/runs"]
    subprocess.run(command, env=env, check=True, timeout=60)

    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string((tmp_path / "unit").read_text())
    assert unit["Service"]["Restart"] == "always" and unit["Install"]["WantedBy"] == "multi-user.target"
    assert (tmp_path / "sudo").read_text().splitlines()[-1] == "systemctl restart raynium-supervisor"
    subprocess.run(shlex.split(unit["Service"]["ExecStart"]), env=env, check=True, timeout=60)
    assert (tmp_path / "asked").read_text() == "secret supervisor --root s3://bucket/folder/runs\n"

    for wrong in ([], ["serve", "s3://bucket"], ["install"]):
        done = subprocess.run(["bash", str(CLUSTER / "supervisor.sh"), *wrong], env=env, capture_output=True, text=True)
        assert done.returncode == 1 and "usage: supervisor.sh install s3://" in done.stderr
