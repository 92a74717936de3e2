"""The template that ranks are forked from: it has all that they need, and nothing that does not survive a fork."""

import json
import multiprocessing
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from s3_server import S3Server

from raynium.accelerators.cpu import CpuAccelerator
from raynium.checkpoint.commit import commit_checkpoint
from raynium.checkpoint.format.manifest import ImageInfo
from raynium.checkpoint.upload import upload_shard
from raynium.config.images import IMAGE_SLOTS
from raynium.config.load import parse_config
from raynium.config.schema import Config
from raynium.config.world import World
from raynium.data.build.store_build import build_store
from raynium.node import ranks
from raynium.node.ranks import RankGroup, start_process, start_template
from raynium.rank.entry import COMPILE_BACKEND_VARIABLE
from raynium.rank.group import wait_for_rank_0
from raynium.rank.plan import RankPlan
from raynium.rank.ports import free_port
from raynium.storage.store import Store
from raynium.train.link import ImageFree, ImageWritten

TESTS = Path(__file__).parent

JOB = """
run: {name: template}
cluster: {accelerator: cpu, ranks_per_node: 2}
model: {vocab_size: 512, hidden_size: 32, num_layers: 2, num_heads: 2, num_kv_heads: 1, head_dim: 16, ffn_size: 64,
        max_seq_len: 64}
data: {path: /nowhere, seq_len: 32}
engine: {dtype: bfloat16, fsdp: fsdp2}
train: {steps: 6, global_batch_size: 4}
checkpoint: {every_steps: 2}
evaluate: {every_steps: 3, max_documents: 2}
"""


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`_rank_programs`, where forked ranks find it too: they get our path."""
    monkeypatch.syspath_prepend(str(TESTS))
    import _rank_programs

    return _rank_programs


def huge_pages() -> bool:
    """Whether this machine gives them to a process that asks."""
    kernel = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    asked_by_glibc = platform.libc_ver() >= ("glibc", "2.35")
    return asked_by_glibc and kernel.is_file() and "[never]" not in kernel.read_text()


def fork_at_once(programs: ModuleType, file: Path) -> dict[str, Any]:
    """What a process has that was just forked from a new template."""
    process = multiprocessing.get_context("forkserver").Process(target=programs.write_what_is_there, args=(str(file),))
    start_process(process)
    process.join()
    return json.loads(file.read_text())


def play(plan: RankPlan, environment: dict[str, str], program: Any) -> list[ImageWritten]:
    """Runs a generation's ranks to their end; returns what each rank said of its last save."""
    port = str(free_port("127.0.0.1"))
    of_all = environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    of_all |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    group = RankGroup(
        {rank: of_all | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)},
        plan.to_json(),
        program=program,
    )
    for slot in range(IMAGE_SLOTS):
        group.broadcast(ImageFree(slot))
    images: dict[int, ImageWritten] = {}
    lines: list[tuple[int, str]] = []
    while group.alive():
        messages, new_lines = group.poll(1)
        lines += new_lines
        for rank, message in messages:
            if isinstance(message, ImageWritten):
                images[rank] = message
                group.send(rank, ImageFree(message.slot))
    group.kill()
    lines += group.drain()[1]
    assert [each.process.exitcode for each in group.ranks.values()] == [0, 0], lines
    group.close()
    return [images[rank] for rank in range(2)]


@pytest.mark.parametrize(
    ("compile_backend", "storage"),
    [
        (None, "file"),
        ("aot_eager", "file"),
        pytest.param(None, "s3", marks=pytest.mark.s3),
        pytest.param("inductor", "file", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_started_again_imports_nothing(
    tmp_path: Path,
    programs: ModuleType,
    request: pytest.FixtureRequest,
    compile_backend: str | None,
    storage: str,
) -> None:
    source = tmp_path / "text"
    source.mkdir()
    for number in range(20):
        lines = (f"def function_{number}_{line}(x): return x * {line}" for line in range(60))
        (source / f"{number}.py").write_text("\n".join(lines))
    build_store(tmp_path / "documents", source=str(source), vocab_size=512, heldout_fraction=0.2)
    images = tmp_path / "images"
    images.mkdir()
    config = parse_config(JOB, {"engine.compile": "none" if compile_backend is None else "block"})
    environment = {
        "TEST_COMPILE_BACKEND": compile_backend or CpuAccelerator.compile_backend,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }
    store = Store(tmp_path / "run")
    if storage == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        store = Store(f"{server.create_bucket('template')}/run", options=server.options)
        environment |= server.env

    def play_plan(config: Config, **fields: Any) -> list[ImageWritten]:
        fields = {"resume_step": None} | fields
        plan = RankPlan(
            config=config,
            world=World.of(config),
            run_url=store.url,
            data_places=[str(tmp_path / "documents")],
            image_folder=str(images),
            **fields,
        )
        return play(plan, environment, programs.train_and_write_modules)

    start_template(run_url="", compile_backend=None)  # so that there is one to end
    ranks._end_template()
    start_template(run_url=store.url, compile_backend=compile_backend)
    forked = fork_at_once(programs, tmp_path / "forked.json")
    assert forked["threads_of_template"] == 1, "threads do not survive a fork"
    assert forked["left_alone_by_gc"] > 100_000
    if huge_pages():
        assert forked["bytes_per_fault"] > 4 * 4096, "a new process touches its memory 4 KiB at a time"
    assert ("torch._inductor.compile_fx" in forked["modules"]) == (compile_backend == "inductor")

    def imported() -> set[str]:
        loaded = [set(json.loads((images / f"modules-{rank}.json").read_text())) for rank in range(2)]
        return (loaded[0] | loaded[1]) - set(forked["modules"])

    saved = play_plan(config.model_copy(update={"train": config.train.model_copy(update={"steps": 4})}))
    assert imported() == set(), "by ranks that start from the first weights"
    infos = [ImageInfo.from_json(each.info) for each in saved]
    entries = [upload_shard(store, info, generation="g1", rank=rank) for rank, info in enumerate(infos)]
    commit_checkpoint(
        store,
        step=4,
        generation="g1",
        entries=entries,
        state={"step": 4, "config": config.model_dump(mode="json")},
        world_size=2,
        layout={"data": 2, "tensor": 1},
        parent_step=None,
    )
    in_memory = {rank: [each.info, each.replicas] for rank, each in enumerate(saved)}
    play_plan(config, resume_step=4, resume_images=in_memory)
    assert imported() == set(), "by ranks that start from memory"
    play_plan(config, resume_step=4)
    assert imported() == set(), "by ranks that read the checkpoint"


def test_a_template_without_a_working_compiler_says_so_and_serves(tmp_path: Path) -> None:
    environment = os.environ | {
        COMPILE_BACKEND_VARIABLE: "inductor",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "CXX": str(tmp_path / "no-compiler"),
    }
    command = [sys.executable, "-c", "import raynium.rank.template"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "ranks will start more slowly, because the compiler does not work here" in ended.stderr


def test_a_rank_that_comes_before_rank_0_looks_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port("127.0.0.1")
    pauses: list[float] = []
    with socket.socket() as rendezvous:

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 3:
                rendezvous.bind(("127.0.0.1", port))
                rendezvous.listen()

        monkeypatch.setattr("raynium.rank.group.time.sleep", pause)
        wait_for_rank_0("127.0.0.1", port)
    assert len(pauses) == 3 and max(pauses) < 0.02


def test_a_rank_whose_rank_0_never_comes_leaves_it_to_torch_to_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raynium.rank.group.RENDEZVOUS_SECONDS", 0.01)
    wait_for_rank_0("127.0.0.1", free_port("127.0.0.1"))
