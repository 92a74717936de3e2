"""The one place that knows every task: from what a config says to the object that a run learns by. No torch here."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from raynium.config.schema import Config
from raynium.data.records.own_class import own_class
from raynium.errors import ConfigError, DataError
from raynium.tasks.base import Task, check_whole_samples
from raynium.tasks.preferences import Dpo, Orpo
from raynium.tasks.pretraining import Pretraining
from raynium.tasks.sft import Sft

if TYPE_CHECKING:
    from raynium.data.store import OpenStore

TASKS: Mapping[str, Callable[[Config], Task]] = {
    "pretraining": lambda config: Pretraining(),
    "sft": lambda config: Sft(),
    "dpo": lambda config: Dpo(beta=config.preference.beta, label_smoothing=config.preference.label_smoothing),
    "orpo": lambda config: Orpo(weight=config.preference.weight),
}


def checked_task(config: Config) -> Task:
    """The same, if its samples are whole in a micro-batch. Raises ConfigError."""
    task = task_of(config)
    check_whole_samples(task, config)
    return task


def refuse_other_samples(config: Config, stores: "Sequence[OpenStore]") -> None:
    """Raises DataError where a record of a store is no sample of the task."""
    wanted = task_of(config).rows_per_sample
    for store in stores:
        found, records = store.manifest.documents_per_record, store.manifest.recipe.records
        if found != wanted:
            raise DataError(
                f"task {config.task} learns from {wanted} row(s) together, and a record of {store.place}, which holds "
                f"{records.format if records else 'texts'}, is {found} document(s): give a store of other records "
                "(data.records; dpo and orpo learn from preferences), or another task"
            )


def task_of(config: Config) -> Task:
    """The task that a config names; one of the user's own is made without arguments.

    Raises ConfigError where there is none of this name, or it cannot be imported here.
    """
    if (known := TASKS.get(config.task)) is not None:
        return known(config)
    if ":" not in config.task:
        near = difflib.get_close_matches(config.task, TASKS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            [f"task is {config.task!r}: {hint}It must be one of {', '.join(TASKS)}, or package.module:Class"]
        )
    made = own_class("task", config.task)()
    if missing := [name for name in ("score", "counts", "training", "evaluation", "sums") if not hasattr(made, name)]:
        raise ConfigError(
            [f"task is {config.task!r}, which has no {', '.join(missing)}: it is no task; see docs/tasks.md, Your own"]
        )
    return made
