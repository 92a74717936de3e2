"""The environment that Ray reads when it is imported: this module imports no ray, and runs before any that does."""

import os
import secrets
import sys
from pathlib import Path

# Ray Train's own default costs 2 s per poll (measured, Ray 2.60).
RAY_TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the controller's poll of its workers
    # A placement that does not come counts as a failure of the controller (`driver.CONTROLLER_FAILURE_LIMIT`), and is
    # asked for again: nodes may be waited for that many hours.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "3600",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",  # a worker that does not answer is dead
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints everything twice
    "RAY_TRAIN_METRICS_ENABLED": "0",  # ours go to MLflow
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor (200 MB) for notices that no rank here asks Ray Train for
    "RAY_USAGE_STATS_ENABLED": "0",  # read by ray.init: nothing is sent to anybody
}


def set_ray_environment(*, starts_cluster: bool) -> None:
    """What the user has set stays. starts_cluster: this process will start a cluster of its own on this machine."""
    for name, value in RAY_TRAIN_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if starts_cluster and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        # A token for this one cluster, in the environment of its processes only. Left alone, Ray asks for a token too,
        # but writes it into the home folder for everybody to read.
        os.environ["RAY_AUTH_MODE"] = "token"
        if find_token() is None:
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def find_token() -> str | None:
    """A cluster's token, from where Ray itself looks, in Ray's order."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text().strip() if path.is_file() else None
