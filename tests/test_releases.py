"""Which Neuron versions belong together. The answers of package managers are made up after their documentation."""

import re
from dataclasses import replace
from typing import Any

import pytest

from raynium.health.host import Check, RecordedHost
from raynium.health.releases import COMPONENTS, RELEASES, release_check, releases_of, versions

pytestmark = pytest.mark.quick

DPKG = "dpkg-query -W -f=${Version} "
RPM = "rpm -q --qf %{VERSION} "
RUNTIME, COLLECTIVES = "aws-neuronx-runtime-lib", "aws-neuronx-collectives"
WHOLE = {"driver": "2.31.7.0", "runtime": "2.35.30.0-1a2b3c", "collectives": "2.35.43.0-f00", "compiler": "2.28.7631.0"}


def node(**found: str) -> RecordedHost:
    """A node of SDK 2.33, with other versions where given; "": not installed."""
    found = WHOLE | found
    packages = {RUNTIME: found["runtime"], COLLECTIVES: found["collectives"]}
    return RecordedHost(
        files={"/sys/module/neuron/version": found["driver"] + "\n"} if found["driver"] else {},
        commands={DPKG + name: (0, version) for name, version in packages.items() if version},
        packages={"neuronx-cc": found["compiler"]} if found["compiler"] else {},
    )


def checked(**found: str) -> Check:
    return release_check(node(**found))


def test_one_release_is_well() -> None:
    assert checked().status == "ok"
    assert checked().found == (
        "driver 2.31 (SDK 2.33), runtime 2.35 (SDK 2.33), collectives 2.35 (SDK 2.33), compiler 2.28 (SDK 2.33)"
    )
    # 2.28 and 2.29 came with the same driver series, so it fits either.
    older = checked(driver="2.26.5.0", runtime="2.31.24.0", collectives="2.31.24.0", compiler="2.24.5133.0")
    assert older.status == "ok" and "driver 2.26 (SDK 2.28 or 2.29)" in older.found


@pytest.mark.parametrize(
    ("found", "remedy"),
    [
        ({"driver": "2.30.2.0"}, "update aws-neuronx-dkms"),  # the runtime is newer than its driver
        ({"driver": "2.31.7.0", "runtime": "2.34.10.0"}, "from one release"),
        ({"compiler": "2.27.5334.0"}, "from one release"),
        ({"collectives": "2.34.10.0"}, "from one release"),
    ],
)
def test_a_mixture_is_a_warning_that_names_each_release(found: dict[str, str], remedy: str) -> None:
    check = checked(**found)
    assert check.status == "warning" and remedy in check.remedy
    assert "SDK 2.32" in check.found and "SDK 2.33" in check.found


def test_what_is_not_known_is_said_and_not_judged() -> None:
    newer = checked(runtime="2.36.1.0", collectives="2.36.1.0")
    assert newer.status == "skipped" and "runtime 2.36 (no release known here)" in newer.found
    assert "2.28 to 2.33 are known here" in newer.rule
    alone = checked(runtime="", collectives="", compiler="1.0.post1")  # the placeholder says nothing of a release
    assert alone.status == "skipped"
    assert alone.found == "driver 2.31 (SDK 2.33); no version found of runtime, collectives, compiler"
    assert release_check(RecordedHost()).found == "no version found of driver, runtime, collectives, compiler"


def test_where_versions_are_found() -> None:
    bare = node(runtime="", collectives="")
    rpm = replace(bare, commands={DPKG + RUNTIME: (1, "no packages found matching"), RPM + RUNTIME: (0, "2.35.30.0")})
    assert versions(rpm)["runtime"] == "2.35.30.0"
    assert "runtime" not in versions(replace(bare, commands={RPM + RUNTIME: (1, "package is not installed")}))
    names: dict[str, Any] = {
        "/opt/aws/neuron/lib": ("libnrt.so", "libnrt.so.1", "libnrt.so.2.9.1", "libnrt.so.2.35.30.0")
    }
    assert versions(replace(bare, folders=names))["runtime"] == "2.35.30.0"
    started = {"dmesg": (0, "[ 9.1] Neuron Driver Started with Version:2.30.4.0-8a6fdf29\n")}
    assert versions(RecordedHost(commands=started)) == {"driver": "2.30.4.0"}


def test_every_release_is_told_from_the_others_by_its_runtime() -> None:
    for sdk, components in RELEASES.items():
        assert releases_of("runtime", components["runtime"] + ".1.0") == (sdk,)
    assert not any(releases_of(component, "") for component in COMPONENTS)


def test_the_table_names_known_components_with_two_numbers_each_oldest_release_first() -> None:
    assert list(RELEASES) == sorted(RELEASES, key=lambda sdk: [int(part) for part in sdk.split(".")])
    for components in RELEASES.values():
        assert set(components) <= set(COMPONENTS)
        assert all(re.fullmatch(r"\d+\.\d+", version) for version in components.values())
