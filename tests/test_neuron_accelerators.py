"""What the two Neuron accelerators tell their ranks' libraries, and when one is chosen."""

import os
import sys
import tomllib
import types
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from raynium.accelerators.base import Place
from raynium.accelerators.detect import PLACEHOLDERS as PLACEHOLDER_VERSIONS
from raynium.accelerators.detect import Machine, detect, findings
from raynium.accelerators.neuron import NeuronAccelerator, collectives_port, interface_towards
from raynium.accelerators.neuron_xla import NeuronXlaAccelerator
from raynium.accelerators.timeouts import (
    EXECUTION_TIMEOUT_SECONDS,
    PROCESS_GROUP_TIMEOUT_SECONDS,
)
from raynium.errors import LaunchError
from raynium.hardware.catalog import INSTANCES

pytestmark = pytest.mark.quick

TWELVE = "0,1,10,11,2,3,4,5,6,7,8,9"  # text order
NATIVE = {"torch": "2.13.0", "torch-neuronx": "2.13.3.0.1", "neuronx-cc": "2.28.7631.0"}
XLA = {
    "torch": "2.9.1",
    "torch-neuronx": "2.9.0.2.15.32035",
    "torch-xla": "2.9.0",
    "libneuronxla": "2.2.15",
    "neuronx-cc": "2.28.7631.0",
    "neuronx-distributed": "0.19.28492",
}
PLACEHOLDERS = {
    "torch": "2.13.0",
    "torch-neuronx": "1.0",
    "torch-xla": "2.9.0",
    "libneuronxla": "1.0",
    "neuronx-cc": "1.0.post1",
    "neuronx-distributed": "0.1",
}


def place(local_rank: int = 0, *, ranks: int = 12, host: str = "10.0.0.7", **inherited: str) -> Place:
    return Place(
        rank=ranks + local_rank,  # the second node
        world_size=2 * ranks,
        local_rank=local_rank,
        local_world_size=ranks,
        master_host=host,
        master_port=45123,
        run_name="llama",
        inherited=inherited,
    )


