"""A class of the user's own, by import path: a task, or a format of records."""

import importlib
from typing import Any

from raynium.errors import ConfigError


def own_class(field: str, path: str) -> Any:
    """The class at `package.module:Class`. field: that names it. Raises ConfigError where it cannot be had.

    It must be importable wherever it is used: here, on the nodes that train, and on those that build data.
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ConfigError(
            [
                f"{field} is {path!r}, and {module} cannot be imported here: {error}. Install its package on every "
                "node, name its folder in PYTHONPATH there, or put it in a job's working_dir"
            ]
        ) from error
    if not isinstance(found, type):
        raise ConfigError([f"{field} is {path!r}, and {module} has no class {name!r}: write package.module:Class"])
    return found
