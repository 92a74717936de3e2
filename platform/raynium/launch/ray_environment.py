"""The environment that Ray reads when it is imported: this module imports no ray, and runs before any that does."""

import contextlib
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from raynium.errors import LaunchError, StoreError
from raynium.node.scratch import scratch_folder

# Where the user has set one of these it stays.
RAY_DEFAULTS = {
    # The controller's poll of its workers. Ray Train's own default costs 2 s each (measured, Ray 2.60).
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A placement that does not come counts as a failure of the controller (`driver.CONTROLLER_FAILURE_LIMIT`), and is
    # asked for again: nodes may be waited for that many hours.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "3600",
    # A worker that does not answer is dead.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    # It prints everything twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Ours go to MLflow.
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # An actor (200 MB) for notices that no rank here asks Ray Train for.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Nothing is sent to anybody.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Under `uv run`, Ray would pack the current folder and have uv start every worker.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
# The trainer that we start is of the second version, which this would take for the first.
RAY_MUST_BE = {"RAY_TRAIN_V2_ENABLED": "1"}

# Ray lets these beat the address that it is given.
ADDRESS_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
# And these what it is told of a cluster that it starts.
CLUSTER_VARIABLES = (*ADDRESS_VARIABLES, "RAY_OVERRIDE_RESOURCES", "RAY_OVERRIDE_LABELS", "RAY_REDIS_ADDRESS")

# Linux allows no longer path for a socket. Ray's lie this deep in its folder.
SOCKET_PATH_BYTES = 107
LONGEST_SOCKET = "session_2026-11-29_03-10-48_123456_1234567/sockets/plasma_store"


def set_ray_environment(*, starts_cluster: bool) -> None:
    """starts_cluster: this process will start a cluster of its own on this machine; what names another is dropped."""
    for name, value in RAY_DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.update(RAY_MUST_BE)
    if starts_cluster:
        for name in CLUSTER_VARIABLES:
            os.environ.pop(name, None)
    if starts_cluster and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        # A token for this one cluster, in the environment of its processes only. Left alone, Ray asks for a token too,
        # but writes it into the home folder for everybody to read.
        os.environ["RAY_AUTH_MODE"] = "token"
        if find_token() is None:
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextlib.contextmanager
def the_named_address() -> Iterator[None]:
    """In here Ray knows no address but the one that it is given: a token must go nowhere else."""
    hidden = {name: os.environ.pop(name) for name in ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def session_folder() -> Path:
    """Where a cluster that we start keeps its sockets and logs: in a folder that nobody else may enter.

    That is /tmp's where TMPDIR is too long for sockets, as job folders of Slurm are. Raises LaunchError where there is
    none, or RAY_TMPDIR names one that is too long; StoreError if others may write ours.
    """
    if given := os.environ.get("RAY_TMPDIR"):
        folder = Path(given).absolute() / "ray"
        if _fits_sockets(folder):
            return folder
        raise LaunchError(_too_long("RAY_TMPDIR", given))
    folder = scratch_folder() / "ray"
    if _fits_sockets(folder):
        return folder
    try:
        return scratch_folder("/tmp") / "ray"
    except StoreError as error:
        raise LaunchError(
            f"{_too_long('TMPDIR', tempfile.gettempdir())}. /tmp cannot be used instead: {error}"
        ) from error


def _fits_sockets(folder: Path) -> bool:
    return len(os.fsencode(folder / LONGEST_SOCKET)) <= SOCKET_PATH_BYTES


def _too_long(variable: str, value: str) -> str:
    most = SOCKET_PATH_BYTES - len(f"/raynium-{os.getuid()}/ray/{LONGEST_SOCKET}")
    return (
        f"{variable} is {len(os.fsencode(value))} bytes long ({value}), and Ray's sockets under it allow {most} at "
        "most: set a shorter one"
    )


def find_token() -> str | None:
    """A cluster's token, from where Ray itself looks, in Ray's order."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    # Of a user without a home folder, `expanduser` gives "~" back.
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token"))
    return path.read_text(encoding="utf-8").strip() if path.is_absolute() and path.is_file() else None
