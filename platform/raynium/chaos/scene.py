"""What faults find to hit, and what they are to the run that is hit."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Protocol

from raynium.chaos.cut_proxy import CutProxy
from raynium.chaos.flaky_s3 import FlakyS3
from raynium.chaos.loopback import LoopbackCluster
from raynium.chaos.processes import RunProcesses

# How long a fault lasts that does not end by itself: seconds, drawn between them.
LASTS_SECONDS = (0.5, 4.0)


class NotThere(Exception):
    """What a fault wants to hit does not exist now: the run starts it, or has not needed it yet."""


@dataclass(frozen=True)
class Scene:
    """What faults find to hit. armed: the folder that ranks look into (`rank/armed.py`). proxy: before the run's S3.
    run_folder: of its store, where that is a folder. mlflow_proxy: before its MLflow server. cluster: where it has
    several nodes.
    """

    processes: RunProcesses
    mlflow_uri: str
    armed: Path
    proxy: FlakyS3 | None = None
    run_folder: Path | None = None
    mlflow_proxy: CutProxy | None = None
    cluster: LoopbackCluster | None = None


@dataclass(frozen=True)
class Struck:
    """What was done, in words. It lasts so many seconds, or until it `has_shown`; then `end` is called, from another
    thread than `strike` was.

    ends_ranks: no step follows before other ranks were started. ends_driver: nor before somebody starts the run again.
    """

    what: str
    seconds: float = 0.0
    end: Callable[[], None] = lambda: None
    has_shown: Callable[[], bool] = lambda: False
    ends_ranks: bool = False
    ends_driver: bool = False


class Kind(Protocol):
    """name: as the schedule has it. needs: without which it cannot happen, as in `NEEDS`; "" if it always can."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> str: ...

    def strike(self, scene: Scene, dice: Random) -> Struck:
        """Does it. Raises NotThere."""
        ...
