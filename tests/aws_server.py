"""AWS, played by moto over HTTP on loopback: EC2 and IAM with their state, and what EC2 was asked."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any
from urllib.parse import parse_qs


@dataclass(frozen=True)
class Call:
    """One request to EC2: who signed it, and its parameters in EC2's flat form (NetworkInterface.1.SubnetId)."""

    caller: str
    values: dict[str, str]

    @property
    def action(self) -> str:
        return self.values["Action"]

    def items(self, name: str) -> list[dict[str, str]]:
        """The members of a list parameter, in order."""
        found: dict[int, dict[str, str]] = {}
        for key, value in self.values.items():
            if match := re.fullmatch(rf"{name}\.(\d+)\.(.+)", key):
                found.setdefault(int(match[1]), {})[match[2]] = value
        return [found[number] for number in sorted(found)]

    @property
    def tags(self) -> dict[str, str]:
        """Of the instances that RunInstances makes."""
        tags = Call(self.caller, {k.removeprefix("TagSpecification.1."): v for k, v in self.values.items()}).items(
            "Tag"
        )
        return {tag["Key"]: tag["Value"] for tag in tags}


@dataclass
class FakeAws:
    """moto behind a listener that keeps what it was asked."""

    url: str = ""
    calls: list[Call] = field(default_factory=list)

    def environment(self, caller: str) -> dict[str, str]:
        """Of processes of `caller` that take this for AWS."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": caller,
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-west-2",
        }

    def client(self, service: str) -> Any:
        import boto3

        session = boto3.Session("fixture", "secret", region_name="us-west-2")
        return session.client(service, endpoint_url=self.url)

    def start_instance(self) -> str:
        """Its id."""
        (found,) = self.client("ec2").run_instances(ImageId="ami-12c6146b", MinCount=1, MaxCount=1)["Instances"]
        return found["InstanceId"]

    def asked(self, action: str) -> list[Call]:
        return [call for call in self.calls if call.action == action]


@contextmanager
def fake_aws() -> Iterator[FakeAws]:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log_request(self, *_: Any, **__: Any) -> None:
            return

    moto = DomainDispatcherApplication(create_backend_app)
    fake = FakeAws()

    def listen(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = BytesIO(body)
        values = {key: given[0] for key, given in parse_qs(body.decode(errors="replace")).items()}
        if values.get("Version") == "2016-11-15":  # EC2's
            signed = re.search(r"Credential=([^/]+)/", environ.get("HTTP_AUTHORIZATION", ""))
            fake.calls.append(Call(signed[1] if signed else "nobody", values))
        return moto(environ, start_response)

    server = make_server("127.0.0.1", 0, listen, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