@pytest.fixture
def efa(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty list of network cards."""
    monkeypatch.setattr("raynium.accelerators.neuron.EFA_FOLDER", tmp_path)
    return tmp_path


def test_each_native_rank_sees_its_own_core_in_numeric_order(efa: Path) -> None:
    accelerator = NeuronAccelerator()
    found = [accelerator.environment(place(rank, NEURON_RT_VISIBLE_CORES=TWELVE)) for rank in range(12)]
    assert [each["NEURON_RT_VISIBLE_CORES"] for each in found] == [str(core) for core in range(12)]
    assert [each["NEURON_PROCESS_TAG"] for each in found] == [f"llama/rank-{rank:05d}" for rank in range(12, 24)]
    assert {each["NEURON_RT_ROOT_COMM_ID"] for each in found} == {"10.0.0.7:25123"}


def test_torch_xla_gets_the_whole_list_and_what_makes_it_read_it(efa: Path) -> None:
    accelerator = NeuronXlaAccelerator()
    found = [accelerator.environment(place(rank, NEURON_RT_VISIBLE_CORES=TWELVE)) for rank in range(12)]
    assert {each["NEURON_RT_VISIBLE_CORES"] for each in found} == {"0,1,2,3,4,5,6,7,8,9,10,11"}
    assert {each["TORCHELASTIC_RUN_ID"] for each in found} == {"llama-45123"}
    assert {each["PJRT_DEVICE"] for each in found} == {"NEURON"}
    assert "NEURON_LOGICAL_NC_CONFIG" not in found[0]
    on_trn2 = NeuronXlaAccelerator(INSTANCES["trn2.48xlarge"]).environment(place())
    assert on_trn2["NEURON_LOGICAL_NC_CONFIG"] == "2"
    on_trn1 = NeuronXlaAccelerator(INSTANCES["trn1.32xlarge"]).environment(place())
    assert "NEURON_LOGICAL_NC_CONFIG" not in on_trn1 and "logical-nc-config" not in on_trn1["NEURON_CC_FLAGS"]


def test_torch_xlas_compiler_keeps_the_precision_of_the_config(efa: Path) -> None:
    """Its default multiplies float32 in bfloat16 (AWS's reference of neuronx-cc), and no test here can see that."""
    assert "--auto-cast=none" in NeuronXlaAccelerator().environment(place())["NEURON_CC_FLAGS"].split()


def test_executables_for_another_size_of_a_logical_core_are_not_found(efa: Path) -> None:
    caches = {
        NeuronAccelerator().environment(place(NEURON_LOGICAL_NC_CONFIG=lnc))["TORCH_NEURONX_NEFF_CACHE_DIR"]
        for lnc in ("1", "2")
    }
    assert len(caches) == 2


def test_torch_xlas_compiler_and_runtime_agree_on_the_size_of_a_logical_core(efa: Path) -> None:
    halves = NeuronXlaAccelerator(INSTANCES["trn2.48xlarge"]).environment(place(NEURON_LOGICAL_NC_CONFIG="1"))
    assert halves["NEURON_LOGICAL_NC_CONFIG"] == "1"
    assert "--logical-nc-config=1" in halves["NEURON_CC_FLAGS"].split()


@pytest.mark.parametrize("accelerator", [NeuronAccelerator(), NeuronXlaAccelerator()])
def test_efa_is_asked_for_only_where_it_is(accelerator: NeuronAccelerator | NeuronXlaAccelerator, efa: Path) -> None:
    without = accelerator.environment(place())
    assert not [name for name in without if name.startswith("FI_")]
    (efa / "rdmap0s6").mkdir()
    cards = accelerator.environment(place())
    assert {name: cards[name] for name in cards if name.startswith("FI_")} == {
        "FI_PROVIDER": "efa",
        "FI_EFA_USE_DEVICE_RDMA": "1",
        "FI_EFA_FORK_SAFE": "1",
    }
    if accelerator.name == "neuron":
        assert "TORCH_NEURONX_ENABLE_HOST_CC" in without and "TORCH_NEURONX_ENABLE_HOST_CC" not in cards


def test_what_the_user_set_wins_where_it_is_the_users_choice(efa: Path) -> None:
    chosen = {"TORCH_NEURONX_NEFF_CACHE_DIR": "/fsx/neff", "NEURON_LOGICAL_NC_CONFIG": "1"}
    assert chosen.items() <= NeuronAccelerator().environment(place(**chosen)).items()
    chosen = {"NEURON_COMPILE_CACHE_URL": "s3://bucket/cache", "NEURON_CC_FLAGS": "--optlevel=1"}
    assert chosen.items() <= NeuronXlaAccelerator().environment(place(**chosen)).items()


# What Linux shows of an instance with two network cards that carry IP, and a container's bridge: 10.0.16.0/20 is on
# both cards, of which ens5 came first.
ROUTES = """\
Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT
ens5 00000000 0110000A 0003 0 0 100 00000000 0 0 0
ens6 00000000 0110000A 0003 0 0 200 00000000 0 0 0
ens5 0010000A 00000000 0001 0 0 100 00F0FFFF 0 0 0
ens6 0010000A 00000000 0001 0 0 200 00F0FFFF 0 0 0
docker0 000011AC 00000000 0001 0 0 0 0000FFFF 0 0 0
"""


@pytest.mark.skipif(sys.byteorder != "little", reason="Linux prints these numbers in the machine's own order")
@pytest.mark.parametrize(
    ("host", "interface"),
    [
        ("10.0.18.7", "ens5"),  # on the subnet, by the card with the lower metric
        ("172.17.0.9", "docker0"),
        ("54.1.2.3", "ens5"),  # by the default route
        ("127.0.0.2", None),  # several nodes on one machine
        ("fd00::7", None),
        ("head.example", None),
    ],
)
def test_the_interface_towards_the_root_is_named_where_there_are_several(host: str, interface: str | None) -> None:
    assert interface_towards(host, ROUTES) == interface
    one_card = "".join(line for line in ROUTES.splitlines(keepends=True) if "ens6" not in line and "docker" not in line)
    assert interface_towards(host, one_card) is None  # nothing to choose from
    assert interface_towards(host, ROUTES.replace(" 0001 ", " 0000 ").replace(" 0003 ", " 0002 ")) is None  # all down


def test_collectives_are_told_their_interface_only_between_nodes(
    efa: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "routes").write_text(ROUTES)
    monkeypatch.setattr("raynium.accelerators.neuron.ROUTES", tmp_path / "routes")
    names = ("CCOM_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    for accelerator in (NeuronAccelerator(), NeuronXlaAccelerator()):
        several = accelerator.environment(place(host="10.0.18.7"))
        assert [several[name] for name in names] == ["ens5", "ens5"]
        chosen = accelerator.environment(place(host="10.0.18.7", CCOM_SOCKET_IFNAME="ens6"))
        assert [chosen[name] for name in names] == ["ens6", "ens5"]
        alone = accelerator.environment(replace(place(host="10.0.18.7"), world_size=12))
        assert not set(names) & set(alone)


def test_an_ipv6_root_is_bracketed(efa: Path) -> None:
    assert NeuronAccelerator().environment(place(host="fd00::7"))["NEURON_RT_ROOT_COMM_ID"] == "[fd00::7]:25123"


def test_the_root_communicators_port_is_not_the_rendezvous_nor_one_that_linux_gives_away() -> None:
    ports = {port: collectives_port(port) for port in range(32768, 61000)}
    assert all(20000 <= theirs < 30000 and theirs != port for port, theirs in ports.items())


def test_the_limit_that_knows_most_comes_first(efa: Path) -> None:
    assert EXECUTION_TIMEOUT_SECONDS < PROCESS_GROUP_TIMEOUT_SECONDS
    for accelerator in (NeuronAccelerator(), NeuronXlaAccelerator()):
        assert accelerator.environment(place())["NEURON_RT_EXEC_TIMEOUT"] == str(EXECUTION_TIMEOUT_SECONDS)


def test_a_logical_core_of_one_physical_core_is_half_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    trn2 = NeuronAccelerator(INSTANCES["trn2.48xlarge"])
    monkeypatch.delenv("NEURON_LOGICAL_NC_CONFIG", raising=False)
    assert trn2.memory_bytes(local_rank=3, local_world_size=64) == 24 * 2**30
    assert (trn2.peak_flops("bfloat16"), trn2.peak_flops("float32")) == (166.75e12, 45.25e12)
    monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "1")
    assert trn2.memory_bytes(local_rank=3, local_world_size=64) == 12 * 2**30
    assert trn2.peak_flops("bfloat16") == 83.375e12
    trn1 = NeuronXlaAccelerator(INSTANCES["trn1.32xlarge"])
    assert trn1.memory_bytes(local_rank=0, local_world_size=32) == 16 * 2**30
    assert (trn1.peak_flops("bfloat16"), trn1.peak_flops("float32")) == (95e12, 23.75e12)
    assert NeuronXlaAccelerator().memory_bytes(local_rank=0, local_world_size=2) == 16 * 2**30
    assert NeuronAccelerator().peak_flops("bfloat16") is None


# ---- Which one a machine can use -------------------------------------------------------------------------------------


def trn(name: str, packages: dict[str, str], devices: int = 16) -> Machine:
    return Machine(neuron_devices=devices, product_name=name, packages=packages)


def reasons(machine: Machine) -> dict[str, str]:
    """Accelerator → why not; only those that cannot be used."""
    return {each.accelerator: "; ".join(each.reasons) for each in findings(machine) if not each.usable}


def test_auto_takes_the_stack_that_is_installed_on_a_chip_that_it_drives() -> None:
    assert detect("auto", trn("trn2.48xlarge", NATIVE)).name == "neuron"
    assert detect("auto", trn("trn3.48xlarge", NATIVE)).name == "neuron"  # newer than the catalogue
    assert detect("auto", trn("trn1.32xlarge", XLA)).name == "neuron_xla"
    assert detect("auto", trn("trn2.48xlarge", XLA)).name == "neuron_xla"
    assert detect("neuron", trn("trn2.48xlarge", NATIVE)).memory_bytes(local_rank=0, local_world_size=64) == 24 * 2**30


def test_findings_name_what_was_seen() -> None:
    healthy = findings(trn("trn2.48xlarge", NATIVE))[0]
    assert (healthy.accelerator, healthy.usable) == ("neuron", True)
    assert healthy.reasons == (
        "16 Neuron device(s), trn2.48xlarge, torch 2.13.0, torch-neuronx 2.13.3.0.1, neuronx-cc 2.28.7631.0",
    )


def test_placeholders_of_the_public_index_are_told_from_the_real_packages() -> None:
    found = reasons(trn("trn2.48xlarge", PLACEHOLDERS))
    assert found["neuron"] == (
        "torch-neuronx 1.0, neuronx-cc 1.0.post1 is a placeholder from the public package index, which does nothing: "
        "install raynium[neuron] from AWS's package repository, https://pip.repos.neuron.amazonaws.com"
    )
    assert (
        "torch-neuronx 1.0, libneuronxla 1.0, neuronx-cc 1.0.post1, neuronx-distributed 0.1 is a" in found["neuron_xla"]
    )


def test_families_must_match() -> None:
    found = reasons(trn("trn2.48xlarge", NATIVE | {"torch": "2.14.0+cpu"}))
    assert found["neuron"] == (
        "torch-neuronx 2.13.3.0.1 is made for torch 2.13, and torch 2.14.0+cpu is installed: install the pair of one "
        "family, torch==2.13.*"
    )
    assert (
        "made for torch 2.9, and torch 2.8.0 is" in reasons(trn("trn1.2xlarge", XLA | {"torch": "2.8.0"}))["neuron_xla"]
    )


def test_each_stack_says_that_the_other_one_is_installed() -> None:
    assert (
        "works through torch-xla (neuron_xla); TorchNeuron begins with 2.13"
        in reasons(trn("trn2.3xlarge", XLA))["neuron"]
    )
    assert "is TorchNeuron (neuron); torch-xla ended with 2.9" in reasons(trn("trn2.3xlarge", NATIVE))["neuron_xla"]
    assert reasons(trn("trn1.2xlarge", NATIVE))["neuron"] == (
        "trn1.2xlarge is older than Trainium2, which TorchNeuron needs: use neuron_xla, or a trn2"
    )


def test_missing_packages_and_devices_are_named() -> None:
    found = reasons(trn("trn2.3xlarge", {"torch": "2.13.0"}, devices=0))
    assert found["neuron"].startswith("no Neuron device (/dev/neuron0): is this a trn instance, is the driver loaded")
    assert "torch-neuronx, neuronx-cc not installed: install raynium[neuron] from AWS's" in found["neuron"]
    with pytest.raises(
        LaunchError, match=r"cluster\.accelerator is 'neuron', which this machine cannot use: no Neuron"
    ):
        detect("neuron", trn("trn2.3xlarge", NATIVE, devices=0))


def test_auto_does_not_quietly_train_on_the_cpu_of_a_neuron_machine() -> None:
    machine = trn("trn2.3xlarge", PLACEHOLDERS)
    with pytest.raises(LaunchError, match=r"'auto' and this machine has 16 Neuron device.*For neuron: .*placeholder"):
        detect("auto", machine)
    assert detect("cpu", machine).name == "cpu"


def test_no_extra_can_be_met_by_a_placeholder() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    asked = [Requirement(text) for extra in ("neuron", "neuron-xla") for text in extras[extra]]
    assert {each.name for each in asked} >= set(PLACEHOLDER_VERSIONS)
    for each in asked:
        assert PLACEHOLDER_VERSIONS.get(each.name, "0") not in each.specifier, each


# ---- Loading the libraries -------------------------------------------------------------------------------------------


def test_a_missing_library_is_named_with_the_remedy() -> None:
    with pytest.raises(LaunchError, match=r"torch_neuronx cannot be imported .* install raynium\[neuron\]"):
        NeuronAccelerator().set_device(0)
    with pytest.raises(LaunchError, match=r"torch_xla cannot be imported .* install raynium\[neuron-xla\]"):
        NeuronXlaAccelerator().set_device(0)


def test_torch_xla_that_took_the_cpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch-xla does not load beside this torch, so the four names we use of it stand in."""
    library, runtime = types.ModuleType("torch_xla"), types.ModuleType("torch_xla.runtime")
    runtime.device_type = lambda: "CPU"  # pyright: ignore[reportAttributeAccessIssue]
    library.runtime = runtime  # pyright: ignore[reportAttributeAccessIssue]
    library.device = lambda: "xla:0"  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("torch_xla.distributed", "torch_xla.distributed.xla_backend"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "torch_xla", library)
    monkeypatch.setitem(sys.modules, "torch_xla.runtime", runtime)
    with pytest.raises(LaunchError, match="torch-xla took device 'CPU' and not 'NEURON'"):
        NeuronXlaAccelerator().set_device(0)
    runtime.device_type = lambda: "NEURON"  # pyright: ignore[reportAttributeAccessIssue]
    assert NeuronXlaAccelerator().set_device(0) == "xla:0"


class CompileCacheFs:
    """What stands in for libneuronxla's cache in a folder: a lock is a file, and whoever finds one waits."""

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def clear_locks(self) -> None:
        for lock in self.folder.rglob("*.lock"):
            lock.unlink()


class CacheUrl:
    @staticmethod
    def get_cache_url(cache_dir: str | None = None) -> str:
        return cache_dir or os.environ["NEURON_COMPILE_CACHE_URL"]


def test_locks_of_killed_compilations_are_taken_away_by_the_first_rank_of_a_node(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library, runtime = types.ModuleType("torch_xla"), types.ModuleType("torch_xla.runtime")
    vars(runtime)["device_type"] = lambda: "NEURON"
    vars(library).update(runtime=runtime, device=lambda: "xla:0")
    cache = types.ModuleType("libneuronxla.neuron_cc_cache")
    stand_ins = {"torch_xla": library, "torch_xla.runtime": runtime, "libneuronxla.neuron_cc_cache": cache}
    for name in ("torch_xla.distributed", "torch_xla.distributed.xla_backend", "libneuronxla"):
        stand_ins[name] = types.ModuleType(name)
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("NEURON_COMPILE_CACHE_URL", str(tmp_path))
    NeuronXlaAccelerator().set_device(0)  # a library that has no such names costs a line
    assert "locks of killed compilations stay" in caplog.text
    vars(cache).update(CacheUrl=CacheUrl, create_compile_cache=CompileCacheFs)
    lock = tmp_path / "neuronxcc-2.21/MODULE_1+2/model.hlo_module.pb.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    NeuronXlaAccelerator().set_device(1)
    assert lock.exists()  # by then the others may compile
    NeuronXlaAccelerator().set_device(0)
    assert not lock.exists() and lock.parent.exists()
