"""The seam between a rank and its device."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Place:
    """Where one rank runs, as far as its device's libraries must be told.

    local_world_size: ranks of this node. master_host: of the rendezvous; loopback if the job has one node.
    inherited: the node agent's own environment: what Ray granted, and what the user set.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_host: str
    master_port: int
    run_name: str
    inherited: Mapping[str, str]

    def standard_variables(self) -> dict[str, str]:
        """What every launcher of torch.distributed sets, torchrun too."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_host,
            "MASTER_PORT": str(self.master_port),
        }


@dataclass(frozen=True)
class CompileCache:
    """Where a device's compiler keeps what it made, and whom that fits.

    variable: of the environment, where the device's libraries look for it. key: equal where the executables of one node
    run on another; may be a part of a store's key. kind: with "url" the libraries reach the run's store themselves,
    with "folder" somebody must copy. suffix: of the finished files in it; all else is a lock or half written.
    """

    variable: str
    key: str
    kind: Literal["folder", "url"]
    suffix: str


class Accelerator(Protocol):
    """One kind of device. Agents, which have no torch, call `environment`; ranks call the rest."""

    name: str
    device_type: str
    process_group_backend: str
    compile_backend: str
    # "float64", or "float32" where the device has no wider: what sums over tokens and parameters are taken in
    sum_dtype: str
    # Whether each new shape of an operation is compiled, in seconds or minutes.
    static_shapes: bool

    def environment(self, place: Place) -> dict[str, str]:
        """Every variable that a rank's libraries read, to be set before they are imported.

        Raises LaunchError if the node does not have what the rank needs.
        """
        ...

    def compile_cache(self, inherited: Mapping[str, str]) -> CompileCache | None:
        """What nodes may share of compiled graphs; None if there is nothing that they can, or safely may.

        inherited: as in `Place`.
        """
        ...

    def set_device(self, local_rank: int) -> "torch.device":
        """Takes this rank's device, once, after `environment` is set and before the process group is made.

        Raises LaunchError if there is none, or if its libraries cannot be loaded.
        """
        ...

    def memory_bytes(self, *, local_rank: int, local_world_size: int) -> int:
        """Memory this rank may count on."""
        ...

    def peak_flops(self, dtype: str) -> float | None:
        """The data sheet's dense FLOP/s of one device at "float32" or "bfloat16"; None: not known, so no MFU."""
        ...

    def metrics(self) -> dict[str, float]:
        """What the device's libraries have counted on this rank so far, under names of `tracking/metrics.py`."""
        ...
