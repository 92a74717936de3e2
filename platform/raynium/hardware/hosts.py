"""EC2 types without an accelerator that a cluster may train on with CPU ranks. Figures as in the catalogue: sourced."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

SOURCE = "EC2 DescribeInstanceTypes, the copy in moto 5.2.5; read 2026-11-23"


@dataclass(frozen=True)
class Host:
    name: str
    vcpus: int
    ram_gib: int


# Intel's 7th generation multiplies bfloat16 natively (AMX), which `engine.dtype=auto` takes.
HOSTS: Mapping[str, Host] = MappingProxyType(
    {
        host.name: host
        for host in (
            Host("m7i.2xlarge", 8, 32),
            Host("m7i.4xlarge", 16, 64),
            Host("m7i.8xlarge", 32, 128),
            Host("c7i.8xlarge", 32, 64),
            Host("c7i.16xlarge", 64, 128),
        )
    }
)
