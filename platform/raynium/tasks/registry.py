"""The one place that knows every task: from what a config says to the object that a run learns by. No torch here."""

import difflib
from collections.abc import Callable, Mapping

from raynium.config.own_class import own_class
from raynium.config.schema import Config
from raynium.errors import ConfigError
from raynium.tasks.base import Task
from raynium.tasks.pretraining import Pretraining
from raynium.tasks.sft import Sft

TASKS: Mapping[str, Callable[[Config], Task]] = {
    "pretraining": lambda config: Pretraining(),
    "sft": lambda config: Sft(),
}


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
