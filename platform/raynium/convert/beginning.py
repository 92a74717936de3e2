"""The weights that a run begins with, on the driver: looked at before anything starts, adopted once it has begun.

What is imported here is imported when it is needed, since it takes torch along (`convert/adopt.py`).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raynium.config.schema import Config
from raynium.config.weights import Described
from raynium.errors import StoreError
from raynium.storage.store import Store


def describe(init: str, added: tuple[str, ...], run_place: str | None) -> Described:
    """For `load_config`. What a run has begun with it knows itself, wherever the weights are by now."""
    from raynium.convert.adopt import describe

    return describe(init, added, run_place)


def survey_weights(config: Config) -> None:
    """Whether a new run can begin with what model.init and adapter.init name, by names and headers alone.

    Raises ConfigError, CheckpointError and its kinds, DataError for the tokenizer, StoreError.
    """
    if config.model.init is not None:
        from raynium.convert.adopt import check_weights

        check_weights(config)
    if config.adapter.init is not None:
        from raynium.convert.peft_folder import check_adapter

        check_adapter(config)


def with_own_tokenizer(config: Config, cache: Path) -> Config:
    """For whoever reads data: where tokens are added, the tokenizer of the weights is another file.

    It is made in `cache`, by its content, with the files that lie beside it. A tokenizer of the user's own stays.
    """
    if not config.model.add_tokens or config.model.init is None or config.data.tokenizer is None:
        return config
    from raynium.convert.adopt import extended_tokenizer

    place = extended_tokenizer(config, cache)
    return config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": place})})


def adopt_weights(config: Config, store: Store, saved: Mapping[str, Any] | None, tell: Callable[[str], None]) -> Config:
    """The config with the identity of what the run at `store` began with, or begins with now: then all of it is read.

    A checkpoint of another run gets the tag `base-of-<name>`, which keeps it. saved: the config of the newest
    checkpoint. Raises as `survey_weights`, CheckpointDamaged for weights that are no numbers, CheckpointMismatch for
    another identity than the config asks for.
    """
    config = _adopt_model(config, store, saved, tell)
    if config.adapter.init is not None and saved is None:
        from raynium.convert.peft_folder import adopt_adapter

        tell(f"adapter: begins with {config.adapter.init}")
        adopt_adapter(config, store)
    return config


def _adopt_model(config: Config, store: Store, saved: Mapping[str, Any] | None, tell: Callable[[str], None]) -> Config:
    if config.model.init is None:
        return config
    if saved is not None:
        identity = saved["model"].get("init_identity")
    else:
        from raynium.convert.adopt import adopt, check_weights

        found = check_weights(config)
        tell(f"model: begins with {config.model.init}, {found.num_bytes / 1e6:,.1f} MB of weights")
        try:
            found.keep_for(config.run.name)
        except StoreError as error:
            tell(
                f"note: the run whose checkpoint this begins with may delete it, since it could not be tagged: {error}"
            )
        identity = adopt(config, store, found)
    return config.model_copy(update={"model": config.model.model_copy(update={"init_identity": identity})})
