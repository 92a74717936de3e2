"""The environment that Ray reads when it is imported: this module imports no ray, and runs before any that does."""

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

from raynium.config.local_folders import scratch_folder
from raynium.errors import LaunchError
from raynium.node.scratch import LIMIT, allows_sockets, sockets_parent

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
    # Ray adds it to its workers' niceness, by default 15: anything else on the machine would come before the ranks, and
    # an agent that waits for a core does not see that one has died.
    "RAY_worker_niceness": "0",
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


def set_ray_environment(*, starts_cluster: bool) -> None:
    """starts_cluster: this process will start a cluster of its own on this machine; what names another is dropped."""
    if not os.path.isabs(os.path.expanduser("~")):
        # Of a uid without an entry among the users, as in containers. Ray and MLflow need one as they are imported.
        os.environ["HOME"] = str(scratch_folder())
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


def session_parent() -> Path:
    """Where a cluster that we start gets a folder of its own for its sockets and logs, which nobody else may enter.

    That is /tmp where TMPDIR is too long for sockets, as job folders of Slurm are. Raises LaunchError where it cannot
    be.
    """
    given = os.environ.get("RAY_TMPDIR")
    folder = Path(given).absolute() if given else sockets_parent()
    if not allows_sockets(folder):
        raise LaunchError(f"RAY_TMPDIR is {folder}, and Ray's sockets need {LIMIT}: set a shorter one")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise LaunchError(
            f"{folder} is no folder that can be written, and a Ray cluster needs one for its sockets: set "
            f"{'RAY_TMPDIR' if given else 'TMPDIR'} to one of yours with {LIMIT}"
        )
    return folder


def find_token() -> str | None:
    """A cluster's token, from where Ray itself looks, in Ray's order. LaunchError if a named file cannot be read."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    # Of a user without a home folder, `expanduser` gives "~" back.
    path = Path(given or os.path.expanduser("~/.ray/auth_token"))
    try:
        return path.read_text(encoding="utf-8").strip() if path.is_absolute() and path.is_file() else None
    except OSError as error:
        if given:
            raise LaunchError(f"RAY_AUTH_TOKEN_PATH is {given}, which cannot be read: {error.strerror}") from error
        # HOME is another user's, as `sudo` leaves it.
        return None
