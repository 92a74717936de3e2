"""Preflight: the checks on recorded machines, the trial with real ranks, and who is left out. Ray only where marked."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from neuron_twin import write_site
from tiny import job_text
from torch.utils._python_dispatch import TorchDispatchMode

from raynium.accelerators.base import Place
from raynium.accelerators.cpu import CpuAccelerator
from raynium.accelerators.cuda import CudaAccelerator
from raynium.accelerators.neuron import NeuronAccelerator
from raynium.accelerators.neuron_xla import NeuronXlaAccelerator
from raynium.config.load import parse_config
from raynium.config.schema import Config
from raynium.hardware.catalog import INSTANCES
from raynium.health.checks import NodeNeeds, compile_cache, foreign_processes, host_checks, neuron_devices
from raynium.health.host import NO_ANSWER, Check, RecordedHost, ThisHost
from raynium.health.metadata_service import MetadataService
from raynium.health.report import NodeReport, Report, blamed, rounds_of_pairs
from raynium.health.trial_checks import (
    Gemm,
    RankResult,
    Reduced,
    cluster_floor,
    gemm_check,
    nccom_test,
    ranks_check,
    reduce_check,
)
from raynium.node import orphans
from raynium.node.diagnosis import KernelLog
from raynium.node.preflight import (
    NodeProbe,
    TrialOrder,
    cache_folder,
    kernel_log,
    needs_of,
    run_ranks,
    storage_checks,
)
from raynium.node.ranks import start_process
from raynium.rank.ports import free_port
from raynium.rank.trial import multiply
from raynium.storage.store import Store

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures/doctor"
GIB = 2**30
TRN2 = RecordedHost.from_json((FIXTURES / "healthy-trn2.json").read_text())
WHOLE_NODE = Place(0, 64, 0, 64, "127.0.0.1", 45123, "checked", inherited={})
NEEDS = NodeNeeds("neuron", 2, 64, 200 * GIB, ("/tmp",), instance_type="trn2.48xlarge")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return parse_config(job_text({"run.name": "checked", "train.global_batch_size": 8}, root=tmp_path))


def on_host(host: RecordedHost, needs: NodeNeeds = NEEDS) -> dict[str, Check]:
    return {check.name: check for check in host_checks(host, needs)}


def not_ok(host: RecordedHost, needs: NodeNeeds = NEEDS) -> dict[str, str]:
    return {name: check.status for name, check in on_host(host, needs).items() if check.status != "ok"}


def with_devices(**changes: Any) -> RecordedHost:
    """The healthy node, with something else in what neuron-ls says of its first chip."""
    command = "/opt/aws/neuron/bin/neuron-ls -j"
    devices = json.loads(TRN2.commands[command][1])
    devices[0] |= changes
    return replace(TRN2, commands=TRN2.commands | {command: (0, json.dumps(devices))})


# ---- what shows without a rank ---------------------------------------------------------------------------------------


def test_a_healthy_trn2_passes_everything() -> None:
    assert not_ok(TRN2) == {}
    assert on_host(TRN2)["neuron cores"].found == "16 chip(s), 64 cores at LNC 2"


def test_a_missing_chip_fails() -> None:
    command = "/opt/aws/neuron/bin/neuron-ls -j"
    devices = json.loads(TRN2.commands[command][1])[:15]
    host = replace(TRN2, commands=TRN2.commands | {command: (0, json.dumps(devices))})
    found = on_host(host)["neuron cores"]
    assert found.is_bad and found.found.startswith("15 chip(s), 60 cores")
    assert found.rule == "trn2.48xlarge has 16 chip(s), 64 cores at LNC 2"


def test_another_lnc_than_the_ranks_will_set_fails() -> None:
    assert "LNC 1/2" in on_host(with_devices(logical_neuroncore_config=1, nc_count=8))["neuron cores"].found
    told = replace(TRN2, environment={"NEURON_LOGICAL_NC_CONFIG": "1"})
    assert on_host(told)["neuron cores"].rule == "trn2.48xlarge has 16 chip(s), 128 cores at LNC 1"
    assert on_host(told)["neuron cores"].is_bad


def test_a_trn1_has_no_lnc() -> None:
    host = RecordedHost.from_json((FIXTURES / "silent-cpu-trn1.json").read_text())
    needs = replace(NEEDS, accelerator="neuron_xla", nodes=1, ranks=2, shared_memory_bytes=GIB, instance_type=None)
    assert on_host(host, needs)["neuron cores"].found == "1 chip(s), 2 cores at LNC 1"
    assert on_host(host, needs)["neuron cores"].status == "ok"


@pytest.mark.parametrize(
    ("commands", "problem"),
    [
        ({}, "not installed"),
        ({"/opt/aws/neuron/bin/neuron-ls -j": (1, "no driver")}, "ended with 1: no driver"),
        ({"/opt/aws/neuron/bin/neuron-ls -j": (0, '{"instance": {"devices": 16}}')}, "another format"),
        ({"/opt/aws/neuron/bin/neuron-ls -j": (0, "[]")}, "lists no device"),
    ],
)
def test_what_cannot_be_looked_at_is_no_fault_of_the_node(commands: dict[str, tuple[int, str]], problem: str) -> None:
    found = on_host(replace(TRN2, commands=commands))
    assert problem in found["neuron cores"].found and found["neuron cores"].status == "warning"
    assert found["foreign processes"].status == "skipped"
    assert not any(check.is_bad for check in found.values())


def test_processes_of_others_on_our_cores() -> None:
    held = [{"pid": 4242, "command": "python train.py", "neuron_runtime_version": "2.35"}]
    host = with_devices(neuron_processes=held)
    foreign = on_host(host)["foreign processes"]
    assert foreign.is_bad and foreign.found == "pid 4242 (python train.py) on chip 0"
    assert not on_host(host, replace(NEEDS, own_pids=frozenset({4242})))["foreign processes"].is_bad

    def granted(cores: str) -> Check:
        other = replace(host, environment={"NEURON_RT_VISIBLE_CORES": cores})
        return foreign_processes(other, NEEDS, neuron_devices(other))

    assert granted("4-7").status == "ok"  # the next chip
    assert granted("0-1").status == "warning"  # half of that chip: the other half may be the other job's
    assert granted("0-3").is_bad
    assert "no core or range" in granted("0-").found


def test_the_wrong_instance_type_is_named() -> None:
    found = on_host(replace(TRN2, product_name="trn2.3xlarge"))["instance type"]
    assert found.is_bad and found.found == "trn2.3xlarge" and "trn2.48xlarge" in found.rule
    assert on_host(replace(TRN2, product_name="Standard PC"))["instance type"].status == "warning"
    assert on_host(replace(TRN2, product_name=None))["instance type"].status == "warning"
    assert on_host(TRN2, replace(NEEDS, instance_type=None))["instance type"].status == "skipped"


def test_efa_cards_are_counted_where_nodes_talk() -> None:
    few = replace(TRN2, folders=TRN2.folders | {"/sys/class/infiniband": ("rdmap0s0",)})
    assert on_host(few)["EFA cards"].is_bad and on_host(few)["EFA cards"].found == "1"
    assert on_host(few, replace(NEEDS, nodes=1))["EFA cards"].status == "skipped"
    # Nobody has published what the small one's card carries.
    small = replace(few, product_name="trn2.3xlarge", folders={})
    assert on_host(small, replace(NEEDS, instance_type=None))["EFA cards"].status == "warning"
    assert on_host(replace(few, product_name=None))["EFA cards"].status == "skipped"
    for command in ("fi_info -p efa", "/opt/amazon/efa/bin/fi_info -p efa"):
        commands = {name: each for name, each in TRN2.commands.items() if not name.startswith("fi_info")}
        broken = replace(TRN2, commands=commands | {command: (61, "fi_getinfo: -61 (No data available)")})
        assert "ended with 61: fi_getinfo" in on_host(broken)["EFA cards"].found and on_host(broken)["EFA cards"].is_bad


def test_memory_disk_and_names() -> None:
    small = replace(TRN2, free={"/dev/shm": 100 * GIB, "/tmp": GIB})
    assert on_host(small)["shared memory"].is_bad and "size=201G" in on_host(small)["shared memory"].remedy
    assert on_host(small)["free disk"].is_bad and on_host(small)["free disk"].found == "1.0 GiB at /tmp"
    assert not_ok(replace(TRN2, free={"/dev/shm": 200 * GIB, "/tmp": 10 * GIB})) == {"free disk": "warning"}
    assert not_ok(replace(TRN2, free={})) == {"shared memory": "skipped", "free disk": "skipped"}
    limits = {"/proc/self/limits": "Max locked memory         65536                65536                bytes\n"}
    limited = on_host(replace(TRN2, files=TRN2.files | limits))["locked memory"]
    assert limited.status == "warning" and limited.found == "0 MiB"
    long_name = {"/proc/sys/kernel/hostname": "x" * 64}
    assert on_host(replace(TRN2, files=TRN2.files | long_name))["host name"].is_bad
    assert on_host(replace(TRN2, files={}))["host name"].status == "skipped"


def test_as_many_files_may_be_open_as_ranks_connect() -> None:
    def at_limit(limit: str, needs: NodeNeeds = NEEDS) -> Check:
        limits = {
            "/proc/self/limits": f"Max open files            {limit}                 1048576              files\n"
        }
        return on_host(replace(TRN2, files=TRN2.files | limits), needs)["open files"]

    few = at_limit("1024")
    assert few.status == "warning" and few.found == "1024" and "`ulimit -n 65535` before `ray start`" in few.remedy
    assert at_limit("65535").status == at_limit("unlimited").status == "ok"
    assert on_host(replace(TRN2, files={}))["open files"].status == "skipped"
    on_gpus = replace(NEEDS, accelerator="cuda", ranks=8, nodes=4)
    assert (at_limit("512", on_gpus).status, at_limit("511", on_gpus).status) == ("ok", "warning")


def test_huge_pages_are_wanted_where_efa_is() -> None:
    def having(meminfo: str) -> Check:
        return on_host(replace(TRN2, files=TRN2.files | {"/proc/meminfo": meminfo}))["huge pages"]

    assert having("HugePages_Total:    5128\nHugePages_Free:     1\n").found == "1 of 5128 free"
    none_left = having("HugePages_Total:    5128\nHugePages_Free:     0\n")
    assert none_left.status == "warning" and "EFA installer" in none_left.remedy
    assert having("MemTotal: 1 kB\n").status == "skipped"
    assert on_host(replace(TRN2, folders={}))["huge pages"].status == "skipped"


@pytest.mark.parametrize(
    ("service", "status", "words"),
    [
        (MetadataService(True, False, "trn2.48xlarge", "worker"), "ok", "credentials of role worker"),
        (MetadataService(True, False, "trn2.48xlarge"), "ok", "no instance profile"),
        (MetadataService(True, True, "trn2.48xlarge", "worker"), "warning", "version 1 answers too"),
        (MetadataService(False, True, "trn2.48xlarge", "worker"), "warning", "only version 1 answers"),
        (MetadataService(False, False), "warning", "it does not answer"),
        (None, "skipped", "not an EC2 instance"),
    ],
)
def test_the_metadata_service_answers_to_tokens_only(service: MetadataService | None, status: str, words: str) -> None:
    found = on_host(replace(TRN2, imds=service))["instance metadata"]
    assert (found.status, words in found.found) == (status, True)
    assert ("modify-instance-metadata-options" in found.remedy) == (status == "warning")
    assert ("hop-limit 2" in found.remedy) == (service is not None and not service.gives_token)


def test_the_kernel_log_is_named_or_why_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kmsg").touch()
    for path, status, words in (("kmsg", "ok", "kmsg"), ("none", "warning", "none: No such file or directory")):
        log = KernelLog(tmp_path / path, programs=())
        monkeypatch.setattr("raynium.node.preflight.KernelLog", lambda log=log: log)
        assert kernel_log().status == status and words in kernel_log().found


def test_gpus_are_counted() -> None:
    host = RecordedHost(devices=("nvidia0", "nvidia1"), free={"/dev/shm": GIB, "/tmp": 90 * GIB})
    needs = NodeNeeds("cuda", 1, 4, 0, ("/tmp",))
    assert on_host(host, needs)["GPUs"].is_bad
    assert on_host(host, replace(needs, ranks=2))["GPUs"].status == "ok"
    assert on_host(RecordedHost(), needs)["accelerator"].is_bad


def test_a_compile_cache_must_be_writable(tmp_path: Path) -> None:
    assert compile_cache(str(tmp_path / "new" / "neff")).status == "ok"
    assert list((tmp_path / "new" / "neff").iterdir()) == []
    (tmp_path / "file").touch()
    found = compile_cache(str(tmp_path / "file" / "neff"))
    assert found.is_bad and "Not a directory" in found.found


def test_which_folder_is_the_compile_cache(config: Config) -> None:
    def of(accelerator: str, **environment: str) -> str | None:
        cluster = config.cluster.model_copy(update={"accelerator": accelerator})
        return cache_folder(config.model_copy(update={"cluster": cluster}), environment)

    assert of("cpu") is None
    assert of("neuron", TORCH_NEURONX_NEFF_CACHE_DIR="/cache") == "/cache"
    for name in ("neuron", "neuron_xla"):  # else it is what the trial's ranks will be told
        accelerator = NeuronAccelerator() if name == "neuron" else NeuronXlaAccelerator()
        assert of(name) in accelerator.environment(WHOLE_NODE).values()
    assert of("neuron_xla", NEURON_COMPILE_CACHE_URL="s3://bucket/cache") is None


def test_shared_memory_is_what_snapshots_and_copies_take(config: Config) -> None:
    """The same everywhere: what a preflight asks for, and in which images ranks and agents write."""
    from raynium.models.flops import parameter_count

    def needs(**changes: Any) -> NodeNeeds:
        settings = {"train.global_batch_size": 8} | {name.replace("__", "."): value for name, value in changes.items()}
        return needs_of(parse_config(job_text(settings)), {})

    # Two ranks share parameters and both moments in float32; each keeps two snapshots.
    state = 12 * parameter_count(config.model).total
    assert needs().shared_memory_bytes == pytest.approx(2 * state, rel=0.01)
    assert needs(fault__snapshot_every_steps=5).shared_memory_bytes == pytest.approx(3 * state, rel=0.01)
    alone = needs(fault__snapshot_every_steps=5, fault__buddy_copies=True)
    assert alone.shared_memory_bytes == pytest.approx(3 * state, rel=0.01), "nobody has copies of it"
    # Four ranks on two nodes: each node has half of the state, and of copies as much as of its own newest two.
    found = needs(cluster__nodes=2, fault__snapshot_every_steps=5, fault__buddy_copies=True)
    assert found.shared_memory_bytes == pytest.approx(5 * state / 2, rel=0.01) and (found.images, found.copies) == (
        3,
        2,
    )
    check = on_host(replace(TRN2, free={"/dev/shm": 0}), replace(found, shared_memory_bytes=5 * GIB))["shared memory"]
    assert (
        check.is_bad
        and check.rule == "3 snapshots of 2 rank(s) and 2 copies of as many of another node's, 5.00 GiB (estimate)"
    )
    assert "size=6G" in check.remedy and check.remedy.endswith("; or no copies (fault.buddy_copies)")
    assert "fault" not in on_host(replace(TRN2, free={"/dev/shm": 0}))["shared memory"].remedy


# ---- storage ---------------------------------------------------------------------------------------------------------


def test_storage_is_shared_and_its_clock_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(tmp_path).write_new("probes/driver", b"driver")
    checks = storage_checks(str(tmp_path), probes="probes", node="a")
    assert [(check.name, check.status) for check in checks] == [("storage", "ok"), ("clock", "ok")]

    (missing,) = storage_checks(str(tmp_path / "another"), probes="probes", node="a")
    assert missing.is_bad and "is not the folder that the driver writes" in missing.found

    (tmp_path / "file").touch()
    (unwritable,) = storage_checks(str(tmp_path / "file"), probes="probes", node="a")
    assert unwritable.is_bad

    times = iter([1_000.0, 1_001.0])
    monkeypatch.setattr("raynium.node.preflight.time.time", lambda: next(times))
    *_, clock = storage_checks(str(tmp_path), probes="probes", node="b")
    assert clock.status == "warning" and "chrony" in clock.remedy


@pytest.mark.s3
def test_storage_in_s3(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    root = s3_server.create_bucket("preflight") + "/runs"
    Store(root).write_new("probes/driver", b"driver")
    checks = storage_checks(root, probes="probes", node="a")
    assert [(check.name, check.status) for check in checks] == [("storage", "ok"), ("clock", "ok")]
    assert set(Store(root).list().sizes) == {"probes/driver", "probes/a"}


# ---- judging a trial -------------------------------------------------------------------------------------------------


def gemm(tflops: float, *, exact: bool = True, peak: float | None = 166.75e12) -> Gemm:
    return Gemm(tflops * 1e12, 20.0, exact, peak)


def judged(*gemms: Gemm, on_cpu: bool = False) -> Check:
    return gemm_check([RankResult(rank, each) for rank, each in enumerate(gemms)], on_cpu=on_cpu)


def test_products_are_judged_by_exactness_peak_and_neighbours() -> None:
    assert judged(gemm(90), gemm(95)).status == "ok"
    assert "wrong numbers from rank(s) 1;" in judged(gemm(90), gemm(95, exact=False)).found
    cpu_fallback = judged(gemm(90), gemm(0.2))
    assert cpu_fallback.is_bad and "too slow: rank(s) 1;" in cpu_fallback.found and "by the CPU" in cpu_fallback.remedy
    throttled = judged(gemm(90), gemm(92), gemm(30))
    assert throttled.is_bad and "rank(s) 2 below half of the node's median" in throttled.found
    assert judged(gemm(30, peak=None)).status == "ok"  # no peak is known: only neighbours can tell
    assert judged(gemm(0.0001), on_cpu=True).status == "warning"
    assert judged(gemm(0.1), gemm(0.1), gemm(0.01), on_cpu=True).status == "warning"
    assert gemm_check([RankResult(0, problem="died")], on_cpu=True).status == "skipped"


def swept(*seconds: float, exact: bool = True) -> tuple[Reduced, ...]:
    return tuple(Reduced(10**6 * 10**i, each, exact) for i, each in enumerate(seconds))


def test_all_reduces_are_judged_by_the_slowest_rank() -> None:
    def judge(*ranks: tuple[Reduced, ...], floor: float = 4e9, on_cpu: bool = False) -> Check:
        results = [RankResult(rank, reduced=each) for rank, each in enumerate(ranks)]
        return reduce_check("all-reduce", results, ranks=len(ranks), on_cpu=on_cpu, floor_bytes_per_second=floor)

    # 10 MB in 2 ms over 2 ranks: 5 GB/s × 2 (2 - 1) / 2
    well = judge(swept(1e-3, 2e-3), swept(1e-3, 1e-3))
    assert well.status == "ok" and well.found.startswith("5 GB/s over 2 ranks")
    assert judge(swept(1e-3, 4e-3), swept(1e-3, 1e-3)).is_bad
    assert judge(swept(1e-3, 4e-3), swept(1e-3, 1e-3), on_cpu=True).status == "warning"
    assert "wrong sums on rank(s) 1;" in judge(swept(1e-3), swept(1e-3, exact=False)).found
    assert judge(()).status == "skipped"
    assert judge((), ()).status == "skipped"


def test_the_floor_between_nodes_is_a_share_of_the_catalogues_figure() -> None:
    assert cluster_floor(INSTANCES["trn2.48xlarge"], on_cpu=False) == pytest.approx(4e9)  # 3,200 Gbit/s, a hundredth
    assert cluster_floor(INSTANCES["trn2.3xlarge"], on_cpu=False) == 0
    assert cluster_floor(None, on_cpu=False) == 0


@pytest.mark.parametrize("instance_type", ["trn1.32xlarge", "trn1n.32xlarge", "trn2.48xlarge"])
def test_aws_own_example_of_two_nodes_is_well_above_the_floor(instance_type: str) -> None:
    """nccom-test's guide, "Multiple Instances Example": fp32 over 64 ranks, microseconds of 1 and of 32 MiB."""
    reduced = (Reduced(2**20, 1328e-6, True), Reduced(32 * 2**20, 2711e-6, True))
    floor = cluster_floor(INSTANCES[instance_type], on_cpu=False)
    swept = [RankResult(rank, reduced=reduced) for rank in range(64)]
    twice_as_fast = reduce_check("all", swept, ranks=64, on_cpu=False, floor_bytes_per_second=2 * floor)
    assert twice_as_fast.status == "ok" and twice_as_fast.found.startswith("24.4 GB/s")


