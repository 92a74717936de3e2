"""Every error a user can meet, as one tree.

    RayniumError
    ├── ConfigError            the job file, an override, or a rule across parts (also a ValueError)
    ├── DataError              a corpus, tokenizer or document store that cannot be used
    ├── CheckpointError        a checkpoint that cannot be written or read
    │   ├── CheckpointDamaged      bytes differ from what the manifest says
    │   ├── SnapshotMemoryShort    a node has too little shared memory for its ranks' snapshots
    │   ├── CheckpointMismatch     whole, but contradicts the model or the config that asks for it
    │   ├── CheckpointTooNew       of a newer format (checkpoint/format/manifest.py)
    │   └── StepTaken              another generation committed this step (checkpoint/commit.py)
    ├── StoreError             the run's folder or bucket: missing, full, or not permitted
    │   ├── KeyExists              an exclusive create found the key taken (storage/store.py)
    │   └── KeyMissing             (storage/store.py)
    ├── TrackingError          MLflow cannot be reached, or refused what it was given
    │   └── TrackingAway           it does not answer, and may be back in a while
    └── LaunchError            the cluster, a node or a rank
        ├── ClusterLost            the Ray cluster under a driver stopped answering
        ├── RunInUse               another live process owns this run name
        └── RunFailed              the run ended without finishing; the message carries the cause

Messages say what was given, the rule, and what to do.
"""

import re
from collections.abc import Sequence

# So many things are named in a message, of however many.
NAMED = 5
# Half a character each, and not one by which Python spells a byte that is no UTF-8.
_HALVES = re.compile("[\ud800-\udc7f\udd00-\udfff]")


def some(items: Sequence[str], *, mark: str = ", ") -> str:
    """The first few of `items`, for a message, and how many more there are; "" for none."""
    listed = mark.join(items[:NAMED])
    return f"{listed} and {len(items) - NAMED} more" if len(items) > NAMED else listed


def spelled(name: str) -> str:
    """A file's name for a message or a record: bytes that are no UTF-8, halves of characters, and what a terminal would
    obey, as escapes.
    """
    name = _HALVES.sub(lambda half: half[0].encode("unicode_escape").decode(), name)
    name = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in name)


class RayniumError(Exception):
    """Root of the tree: catch this to catch everything Raynium raises on purpose."""


class ConfigError(RayniumError, ValueError):
    """One or more problems in the configuration; all of them are listed, not only the first.

    problems: one message each, already carrying field, value, rule and remedy.
    """

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__(problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return f"{len(self.problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in self.problems)


class DataError(RayniumError):
    """A corpus, tokenizer or document store that cannot be used."""


class CheckpointError(RayniumError):
    """A checkpoint that cannot be written or read."""


class CheckpointDamaged(CheckpointError):
    """The stored bytes differ from what the manifest says they are."""


class SnapshotMemoryShort(CheckpointError):
    """A node's shared memory cannot hold the snapshots of its ranks: the same at every try."""


class CheckpointMismatch(CheckpointError):
    """The checkpoint is whole, but contradicts the model or the config that asks for it."""


class StoreError(RayniumError):
    """The run's folder or bucket is missing, full, or not permitted."""


class TrackingError(RayniumError):
    """MLflow cannot be reached, or refused what it was given."""


class TrackingAway(TrackingError):
    """MLflow does not answer. It may be back in a while, and a run that it knows need not wait for it."""


class LaunchError(RayniumError):
    """The cluster, a node or a rank."""


class ClusterLost(LaunchError):
    """The Ray cluster under a driver stopped answering. Ray's own clean-up would wait for it: end with `os._exit`."""


class RunInUse(LaunchError):
    """Another live process owns this run name."""


class RunFailed(LaunchError):
    """The run ended without finishing; the message carries the cause."""
