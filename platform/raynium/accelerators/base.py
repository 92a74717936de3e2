"""The seam between a rank and its device."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Accelerator(Protocol):
    """One kind of device. Agents, which have no torch, call `environment`; ranks call the rest."""

    name: str
    device_type: str  # torch's
    process_group_backend: str
    compile_backend: str  # of torch.compile

    def environment(self, *, local_rank: int, local_world_size: int, master_host: str) -> dict[str, str]:
        """Every variable that a rank's libraries read, to be set before they are imported.

        local_world_size: ranks of this node. master_host: host of the rendezvous; loopback if the job has one node.
        """
        ...

    def set_device(self, local_rank: int) -> "torch.device":
        """Takes this rank's device, once, after `environment` is set. Raises LaunchError if there is none."""
        ...

    def memory_bytes(self, *, local_rank: int, local_world_size: int) -> int:
        """Memory this rank may count on."""
        ...

    def peak_flops(self, dtype: str) -> float | None:
        """The data sheet's dense FLOP/s of one device at "float32" or "bfloat16"; None: not known, so no MFU."""
        ...