def test_nccom_test_is_read_as_documented() -> None:
    command = "/opt/aws/neuron/bin/nccom-test -r 64 allr -b 32MB -e 32MB -n 5 -w 2 -d fp32 -c --non-interactive"

    def answer(code: int, text: str) -> Check:
        return nccom_test(RecordedHost(commands={command: (code, text)}), ranks=64, timeout_seconds=1)

    healthy = nccom_test(TRN2, ranks=64, timeout_seconds=1)
    assert (healthy.status, healthy.found) == ("ok", "86.02 GB/s")
    assert answer(0, "Avg bus bandwidth:      1.5GB/s\n").is_bad
    # The runtime's own words are on stderr, which comes last.
    assert answer(0, "Avg bus bandwidth:\t86.02GB/s\n2026-Nov-23 WARN NRT:nrt_init x").found == "86.02 GB/s"
    assert answer(NO_ANSWER, "no answer within 9 s").status == "warning"  # it compiles, or hangs: the ranks will tell
    assert "ended with 1: no route" in answer(1, "no route").found
    assert answer(0, "bandwidth unknown").status == "warning" and answer(0, "").status == "warning"
    assert nccom_test(RecordedHost(), ranks=64, timeout_seconds=1).status == "skipped"
    assert nccom_test(TRN2, ranks=1, timeout_seconds=1).status == "skipped"


