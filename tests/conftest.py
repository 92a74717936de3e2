"""The layers of the tests, and fixtures that more than one test module uses.

Every test is in one of three layers:

    make quick   files that say `pytestmark = pytest.mark.quick`: they import no torch, start no cluster; under a minute
    make test    the quick ones, and all that carry neither mark: ten minutes at most on two cores
    make slow    files and single tests marked `slow`: Ray clusters, Neuron's twins, long schedules of faults
    make check   every test once, after format, lint and types: all that CI runs

`-m quick` does not even import the other files, so nobody waits for torch. `parity` is no layer: a test has that mark
when it takes a fixture named in PEERS, and `-m "not parity"` works where those are not installed. test_layers.py keeps
all of this true.
"""

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from s3_server import S3Server, running_s3_server
from tiny import build_documents

# Threads that wait for each other by spinning take the cores that tests, ranks and servers share. Changes no result
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# No test fails for its time: a busy machine may take any.
hypothesis.settings.register_profile("raynium", deadline=None)
hypothesis.settings.load_profile("raynium")


# Given to the workers first, the longest before all: what begins late would hold up the end.
LONGEST = (
    *("test_ray.py", "test_benchmarks.py", "test_checkpoint_faults.py", "test_neuron_twin.py", "test_chaos.py"),
    *("test_train_here.py", "test_preflight_ray.py", "test_nxd.py", "test_pair_twin.py", "test_packed_rows.py"),
    *("test_simple_fsdp.py", "test_native_engine.py", "test_walkthrough.py", "test_compile_twin.py", "test_lora.py"),
    *("test_pack_ray.py", "test_build_ray.py", "test_head_deaths.py", "test_tracking_sender.py"),
)


# Libraries that some tests compare ours with. Tests get them from fixtures of these names.
PEERS = ("transformers", "trl", "peft")


def is_quick(file: Path) -> bool:
    """Whether a test file is of the quick layer, by its text alone."""
    return re.search(r"^pytestmark = .*\bpytest\.mark\.quick\b", file.read_text(), re.MULTILINE) is not None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    quick_only = config.option.markexpr == "quick" and collection_path.match("test_*.py")
    return True if quick_only and not is_quick(collection_path) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if set(PEERS) & set(getattr(item, "fixturenames", ())):
            item.add_marker("parity")
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server. Mark its tests `s3`."""
    with running_s3_server(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real MLflow server, a `mlflow_server.Server`."""
    from mlflow_server import Server

    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def document_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny job's document store; nobody writes into it."""
    return build_documents(tmp_path_factory.mktemp("documents"))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a process's environment needs to find the twin of TorchNeuron."""
    from neuron_twin import write_site

    return write_site(tmp_path_factory.mktemp("twin") / "site")


@pytest.fixture
def save_run(tmp_path: Path) -> Callable[..., Any]:
    """Writes a model as a run's checkpoint, as its ranks would: weights, moments, tokenizer.

    save_run(model, config, name="first", step=4, num_ranks=1) -> Store of tmp_path/runs/<name>
    """
    import torch

    from raynium.checkpoint.commit import commit_checkpoint
    from raynium.checkpoint.format.image import ImageFile, plan_image, write_image
    from raynium.checkpoint.state import Chunk
    from raynium.checkpoint.upload import upload_shard
    from raynium.data.store import TOKENIZER_NAME
    from raynium.data.tokenizer import Tokenizer
    from raynium.storage.store import Store

    def save(model: Any, config: Any, *, name: str = "first", step: int = 4, num_ranks: int = 1, **fields: Any) -> Any:
        store = Store(tmp_path / "runs" / name)
        entries = []
        for rank in range(num_ranks):
            chunks = []
            for parameter_name, parameter in model.named_parameters():
                rows = len(parameter) // num_ranks
                part = slice(rank * rows, (rank + 1) * rows if rank < num_ranks - 1 else None)
                offsets = (rank * rows, *(0,) * (parameter.ndim - 1))
                for prefix, tensor in (
                    ("model", parameter.detach()),
                    ("optimizer/exp_avg", torch.zeros_like(parameter)),
                    ("optimizer/exp_avg_sq", torch.zeros_like(parameter)),
                ):
                    shape = tuple(parameter.shape)
                    chunks.append(Chunk(f"{prefix}/{parameter_name}", shape, offsets, tensor[part], saved_here=True))
            plan = plan_image(chunks)
            with ImageFile(tmp_path / f"image-{rank}") as image:
                write_image(plan, chunks, image.reserve(plan.size), step=step)
                info = plan.info(step=step, path=image.path)
                unit_bytes = fields.get("unit_bytes", 4096)
                entries.append(upload_shard(store, info, generation="g1", rank=rank, unit_bytes=unit_bytes))
                image.unlink()
        commit_checkpoint(
            store,
            step=step,
            generation="g1",
            entries=entries,
            state={"step": step, "config": config.model_dump(mode="json")},
            world_size=num_ranks,
            layout={"data": num_ranks, "tensor": 1},
            parent_step=fields.get("parent_step"),
        )
        tokenizer = Tokenizer.train(["def main(arguments): return arguments\n" * 20], vocab_size=280)
        store.replace(TOKENIZER_NAME, tokenizer.file_text.encode())
        return store

    return save


@pytest.fixture(scope="session")
def transformers() -> Any:
    import transformers

    return transformers


@pytest.fixture(scope="session")
def trl() -> Any:
    import trl

    return trl


@pytest.fixture(scope="session")
def peft(transformers: Any) -> Any:
    import peft

    return peft


@pytest.fixture(scope="session")
def transformers_model(transformers: Any) -> Callable[..., Any]:
    """transformers_model(model, **more) -> transformers' own model of a ModelSection, its weights drawn by it."""
    import peer_models

    return partial(peer_models.transformers_model, transformers)


@pytest.fixture
def hugging_face(tmp_path: Path, transformers_model: Callable[..., Any]) -> Callable[..., Path]:
    """Has transformers itself save a random model of a ModelSection, with a tokenizer of ours.

    hugging_face(model, dtype=torch.float32, max_shard_size="5GB") -> tmp_path/hugging-face
    """
    import torch

    from raynium.data.store import TOKENIZER_NAME
    from raynium.data.tokenizer import Tokenizer

    def save(model: Any, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB") -> Path:
        folder = tmp_path / "hugging-face"
        torch.manual_seed(0)
        transformers_model(model).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer = Tokenizer.train(["def main(x): return 12345 it's"], vocab_size=280)
        (folder / TOKENIZER_NAME).write_text(tokenizer.file_text)
        return folder

    return save
