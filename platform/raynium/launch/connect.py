"""Joining a Ray cluster, or starting one on this machine."""

import contextlib
import logging
import os
import socket
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import ray
import ray.exceptions
import ray.train

from raynium.accelerators.cpu import usable_cores
from raynium.errors import ClusterLost, LaunchError

# Ray replaces 127.0.0.1 by the network card's address; 127.0.0.2 it keeps (Linux: all of 127/8 is the loopback).
LOOPBACK = "127.0.0.2"

HEAD_ANSWERS_SECONDS = 5.0


@contextlib.contextmanager
def connect(address: str | None, *, least_cpus: int = 1) -> Iterator[Mapping[str, float]]:
    """Joins the cluster at `address`, or starts one here that ends with the context. Yields its resources.

    `ray_environment.set_ray_environment` must have run before this module was imported.

    least_cpus: CPU slots that a cluster of our own declares, also on a machine with fewer cores.
    """
    arguments: dict[str, Any] = {"address": address}
    if address is None:
        num_cpus = max(least_cpus, usable_cores())
        arguments = {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": num_cpus,
            "_node_ip_address": LOOPBACK,
        }
    if address is not None:
        _look_for_head(address)
    try:
        with _other_process_group() if address is None else contextlib.nullcontext():
            ray.init(log_to_driver=False, logging_level=logging.WARNING, **arguments)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise _unreachable(address, error) from error
    try:
        yield ray.cluster_resources()
    except ClusterLost:
        raise  # there is nothing left to shut down, and trying would wait for it
    except BaseException:
        ray.shutdown()
        raise
    ray.shutdown()


def _look_for_head(address: str) -> None:
    """Ray itself tries an address where nobody listens for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), HEAD_ANSWERS_SECONDS).close()
        except OSError as error:
            raise _unreachable(address, error) from error


def _unreachable(address: str | None, error: Exception) -> LaunchError:
    where = f"the Ray cluster at {address}" if address else "a Ray cluster on this machine"
    return LaunchError(
        f"cannot reach {where}: {error}. Check the address and that the cluster runs (`ray status`), and that "
        f"RAY_AUTH_MODE and the token are those of the cluster"
    )


@contextlib.contextmanager
def _other_process_group() -> Iterator[None]:
    """What is started in here is in a process group of its own; this process comes back to its own.

    So that a signal to the whole group (Ctrl-C in a terminal, `timeout`, a CI runner) reaches the driver, which saves
    and ends, and not the cluster that it needs for that. The leader of a session (a container's first process) cannot
    leave its group: then the cluster is in it too.
    """
    if os.getsid(0) == os.getpid():
        yield
        return
    mine = os.getpgrp()
    place = subprocess.Popen(["sleep", "60"])  # keeps our group in being, should we be the last one in it
    leader = subprocess.Popen(["sleep", "60"], process_group=0)  # the leader of one group cannot make another
    os.setpgid(0, leader.pid)
    try:
        yield
    finally:
        os.setpgid(0, mine)
        for helper in (place, leader):
            helper.kill()
            helper.wait()
