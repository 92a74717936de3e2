"""Fixtures that more than one test module uses."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ACCESS_KEY, SECRET_KEY = "raynium-test", "raynium-test-secret"


@dataclass(frozen=True)
class S3Server:
    """A running SeaweedFS. `env`: what a process needs to use it; `options`: the same for `Store(url, options=...)`."""

    endpoint: str
    env: dict[str, str]
    options: dict[str, Any]
    create_bucket: Callable[[str], str]  # name -> "s3://name"


def free_ports(count: int) -> list[int]:
    """Ports free on loopback, each with its +10000 twin, which SeaweedFS takes for gRPC."""
    found: list[int] = []
    for port in range(21000 + os.getpid() % 10000, 45000):
        with contextlib.ExitStack() as stack:
            try:
                for candidate in (port, port + 10000):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", candidate))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports for SeaweedFS")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server that checks signatures and checksums (SeaweedFS; about 4 s to start). Mark its tests `s3`."""
    weed = shutil.which("weed", path=str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"])
    if weed is None:
        pytest.fail("SeaweedFS is missing: pip install 'raynium[test]'")
    folder = tmp_path_factory.mktemp("seaweedfs")
    identity = {
        "name": "test",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    reader = {
        "name": "reader",
        "credentials": [{"accessKey": ACCESS_KEY + "-reader", "secretKey": SECRET_KEY}],
        "actions": ["Read", "List"],
    }
    (folder / "ids.json").write_text(json.dumps({"identities": [identity, reader]}))
    (folder / "data").mkdir()
    master, volume, filer, s3 = free_ports(4)
    command = [
        weed,
        "-logtostderr=true",
        "server",
        f"-dir={folder / 'data'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-master.port={master}",
        f"-volume.port={volume}",
        f"-filer.port={filer}",
        "-s3",
        f"-s3.port={s3}",
        f"-s3.config={folder / 'ids.json'}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",  # on by default: it would call home
        "-volume.max=1000",  # each bucket takes seven, and they hold nothing in advance
        "-master.volumeSizeLimitMB=1024",
    ]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        yield _wait_until_ready(server, f"http://127.0.0.1:{s3}", folder / "log")
    finally:
        server.kill()  # its data is thrown away; a polite stop takes 20 s
        server.wait()
        for port in (master, volume, filer, s3):  # its Unix sockets outlive it
            for sock in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                sock.unlink()
            for sock in Path("/tmp").glob(f"seaweedfs-*-{port + 10000}.sock"):
                sock.unlink()


def _wait_until_ready(server: subprocess.Popen[bytes], endpoint: str, log: Path) -> S3Server:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
        config=Config(retries={"max_attempts": 1}),
    )

    def create_bucket(name: str) -> str:
        client.create_bucket(Bucket=name)
        return f"s3://{name}"

    deadline = time.monotonic() + 60
    while True:
        try:
            create_bucket("ready")
            client.put_object(Bucket="ready", Key="probe", Body=b"1")
            break
        except (BotoCoreError, ClientError) as error:
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"SeaweedFS did not start: {error}\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
    return S3Server(
        endpoint=endpoint,
        env={
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        },
        options={
            "endpoint_url": endpoint,
            "key": ACCESS_KEY,
            "secret": SECRET_KEY,
            "client_kwargs": {"region_name": "us-east-1"},
        },
        create_bucket=create_bucket,
    )


@pytest.fixture
def save_run(tmp_path: Path) -> Callable[..., Any]:
    """Writes a model as a run's checkpoint, as its ranks would: weights, moments, tokenizer.

    save_run(model, config, name="first", step=4, num_ranks=1) -> Store of tmp_path/runs/<name>
    """
    import torch

    from raynium.checkpoint.commit import commit_checkpoint
    from raynium.checkpoint.image import ImageFile, plan_image, write_image
    from raynium.checkpoint.state import Chunk
    from raynium.checkpoint.store import Store
    from raynium.checkpoint.upload import upload_shard
    from raynium.data.store import TOKENIZER_NAME
    from raynium.data.tokenizer import Tokenizer

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


@pytest.fixture
def hugging_face(tmp_path: Path) -> Callable[..., Path]:
    """Has transformers itself save a random model of a ModelSection, with a tokenizer of ours.

    hugging_face(model, dtype=torch.float32, max_shard_size="5GB") -> tmp_path/hugging-face
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from raynium.data.store import TOKENIZER_NAME
    from raynium.data.tokenizer import Tokenizer

    def save(model: Any, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB") -> Path:
        folder = tmp_path / "hugging-face"
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
        if (scaling := model.rope_scaling) is not None:
            rope |= {"rope_type": "llama3"} | scaling.model_dump(exclude={"original_max_seq_len"})
            rope["original_max_position_embeddings"] = scaling.original_max_seq_len
        kinds = {"llama3": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
        config_class, model_class = kinds[model.family]
        torch.manual_seed(0)
        theirs = model_class(
            config_class(
                vocab_size=model.vocab_size,
                hidden_size=model.hidden_size,
                intermediate_size=model.ffn_size,
                num_hidden_layers=model.num_layers,
                num_attention_heads=model.num_heads,
                num_key_value_heads=model.num_kv_heads,
                head_dim=model.head_dim,
                max_position_embeddings=model.max_seq_len,
                rms_norm_eps=model.norm_eps,
                rope_parameters=rope,
                tie_word_embeddings=model.embeddings == "tied",
            )
        ).to(dtype)
        theirs.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer = Tokenizer.train(["def main(x): return 12345 it's"], vocab_size=280)
        (folder / TOKENIZER_NAME).write_text(tokenizer.file_text)
        return folder

    return save
