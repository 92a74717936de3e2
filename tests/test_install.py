"""`install.py`: what it runs on which machine, and that the lock which it installs without resolving is complete."""

import importlib.metadata
import re
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

import install
import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def locked(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(package): version for package, version in (line.split("==") for line in lines)}


def needed(requirements: Iterable[str], python: str) -> set[str]:
    """All packages that these bring, after the metadata of what is installed here."""
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    todo = [(requirement, "") for requirement in requirements]
    seen: set[tuple[str, str]] = set()
    while todo:
        text, extra = todo.pop()
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({**environment, "extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in requirement.extras or {""}:
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                todo += [(each, wanted) for each in importlib.metadata.requires(name) or ()]
    return {name for name, _ in seen}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_the_lock_is_all_that_the_package_needs_and_no_more(python: str) -> None:
    assert set(locked("constraints.txt")) == needed(PROJECT["dependencies"], python)


def test_the_second_lock_is_what_the_tests_need_beyond_that() -> None:
    tools = [each for each in EXTRAS["dev"] if not each.startswith("raynium")]
    assert EXTRAS["dev"] == ["raynium[test,bench]", *tools]
    all_needed = needed([*PROJECT["dependencies"], *EXTRAS["test"], *EXTRAS["bench"], *tools], "3.11")
    assert set(locked("constraints-dev.txt")) == all_needed - set(locked("constraints.txt"))


def test_the_locked_versions_are_those_that_the_tests_run_with() -> None:
    versions = locked("constraints.txt") | locked("constraints-dev.txt")
    assert {name: importlib.metadata.version(name).split("+")[0] for name in versions} == versions


def test_each_locked_version_is_one_that_the_project_and_its_packages_admit() -> None:
    versions = locked("constraints.txt") | locked("constraints-dev.txt")
    environment = {**default_environment(), "extra": ""}
    asked = [(PROJECT["name"], each) for each in PROJECT["dependencies"]]
    asked += [(name, each) for name in versions for each in importlib.metadata.requires(name) or ()]
    refused = [
        f"{name} needs {text}"
        for name, text in asked
        for requirement in [Requirement(text)]
        if (requirement.marker is None or requirement.marker.evaluate(environment))
        and versions[canonicalize_name(requirement.name)] not in requirement.specifier
    ]
    assert refused == []


PIP_CALL = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]


@pytest.mark.parametrize("uv", [None, "/usr/bin/uv"])
@pytest.mark.parametrize("dev", [False, True])
@pytest.mark.parametrize("cpu_index", [False, True])
def test_a_lock_is_installed_without_resolving_and_the_package_without_a_build_environment(
    uv: str | None, dev: bool, cpu_index: bool
) -> None:
    packages, package = install.commands(dev=dev, locked=True, cpu_index=cpu_index, uv=uv)
    for command in packages, package:
        # uv reads none of pip's settings: where PyTorch's index is away, pip may know of another one.
        assert command[: len(PIP_CALL)] == PIP_CALL or (uv and cpu_index and command[:2] == [uv, "pip"])
        assert "--no-deps" in command
        assert ("--torch-backend" in command or install.CPU_INDEX in command) == cpu_index
    assert ("constraints-dev.txt" in " ".join(packages)) == dev
    assert package[-3:] == ["--no-build-isolation", "-e", str(ROOT)]


@pytest.mark.parametrize("uv", [None, "/usr/bin/uv"])
def test_elsewhere_versions_are_resolved_within_the_constraints(uv: str | None) -> None:
    (command,) = install.commands(dev=True, locked=False, cpu_index=False, uv=uv)
    assert command[0] == (uv or sys.executable)
    assert "--no-deps" not in command
    assert re.search(r"-c \S*/constraints.txt -c \S*/constraints-dev.txt -e \S*\[dev\]$", " ".join(command))


@pytest.mark.parametrize(
    ("requirement", "is_cpu"),
    [("jinja2", True), ("nvidia-cudnn-cu13==9.15 ; platform_system == 'Linux'", False), ("cuda-bindings<14", False)],
)
def test_a_torch_that_brings_cuda_libraries_is_known_before_it_is_downloaded(
    requirement: str, is_cpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = f"Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\nRequires-Dist: {requirement}\n"
    with zipfile.ZipFile(tmp_path / "torch-2.13.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("torch-2.13.0.dist-info/METADATA", info)
        wheel.writestr("torch-2.13.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("torch-2.13.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert install.is_cpu_build("torch==2.13.0") is is_cpu


def test_what_fails_is_told_with_its_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(SystemExit, match=r"error: this failed with status 1: .*-m pip .*--dry-run .*torch==2\.13\.0"):
        install.is_cpu_build("torch==2.13.0")
    assert "No matching distribution found for torch==2.13.0" in capfd.readouterr().err
