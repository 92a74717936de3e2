"""Joining a Ray cluster, or starting one on this machine."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import ray
import ray._private.worker
import ray.train

from raynium.accelerators.cpu import usable_cores
from raynium.errors import ClusterLost, LaunchError, RunFailed, RunInUse
from raynium.launch.ray_environment import session_parent
from raynium.storage.own_folder import drop_folder, own_folder

logger = logging.getLogger(__name__)

# Ray replaces 127.0.0.1 by the network card's address; 127.0.0.2 it keeps (Linux: all of 127/8 is the loopback).
LOOPBACK = "127.0.0.2"

HEAD_ANSWERS_SECONDS = 5.0
START_TRIES = 3
# In Ray's own words, a bare Exception.
TIMED_OUT = "timed out during startup"


@contextlib.contextmanager
def connect(address: str | None, *, least_cpus: int = 1) -> Iterator[Mapping[str, float]]:
    """Joins the cluster at `address`, or starts one here that ends with the context. Yields its resources.

    `ray_environment.set_ray_environment` must have run before this module was imported.

    least_cpus: CPU slots that a cluster of our own declares, also on a machine with fewer cores.
    """
    folder = None
    if address is None:
        folder = own_folder(session_parent(), "ray")
        num_cpus = max(least_cpus, usable_cores())
        arguments: dict[str, Any] = {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": num_cpus,
            "_node_ip_address": LOOPBACK,
            # Ray opens its folder to everybody, and so gets one inside of ours.
            "_temp_dir": str(folder / "ray"),
        }
        _start(arguments)
    else:
        _look_for_head(address)
        try:
            ray.init(log_to_driver=False, logging_level=logging.WARNING, address=address)
        # Ray raises what its libraries do, and bare Exceptions.
        except Exception as error:
            raise _unreachable(address, error) from error
    try:
        yield ray.cluster_resources()
    except (ClusterLost, RunFailed, RunInUse):
        # There is nothing left to shut down, and trying would wait for it; or the driver's threads still ask Ray, which
        # would end the process before anybody is told. The cluster ends with the process.
        raise
    except BaseException:
        ray.shutdown()
        raise
    ray.shutdown()
    if folder is not None:
        # After a failure its logs stay until the next cluster is started here, for whoever asks why.
        drop_folder(folder)


def _start(arguments: Mapping[str, Any]) -> None:
    """A cluster of our own. Ray gives up on one after 30 s, which a busy machine may need: that is tried again."""
    for tries_left in reversed(range(START_TRIES)):
        try:
            with _other_process_group():
                ray.init(log_to_driver=False, logging_level=logging.WARNING, **arguments)
            return
        except Exception as error:
            ray.shutdown()
            words = " ".join(str(error).split())
            if not tries_left or TIMED_OUT not in words:
                raise LaunchError(
                    f"a Ray cluster cannot be started on this machine: {type(error).__name__}: {words[:600]}. See "
                    f"whether it is short of memory, processes (`ulimit -u`) or disk, or too busy (`uptime`); Ray's "
                    f"logs are under {arguments['_temp_dir']}/session_latest/logs"
                ) from error
            logger.warning("Ray did not start in time, as on a busy machine; it is tried again")


def _look_for_head(address: str) -> None:
    """Ray itself tries an address where nobody listens for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), HEAD_ANSWERS_SECONDS).close()
        except OSError as error:
            raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> LaunchError:
    words = " ".join(str(error).split())
    return LaunchError(
        f"cannot reach the Ray cluster at {address}: {words}. Check the address and that the cluster runs (`ray "
        f"status`), and that RAY_AUTH_MODE and the token are those of the cluster"
    )


def _note(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    """Ray would print errors of its processes in colour, also with `log_to_driver=False`. They are in its logs, too."""
    for line in data["lines"]:
        logger.info("%s", line)


ray._private.worker.print_to_stdstream = _note


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
    # The first keeps our group in being, should we be the last in it; the leader of one group cannot make another.
    place = subprocess.Popen(["sleep", "60"])
    leader = subprocess.Popen(["sleep", "60"], process_group=0)
    os.setpgid(0, leader.pid)
    try:
        yield
    except BaseException:
        # What was started for nothing must not stand in the way of the next try.
        os.setpgid(0, mine)
        os.killpg(leader.pid, signal.SIGKILL)
        raise
    finally:
        os.setpgid(0, mine)
        for helper in (place, leader):
            helper.kill()
            helper.wait()
