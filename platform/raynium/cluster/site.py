"""What a cluster file needs to know of an AWS account: ids of things that exist there. Read from a small YAML file."""

import difflib
import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raynium.errors import ConfigError


def _like(pattern: str, rule: str, default: Any = ...) -> Any:
    """A string that the templates can take as it is: the pattern leaves no room for YAML, JSON or shell syntax."""
    return Field(pattern=f"^(?:{pattern})$", description=rule, default=default)


class Site(BaseModel):
    """One AWS account and network that clusters are started in. The runbook (cluster/README.md) makes each of these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Also begins the names of roles and of the placement group, and is the tag that policies look for.
    cluster_name: str = _like(r"[a-z][a-z0-9-]{1,30}", "2 to 31 of a-z, 0-9 and hyphens, a letter first")
    account: str = _like(r"[0-9]{12}", 'the 12 digits of the account in quotes, like "123456789012"')
    region: str = _like(r"[a-z]{2}(-[a-z]+)+-[0-9]", "a region, like us-west-2")
    # Trainium capacity is sold by zone, and EFA does not leave one.
    availability_zone: str = _like(r"[a-z]{2}(-[a-z]+)+-[0-9][a-z]", "an availability zone, like us-west-2d")
    subnet: str = _like(r"subnet-[0-9a-f]{8,17}", "a private subnet's id, like subnet-0123456789abcdef0")
    security_group: str = _like(r"sg-[0-9a-f]{8,17}", "a security group's id, like sg-0123456789abcdef0")
    instance_connect_endpoint: str = _like(
        r"eice-[0-9a-f]{8,17}", "an EC2 Instance Connect endpoint's id, like eice-0123456789abcdef0"
    )
    storage: str = _like(
        r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9._-]+)+",
        "a bucket and a folder of it, like s3://my-bucket/raynium: nodes get that folder and no other",
    )
    head_instance_type: str = _like(r"[a-z0-9-]+\.[a-z0-9-]+", "an EC2 type, like m7i.2xlarge", default="m7i.2xlarge")

    @property
    def bucket(self) -> str:
        return self.storage.removeprefix("s3://").partition("/")[0]

    @property
    def prefix(self) -> str:
        return self.storage.removeprefix("s3://").partition("/")[2]


def load_site(path: Path) -> Site:
    """Reads a site file. Raises ConfigError with every problem it has."""
    try:
        values = yaml.safe_load(path.read_bytes().decode())
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError([f"the site file {path} cannot be read ({why}): copy cluster/site.yaml"]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"the site file {path} is not YAML: {error}"]) from None
    if not isinstance(values, dict):
        raise ConfigError([f"the site file {path} must hold fields like `region: us-west-2`: copy cluster/site.yaml"])
    try:
        site = Site.model_validate(values, strict=True)
    except ValidationError as error:
        raise ConfigError([_in_words(item, path) for item in error.errors(include_url=False)]) from None
    if site.availability_zone[:-1] != site.region:
        raise ConfigError([f"{path}: availability_zone {site.availability_zone} is not in region {site.region}"])
    return site


def _in_words(item: Any, path: Path) -> str:
    """One pydantic error in our words: where, what was given, the rule."""
    field = str(item["loc"][0])
    known = Site.model_fields
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, known, n=1)
        return f"{path}: {field} is not a field; " + (f"did you mean {near[0]}?" if near else f"they are {[*known]}")
    rule = known[field].description
    if item["type"] == "missing":
        return f"{path}: {field} is missing; give {rule}"
    return f"{path}: {field} is {json.dumps(item['input'], default=str)}; it must be {rule}"
