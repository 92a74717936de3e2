"""EC2's instance metadata service, as far as a node needs it: an instance profile's credentials come from there."""

import http.client
import urllib.error
import urllib.request
from dataclasses import dataclass

# Link-local, the same on every instance.
ADDRESS = "http://169.254.169.254"
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


def ask(address: str = ADDRESS) -> MetadataService:
    """Asks with and without a token. Never raises; up to three seconds where nobody answers. Keeps no credentials."""
    headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
    token = _get(f"{address}/latest/api/token", headers, method="PUT")
    with_token = {"X-aws-ec2-metadata-token": token} if token is not None else {}
    instance_type = _get(f"{address}/latest/meta-data/instance-type", with_token)
    role = _get(f"{address}/latest/meta-data/iam/security-credentials/", with_token) if instance_type else None
    without = instance_type if token is None else _get(f"{address}/latest/meta-data/instance-type", {})
    return MetadataService(token is not None, without is not None, instance_type, role)


def _get(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    request = urllib.request.Request(url, headers=headers, method=method)
    without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with without_proxy.open(request, timeout=TIMEOUT_SECONDS) as answer:
            return answer.read(4096).decode(errors="replace").strip()
    except (urllib.error.URLError, http.client.HTTPException, OSError):
        return None
