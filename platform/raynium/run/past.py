"""What a run's store already holds: read once by whoever prepares to go on, and handed on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raynium.checkpoint.catalog import latest, step_folders
from raynium.checkpoint.ref import CheckpointRef
from raynium.config.resume import resume_conflicts, resume_notes
from raynium.config.schema import Config
from raynium.errors import ConfigError
from raynium.run.record import RunRecord, read_record, refuse_live
from raynium.storage.store import Store


def run_store(config: Config) -> Store:
    """Where this run writes: `<root>/<name>`."""
    return Store(config.run.root).child(config.run.name)


@dataclass(frozen=True)
class Past:
    """A new run has a store, no record and no checkpoint."""

    store: Store
    record: RunRecord | None
    newest: CheckpointRef | None
    num_checkpoints: int

    @classmethod
    def read(cls, config: Config) -> "Past":
        """Of the run that this config names; writes nothing.

        Raises StoreError, and CheckpointDamaged if the newest checkpoint is and checkpoint.if_damaged says stop.
        """
        store = run_store(config)
        newest = latest(store, if_damaged=config.checkpoint.if_damaged)
        committed = sum(folder.manifest is not None for folder in step_folders(store))
        return cls(store, read_record(store), newest, committed)

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The config in the newest checkpoint."""
        if self.newest is None:
            return None
        saved = self.newest.manifest.state["config"]
        assert isinstance(saved, dict)
        return saved

    def with_steps(self, config: Config) -> Config:
        """The config with the steps that its epochs made, if the run went by as many: its data may not change."""
        saved = self.config or (self.record.config if self.record else {})
        train: Mapping[str, Any] = saved.get("train", {})
        if config.train.steps is not None or train.get("epochs") != config.train.epochs:
            return config
        return config.model_copy(update={"train": config.train.model_copy(update={"steps": train.get("steps")})})

    def refuse_live(self) -> None:
        """Raises RunInUse while somebody drives the run."""
        if self.record is not None:
            refuse_live(self.record, self.store)

    def check_resume(self, config: Config) -> list[str]:
        """Whether the newest checkpoint, if there is one, can go on with this config.

        Returns what has changed and is allowed, to be told to the user. Raises ConfigError for what is not.
        """
        if self.newest is None or self.config is None:
            return []
        problems = resume_conflicts(self.config, config, step=self.newest.step)
        if config.train.steps is not None and self.newest.step > config.train.steps:
            problems.append(
                f"train.steps is {config.train.steps}, but run {config.run.name!r} has a checkpoint of step "
                f"{self.newest.step}. Set train.steps to {self.newest.step} or more, or give another run.name"
            )
        if problems:
            raise ConfigError(problems)
        return resume_notes(self.config, config)
