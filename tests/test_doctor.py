"""`raynium doctor` on machines that were written down: fixtures/doctor/*.json."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from raynium.health.doctor import Examination, examine
from raynium.health.host import Check, RecordedHost, ThisHost

pytestmark = pytest.mark.quick

FIXTURES = Path(__file__).parent / "fixtures/doctor"
PYTHON = (3, 12, 1)


def recorded(name: str) -> RecordedHost:
    return RecordedHost.from_json((FIXTURES / f"{name}.json").read_text())


def check(examination: Examination, name: str) -> Check:
    (found,) = [each for each in examination.checks if each.name == name]
    return found


def statuses(examination: Examination, status: str) -> set[str]:
    return {each.name for each in examination.checks if each.status == status}


def test_a_laptop_without_accelerators_is_well() -> None:
    found = examine(recorded("cpu-laptop"), python=PYTHON)
    assert found.is_well and found.chosen == "cpu"
    assert found.machine == "a machine of unknown type, no accelerator"
    reasons = {each.accelerator: " ".join(each.reasons) for each in found.findings if not each.usable}
    assert "no Neuron device" in reasons["neuron"] and "torch-xla" in reasons["neuron_xla"]
    assert "no GPU" in reasons["cuda"]
    assert not any(each.name.startswith("neuron") for each in found.checks)


def test_placeholders_of_the_public_index_are_named_with_the_remedy() -> None:
    found = examine(recorded("placeholder-packages"), python=PYTHON)
    assert not found.is_well and found.chosen is None
    fake = check(found, "placeholders")
    assert "torch-neuronx, neuronx-distributed, neuronx-cc, libneuronxla are placeholders" in fake.found
    assert fake.remedy.startswith("pip uninstall torch-neuronx neuronx-distributed neuronx-cc libneuronxla; ")
    assert statuses(found, "failed") == {"placeholders", "accelerator"}


def test_placeholders_are_wrong_on_a_laptop_too() -> None:
    laptop = recorded("cpu-laptop")
    found = examine(replace(laptop, packages=laptop.packages | {"torch-neuronx": "1.0"}), python=PYTHON)
    assert found.chosen == "cpu" and statuses(found, "failed") == {"placeholders"}


def test_versions_that_do_not_belong_together() -> None:
    found = examine(recorded("mismatched-versions"), python=PYTHON)
    assert found.chosen is None and statuses(found, "failed") == {"accelerator"}
    assert "made for torch 2.13, and torch 2.14.0 is installed" in check(found, "accelerator").found
    # dmesg's last start counts; modinfo reads the disk.
    assert check(found, "neuron driver").found == "2.30.4.0 is loaded, 2.31.7.0 installed"
    assert check(found, "neuron runtime").found == "no libnccom"
    release = check(found, "neuron release")
    assert "driver 2.30 (SDK 2.32), compiler 2.28 (SDK 2.33); no version found of runtime, coll" in release.found
    assert statuses(found, "warning") == {"neuron driver", "neuron runtime", "neuron release", "shared memory"}


def test_torch_xla_that_would_train_on_the_cpu() -> None:
    host = recorded("silent-cpu-trn1")
    found = examine(host, python=PYTHON)
    assert found.chosen is None
    assert "without a word" in check(found, "silent CPU fallback").found

    fake = examine(replace(host, packages=host.packages | {"libneuronxla": "1.0"}), python=PYTHON)
    assert check(fake, "silent CPU fallback").status == "failed"

    mended = replace(host, packages=host.packages | {"libneuronxla": "2.2.1"})
    found = examine(mended, python=PYTHON)
    assert found.chosen == "neuron_xla" and found.is_well

    told = examine(replace(mended, environment={"PJRT_DEVICE": "CPU"}), python=PYTHON)
    assert check(told, "silent CPU fallback").remedy == "unset PJRT_DEVICE" and not told.is_well


def test_a_healthy_trn2() -> None:
    found = examine(recorded("healthy-trn2"), python=PYTHON)
    assert found.chosen == "neuron" and found.machine == "trn2.48xlarge, 16 Neuron device(s)"
    assert {each.status for each in found.checks} == {"ok"}
    assert check(found, "neuron cores").found == "16 chip(s), 64 cores"
    assert check(found, "locked memory").found == "unlimited"
    assert check(found, "instance metadata").found == "credentials of role raynium-worker"


def test_credentials_are_found_and_never_shown() -> None:
    shown = json.dumps(examine(recorded("healthy-trn2"), python=PYTHON).to_json())
    assert "AWS_ACCESS_KEY_ID" in shown and "AKIA" not in shown and "very-secret" not in shown

    laptop = recorded("cpu-laptop")
    assert check(examine(laptop, python=PYTHON), "S3 credentials").status == "skipped"
    with_file = replace(laptop, files={"/home/ray/.aws/credentials": "[default]"})
    assert check(examine(with_file, python=PYTHON), "S3 credentials").found == "a credentials file"
    on_ec2 = replace(laptop, product_name="trn2.48xlarge")
    assert "instance profile" in check(examine(on_ec2, python=PYTHON), "S3 credentials").found


@pytest.mark.parametrize(
    ("package", "version", "found"),
    [("ray", "2.9.3", "2.9.3"), ("torch", None, "not installed"), ("mlflow", "3.9.0", "3.9.0")],
)
def test_old_or_missing_packages(package: str, version: str | None, found: str) -> None:
    laptop = recorded("cpu-laptop")
    packages = {name: each for name, each in laptop.packages.items() if name != package}
    packages |= {package: version} if version is not None else {}
    examination = examine(replace(laptop, packages=packages), python=PYTHON)
    assert statuses(examination, "failed") == {package} and check(examination, package).found == found


def test_gpus_that_this_torch_cannot_use() -> None:
    host = replace(recorded("cpu-laptop"), devices=("nvidia0", "nvidiactl"))
    found = examine(host, python=PYTHON)
    assert found.chosen == "cuda" and statuses(found, "failed") == {"torch for GPUs"}
    cuda_build = replace(host, packages=host.packages | {"torch": "2.13.0+cu130"})
    assert examine(cuda_build, python=PYTHON).is_well


def test_an_old_python() -> None:
    assert statuses(examine(recorded("cpu-laptop"), python=(3, 10, 14)), "failed") == {"python"}


def test_the_command_loads_nothing_heavy_and_says_what_is_wrong_in_its_exit_code() -> None:
    code = (
        "import sys\n"
        "from raynium.cli.app import app\n"
        "try: app(['doctor', '--json'])\n"
        "except SystemExit as end: status = end.code\n"
        "assert not {'torch', 'ray', 'mlflow', 'numpy'} & set(sys.modules), sorted(sys.modules)\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["well"] else 1), done.stderr
    assert found["accelerators"]["cpu"] == {"usable": True, "reasons": ["every machine has one"]}


def test_the_table_shows_findings_and_ends_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from raynium.cli.app import app

    monkeypatch.setattr("raynium.health.host.ThisHost", lambda: recorded("placeholder-packages"))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "trn2.3xlarge, 1 Neuron device(s): nothing is what" in result.output
    assert "cannot use neuron_xla" in result.output and "can use    cpu" in result.output
    (row,) = [line for line in result.output.splitlines() if line.startswith("placeholders")]
    assert "FAILED" in row and "pip uninstall torch-neuronx" in row


def test_this_host_answers_for_what_is_not_there(tmp_path: Path) -> None:
    host = ThisHost()
    assert host.read(str(tmp_path / "none")) is None and host.read(str(tmp_path)) is None
    assert host.names(str(tmp_path / "none")) == ()
    assert host.run("no-such-command-anywhere", timeout_seconds=5) is None
    assert host.version("no-such-package-anywhere") is None
    late = host.run("sleep", "30", timeout_seconds=0.1)
    assert late is not None and late.code == 124 and "0.1 s" in late.output
    ran = host.run("sh", "-c", "echo out; echo err >&2; exit 3", timeout_seconds=20)
    assert ran is not None and (ran.code, ran.output) == (3, "out\nerr\n")
    assert host.free_bytes(str(tmp_path / "not" / "yet")) == pytest.approx(host.free_bytes(str(tmp_path)), rel=0.1)
