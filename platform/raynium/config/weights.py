"""What the weights at `model.init` settle of a config. To read them is not this room's: a function is handed over."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raynium.config.paths import absolute_path
from raynium.config.schema import ModelSection
from raynium.config.yaml_text import Reading, cut
from raynium.errors import RayniumError

# Of the model section: about the run, or bounds that any weights may be used with.
NOT_SETTLED = ("init", "init_identity", "add_tokens", "max_seq_len", "init_std")


@dataclass(frozen=True)
class Described:
    """model: the section as JSON has it, of the weights alone, with room for the tokens that are added. tokenizer: the
    place of a tokenizer.json.
    """

    model: Mapping[str, Any]
    tokenizer: str


# Given model.init, absolute, model.add_tokens, and the place of the run, which may know already what it began with.
Describe = Callable[[str, tuple[str, ...], str | None], Described]


def take_described(reading: Reading, describe: Describe | None) -> None:
    """Lay what the weights settle below what was read; what contradicts them is refused, with both values."""
    model = reading.values.get("model")
    if not isinstance(model, dict) or not isinstance(given := model.get("init"), str) or not given:
        return
    # A resolved config says it all, and is read where the weights need not be.
    if set(ModelSection.model_fields) <= set(model) or describe is None or reading.refused & {"", "model"}:
        return
    added = model.get("add_tokens") or ()
    if not isinstance(added, list | tuple) or not all(isinstance(token, str) and token for token in added):
        return
    try:
        described = describe(absolute_path("model.init", given), tuple(added), _place_of_run(reading))
    except RayniumError as error:
        origin = reading.origins.get("model.init", "model")
        reading.refuse("model", f"model.init is {cut(repr(given))} ({origin}): {error}")
        return
    reading.problems += contradictions(model, described.model, init=given)
    for name, value in described.model.items():
        if name not in model and name not in ("init", "init_identity", "add_tokens"):
            reading.put(f"model.{name}", value, "from model.init")
    data = reading.values.get("data")
    if isinstance(data, dict) and data.get("source") is not None and data.get("tokenizer") is None:
        reading.put("data.tokenizer", described.tokenizer, "from model.init")


def contradictions(model: Mapping[str, Any], weights: Mapping[str, Any], *, init: str) -> Iterator[str]:
    """Where a model section, which may be a part of one, and that of the weights differ; both as JSON has them."""
    for name, of_weights in weights.items():
        # The vocabulary that tokens are added to may have more room.
        has_room = name == "vocab_size" and bool(model.get("add_tokens")) and _at_least(model.get(name), of_weights)
        if name in model and name not in NOT_SETTLED and model[name] != of_weights and not has_room:
            yield (
                f"model.{name} is {model[name]!r}, but the weights at model.init = {cut(repr(init))} have "
                f"{of_weights!r}: leave the field out, or give other weights"
            )


def _at_least(value: Any, least: int) -> bool:
    return isinstance(value, int) and value >= least


def _place_of_run(reading: Reading) -> str | None:
    """None where it is not known, which the config is refused for."""
    run = reading.values.get("run")
    root, name = (run.get("root", "runs"), run.get("name")) if isinstance(run, dict) else (None, None)
    if not isinstance(root, str) or not isinstance(name, str) or not root:
        return None
    return f"{absolute_path('run.root', root).rstrip('/')}/{name}"
