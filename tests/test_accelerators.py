"""Choosing an accelerator, and what its ranks' environment says."""

import os
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from raynium.accelerators import detect
from raynium.accelerators.base import Place
from raynium.accelerators.cpu import CpuAccelerator, is_loopback, machine_memory_bytes, multiplies_bfloat16
from raynium.accelerators.cuda import CudaAccelerator, peak_flops_of
from raynium.accelerators.detect import Machine, look
from raynium.errors import LaunchError


def devices(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).touch()
    return folder


def place(*, ranks: int = 1, host: str = "10.0.0.1") -> Place:
    return Place(0, ranks, 0, ranks, master_host=host, master_port=1234, run_name="run", inherited={})


@pytest.mark.parametrize(
    ("flags", "most", "is_worth_it"),
    [
        ("avx2 amx_bf16", None, True),
        ("avx2 amx_bf16", "ALL", True),
        ("avx2 amx_bf16", "avx512_core_amx", True),
        ("avx2 amx_bf16", "AVX512_CORE", False),
        ("avx2 avx512_bf16", None, False),
        ("avx2 avx512_bf16", "ALL", False),
    ],
)
def test_bfloat16_is_worth_it_where_matrix_units_are_there_and_may_be_used(
    flags: str, most: str | None, is_worth_it: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if most is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    assert multiplies_bfloat16(tmp_path / "cpuinfo") is is_worth_it


def test_this_machines_devices_are_those_that_the_kernel_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["raynium.accelerators.detect"], "DEVICE_FOLDER", tmp_path)
    # nvidiactl alone means a driver without a GPU that this container may use
    assert look_at(tmp_path, "null", "nvidiactl").gpus == 0
    assert look_at(tmp_path, "nvidia0", "nvidia1", "neuron0").gpus == 2
    assert look_at(tmp_path).neuron_devices == 1
    assert look_at(tmp_path).packages["torch"] == metadata.version("torch")


def look_at(folder: Path, *names: str) -> Machine:
    for name in names:
        (folder / name).touch()
    return look()


def test_auto_takes_the_gpu_if_there_is_one() -> None:
    assert detect("auto", Machine()).name == "cpu"
    assert detect("auto", Machine(gpus=1)).name == "cuda"
    assert detect("cpu", Machine(gpus=1)).name == "cpu"
    assert detect("cuda", Machine(gpus=1)).name == "cuda"


def test_a_missing_gpu_is_an_error() -> None:
    with pytest.raises(LaunchError, match=r"is 'cuda', which this machine cannot use: no GPU \(/dev/nvidia0\)"):
        detect("cuda", Machine())


def test_cpu_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raynium.accelerators.cpu.usable_cores", lambda: 8)

    def threads(ranks: int) -> str:
        return CpuAccelerator().environment(place(ranks=ranks))["OMP_NUM_THREADS"]

    assert [threads(ranks) for ranks in (1, 3, 8, 16)] == ["8", "2", "1", "1"]


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("10.0.0.1", False),
        ("node", False),
    ],
)
def test_gloo_is_bound_to_loopback_only_if_the_rendezvous_is(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback
    variables = CpuAccelerator().environment(place(host=host))
    assert ("GLOO_SOCKET_IFNAME" in variables) == loopback


def test_a_forked_rank_gets_its_threads_although_openmp_was_loaded_before(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", str(before + 1))
    try:
        assert CpuAccelerator().set_device(0) == torch.device("cpu")
        assert torch.get_num_threads() == before + 1
        monkeypatch.delenv("OMP_NUM_THREADS")
        CpuAccelerator().set_device(0)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_cpu_ranks_share_the_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("raynium.accelerators.cpu._CGROUP_LIMIT", limit)
    assert machine_memory_bytes() == physical
    limit.write_text("max\n")
    assert machine_memory_bytes() == physical
    limit.write_text("1000000\n")
    assert CpuAccelerator().memory_bytes(local_rank=0, local_world_size=4) == 250_000


def test_more_ranks_than_gpus_is_an_error() -> None:
    ranks = torch.cuda.device_count()
    with pytest.raises(LaunchError, match=rf"local rank {ranks} needs GPU {ranks}, but torch .* sees {ranks}"):
        CudaAccelerator().set_device(ranks)


def test_peak_flops_are_the_longest_names() -> None:
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "NVIDIA L40S", "NVIDIA L4"]
    assert [peak_flops_of(name, "bfloat16") for name in names] == [989e12, 756e12, 312e12, 362e12, 121e12]
    assert peak_flops_of("NVIDIA GeForce RTX 4090", "bfloat16") is None
    assert peak_flops_of("NVIDIA L40", "float32") is None
    assert CpuAccelerator().peak_flops("float32") is None
