"""EC2's instance metadata service, as far as a node needs it: an instance profile's credentials come from there."""

import http.client
import os
import urllib.error
import urllib.request
from dataclasses import dataclass

# Link-local, the same on every instance. The variable is AWS's own, which their libraries read too.
ADDRESS = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/")
# It answers in milliseconds; where it is switched off, nothing answers at all.
TIMEOUT_SECONDS = 1.0
TOKEN_SECONDS = 60


@dataclass(frozen=True)
class MetadataService:
    """What it answered. instance_type and role: None where it has none, or does not answer.

    gives_token: version 2 answers. answers_without_token: so does version 1, which a page that a program was tricked
    into fetching can use too. role: whose credentials it hands out.
    """

    gives_token: bool
    answers_without_token: bool
    instance_type: str | None = None
    role: str | None = None


@dataclass(frozen=True)
class Instance:
    """An EC2 instance, as EC2's calls name it."""

    id: str
    region: str


@dataclass(frozen=True)
class Session:
    """Asks with a token, where version 2 gives one."""

    address: str
    token: str | None

    @classmethod
    def open(cls, address: str = ADDRESS) -> "Session | None":
        """None where nobody answers."""
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
        session = cls(address, _get(f"{address}/latest/api/token", headers, method="PUT"))
        return session if session.token is not None or session.page("meta-data/instance-type") is not None else None

    def page(self, path: str) -> str | None:
        """None if it has none of that name."""
        headers = {} if self.token is None else {"X-aws-ec2-metadata-token": self.token}
        return _get(f"{self.address}/latest/{path}", headers)


def ask(address: str = ADDRESS) -> MetadataService:
    """Asks with and without a token. Never raises; up to three seconds where nobody answers. Keeps no credentials."""
    session = Session.open(address)
    if session is None:
        return MetadataService(gives_token=False, answers_without_token=False)
    instance_type = session.page("meta-data/instance-type")
    role = session.page("meta-data/iam/security-credentials/") if instance_type else None
    version_1 = Session(address, None)
    without = instance_type if session.token is None else version_1.page("meta-data/instance-type")
    return MetadataService(session.token is not None, without is not None, instance_type, role)


def this_instance(address: str = ADDRESS) -> Instance | None:
    """The one that this process runs on; None outside of EC2. Up to two seconds where nobody answers."""
    if (session := Session.open(address)) is None:
        return None
    instance_id, region = session.page("meta-data/instance-id"), session.page("meta-data/placement/region")
    return Instance(instance_id, region) if instance_id and region else None


def _get(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    request = urllib.request.Request(url, headers=headers, method=method)
    without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with without_proxy.open(request, timeout=TIMEOUT_SECONDS) as answer:
            return answer.read(4096).decode(errors="replace").strip()
    except (urllib.error.URLError, http.client.HTTPException, OSError):
        return None
