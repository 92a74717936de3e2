"""How ranks find each other: rank 0's rendezvous, and the process group of all."""

import contextlib
import os
import socket
import time
from datetime import timedelta

# The number of the open socket at which rank 0 is to listen; `rank/entry.py` sets it.
RENDEZVOUS_VARIABLE = "RAYNIUM_RENDEZVOUS_SOCKET"
# Of looking for rank 0 ourselves.
RENDEZVOUS_SECONDS = 30.0


def join_group(backend: str, *, rank: int, world_size: int, timeout_seconds: float) -> None:
    """Makes torch's default process group. Every rank calls it; MASTER_ADDR and MASTER_PORT say where rank 0 is.

    torch's own rendezvous asks nobody for a password and would listen on all interfaces. Rank 0 of an agent is given
    a socket that is bound to the node's address, and listens there only.
    """
    import torch.distributed as dist
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    bound, store = os.environ.pop(RENDEZVOUS_VARIABLE, None), None
    if bound is not None:
        # torch looks for a server at its port in this process before it makes one, and so takes this one. It may not
        # wait for the others: they come to the group, not to this.
        store = TCPStore(
            host,
            port,
            world_size,
            is_master=True,
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=int(bound),
        )
    if rank > 0:
        wait_for_rank_0(host, port)
    dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_seconds))
    # The group holds the server from here on.
    del store


def wait_for_rank_0(host: str, port: int) -> None:
    """Returns once the rendezvous answers there, or after a while: torch then waits on, and says what is wrong.

    torch's own client, if it comes before rank 0 listens, looks again only 0.25 to 0.75 s later. This one looks often,
    and less often the longer it waits, since on a large cluster a thousand ranks do.
    """
    began = time.monotonic()
    while (waited := time.monotonic() - began) < RENDEZVOUS_SECONDS:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=RENDEZVOUS_SECONDS):
            return
        time.sleep(min(max(0.002, waited / 8), 0.1))