class Flip(TorchDispatchMode):
    """A device with one bad cell: a single element of a large product is off by one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and result.shape[0] == result.shape[1]:
            result[3, 5] += 1
        return result


def test_one_wrong_element_of_a_product_is_found() -> None:
    cpu = torch.device("cpu")
    assert multiply(cpu, size=256, dtype=torch.float32, peak_flops=None).exact
    assert multiply(cpu, size=256, dtype=torch.bfloat16, peak_flops=None).exact  # rounds nothing
    with Flip():
        assert not multiply(cpu, size=256, dtype=torch.float32, peak_flops=None).exact


# ---- ranks -----------------------------------------------------------------------------------------------------------


def order(**changes: Any) -> TrialOrder:
    return replace(TrialOrder(0, 2, "127.0.0.1", free_port("127.0.0.1"), gemm=True, seconds=100), **changes)


def test_a_node_is_looked_at_and_its_ranks_are_tried(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orphans, "AGENT_VARIABLE", "RAYNIUM_AGENT_OF_THIS_TEST")  # agents beside us look for theirs
    mark = {name: f"{value}0" for name, value in orphans.agent_mark().items()}  # our pid, but another start
    orphan = subprocess.Popen(["sleep", "300"], env=os.environ | mark)
    Store(config.run.root).write_new("probes/driver", b"driver")
    probe = NodeProbe(config.model_dump(mode="json"), "probes")
    checks = {check.name: check for check in [*probe.look(), *probe.trial_here("127.0.0.1", 100)]}
    assert orphan.wait(60) == -signal.SIGKILL and checks["orphans"].status == "warning"
    assert f"process {orphan.pid} (sleep 300) was left behind" in checks["orphans"].found
    assert not any(check.is_bad for check in checks.values()), checks
    assert checks["ranks"].found == "2 started and ended"
    assert "TFLOP/s" in checks["matrix product"].found and "GB/s over 2 ranks" in checks["all-reduce"].found


@pytest.fixture(scope="module")
def warm_template() -> None:
    """Ranks are forked within milliseconds from here on: torch is imported."""
    process = multiprocessing.get_context("forkserver").Process(target=os.getpid)
    start_process(process)
    process.join()


@pytest.mark.usefixtures("warm_template")
def test_ranks_that_wait_for_peers_are_ended_and_say_where_they_were(config: Config) -> None:
    results = run_ranks(CpuAccelerator(), config, order(world_size=4, seconds=8))
    assert [each.rank for each in results] == [0, 1]
    found = ranks_check(results)
    assert found.is_bad and "rank 0: still in phase 'process group' after 8 s" in found.found


@pytest.mark.usefixtures("warm_template")
def test_ranks_that_are_late_while_a_graph_is_compiled_say_nothing_about_the_node(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "/opt/aws_neuronx_venv_pytorch_2_9/bin/python\0/opt/…/bin/neuronx-cc\0compile\0--target=trn1\0"
    busy = RecordedHost(
        folders={"/proc": ("1", "77", "self")}, files={"/proc/1/cmdline": "", "/proc/77/cmdline": command}
    )
    monkeypatch.setattr("raynium.node.preflight.ThisHost", lambda: busy)
    found = ranks_check(run_ranks(CpuAccelerator(), config, order(world_size=4, seconds=8)))
    assert found.status == "warning" and "preflight.seconds" in found.remedy
    assert "rank 1: still in phase 'process group' after 8 s, while a compiler runs" in found.found
    failed = RankResult(2, problem="killed by SIGSEGV")
    assert ranks_check([RankResult(0, unjudged="late"), failed]).is_bad


def test_a_command_that_is_given_up_leaves_no_child_behind(tmp_path: Path) -> None:
    """As nccom-test, whose child would go on holding the cores that the trial takes next."""
    pid_file = tmp_path / "pid"
    ran = ThisHost().run("sh", "-c", f"sleep 600 & echo $! > {pid_file}; wait", timeout_seconds=1)
    assert ran is not None and ran.code == NO_ANSWER
    child = Path("/proc", pid_file.read_text().strip(), "stat")
    for _ in range(100):  # the signal is sent; whose child it is now must take note
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child still runs")


def test_two_nodes_make_one_group(config: Config) -> None:
    results: dict[int, list[RankResult]] = {}
    first = order(world_size=4, gemm=False)
    orders = [first, replace(first, first_rank=2)]
    nodes = [
        threading.Thread(
            target=lambda each=each: results.update({each.first_rank: run_ranks(CpuAccelerator(), config, each)})
        )
        for each in orders
    ]
    for node in nodes:
        node.start()
    for node in nodes:
        node.join()
    everybody = [*results[0], *results[2]]
    assert ranks_check(everybody).status == "ok" and all(each.gemm is None for each in everybody)
    judged = reduce_check("all-reduce", everybody, ranks=4, on_cpu=True, floor_bytes_per_second=0)
    assert judged.status == "ok" and "over 4 ranks" in judged.found


def test_a_rank_that_fails_is_told_from_those_that_waited_for_it(config: Config) -> None:
    found = ranks_check(run_ranks(CudaAccelerator(), config, order()))
    assert found.is_bad and "LaunchError: cluster.accelerator is 'cuda'" in found.found
    assert "in phase 'start'" in found.found
    on_cuda = config.model_copy(update={"cluster": config.cluster.model_copy(update={"accelerator": "cuda"})})
    (result,) = NodeProbe(on_cuda.model_dump(mode="json"), "probes").trial(order())
    assert "which this machine cannot use" in result.problem


class SecondRankFails(CpuAccelerator):
    def environment(self, place: Place) -> dict[str, str]:
        broken = {"LOCAL_WORLD_SIZE": "0"} if place.rank == 1 else {}  # it divides by that, before it joins the group
        return super().environment(place) | broken


def test_only_the_rank_that_failed_is_named(config: Config) -> None:
    found = ranks_check(run_ranks(SecondRankFails(), config, order()))
    assert found.found == "rank 1: ZeroDivisionError: integer division or modulo by zero (in phase 'fork')"


def test_a_device_whose_work_the_cpu_does_is_caught(config: Config, tmp_path: Path) -> None:
    """The Neuron twin says that it is a trn2.3xlarge, and computes on the CPU: right numbers, at a hundredth."""
    Store(config.run.root).write_new("probes/driver", b"driver")
    twin = write_site(tmp_path / "twin")
    settings = config.model_copy(update={"cluster": config.cluster.model_copy(update={"accelerator": "neuron"})})
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NEURON_")}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "_preflight_probe.py")],
        input=json.dumps({"config": settings.model_dump(mode="json"), "probes": "probes", "seconds": 200}),
        env=environment | twin | {"NEURON_RT_VISIBLE_CORES": "2,3", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    checks = {each["name"]: each for each in json.loads(done.stdout.splitlines()[-1])}
    failed = {name for name, each in checks.items() if each["status"] == "failed"}
    assert failed in ({"matrix product"}, {"matrix product", "all-reduce"}), checks  # the CPU may reach 4 GB/s
    assert "too slow: rank(s) 0, 1" in checks["matrix product"]["found"]
    assert "is the work done by the CPU?" in checks["matrix product"]["remedy"]
    assert checks["ranks"]["found"] == "2 started and ended"
    assert checks["nccom-test"]["status"] == "skipped"


# ---- who is left out -------------------------------------------------------------------------------------------------

GOOD, BAD = Check("neuron cores", "ok", "64"), Check("neuron cores", "failed", "60", "64 cores", "replace it")


def nodes(*checks: Check) -> tuple[NodeReport, ...]:
    return tuple(NodeReport(f"id-{i}", f"10.0.0.{i}", (check,)) for i, check in enumerate(checks))


def test_a_run_starts_without_the_bad_node_if_enough_are_left() -> None:
    report = Report(2, nodes(GOOD, BAD, GOOD))
    assert report.refusal() is None
    assert report.summary() == "preflight: 2 fit node(s), without 10.0.0.1 (neuron cores) (0.0 s)"
    assert [each["fit"] for each in report.to_json()["nodes"]] == [True, False, True]
    assert json.loads(json.dumps(report.to_json()))["may_start"] is True


def test_too_few_fit_nodes_are_refused_by_name_with_the_remedy() -> None:
    refusal = Report(2, nodes(GOOD, BAD)).refusal()
    assert refusal is not None and "found 1 fit node(s), and the run needs 2" in refusal
    assert "node 10.0.0.1: neuron cores: 60; the rule is 64 cores; replace it" in refusal


def test_nodes_that_do_not_work_together_are_refused() -> None:
    report = Report(2, nodes(GOOD, GOOD), between_nodes=(Check("all-reduce over 2 nodes", "failed", "0.1 GB/s"),))
    assert "fit, but not together" in (report.refusal() or "") and "10.0.0.0, 10.0.0.1" in (report.refusal() or "")
    assert report.rows()[-1] == ("all nodes", "all-reduce over 2 nodes", "failed", "0.1 GB/s")


def test_busy_nodes_are_shown() -> None:
    assert Report(1, nodes(GOOD), busy=("10.0.0.9",)).rows()[-1][:3] == ("10.0.0.9", "-", "skipped")


def test_everybody_meets_both_neighbours() -> None:
    assert rounds_of_pairs("abcd") == [[("a", "b"), ("c", "d")], [("b", "c"), ("d", "a")]]
    assert rounds_of_pairs("abc") == [[("a", "b")], [("b", "c")], [("c", "a")]]


@pytest.mark.parametrize("names", ["abc", "abcd", "abcde", "abcdefgh"])
def test_the_one_that_works_with_nobody_is_blamed(names: str) -> None:
    pairs = [pair for pairs in rounds_of_pairs(names) for pair in pairs]
    for culprit in names:
        assert blamed({pair: culprit not in pair for pair in pairs}) == {culprit}
    assert blamed({pair: True for pair in pairs}) == set()
    assert blamed({pair: False for pair in pairs}) == set()  # a fault of all, such as a security group's
