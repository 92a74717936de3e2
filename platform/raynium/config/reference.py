"""What the schema says of itself, for people: the reference, what a config changes, and a file to start from."""

import json
import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from raynium.config.fields import BUILDS_ON, SchemaField, did_you_mean, fields_below, schema_fields
from raynium.config.load import load_config, parse_config
from raynium.config.paths import PLACEHOLDER
from raynium.config.resume import when_resumed
from raynium.config.schema import Config
from raynium.config.weights import Describe
from raynium.config.world import World
from raynium.errors import ConfigError

WIDTH = 100
# What a new job file shows, of all fields: those that most runs set.
STARTING_FIELDS = (
    *("run.name", "run.root", "data.source", "data.path", "data.tokenizer", "data.seq_len"),
    *("optimizer.learning_rate", "train.steps", "train.global_batch_size", "train.micro_batch_size"),
    *("checkpoint.every_steps", "evaluate.every_steps"),
)

MARKDOWN_HEAD = """\
# Every field of a config

Made from the schema by `raynium config --markdown > docs/config.md`; a test compares. In a terminal: `raynium config`,
`raynium config train`, `raynium config train.steps`.

A job file holds what differs from the defaults below. `raynium init NAME --preset llama3-1b` writes one to start from,
`raynium presets` lists the presets, `raynium config --diff FILE` shows what a file changes, and overrides such as
`train.steps=200` on the command line come last. This is a whole file for a text of your own:

```yaml
run: {name: mine}
model: {preset: llama3-1b}
data: {source: my-text}
train: {steps: 1000, global_batch_size: 8}
```

A file may build on another, field by field: `extends: llama3-8b`, or `extends: ../base.yaml`, a path relative to the
file that says so. What is recorded of a run is the resolved config, without `extends` and `preset`.

"""


# ------------------------------------------------------------------------------------------------- the reference


def reference(name: str = "") -> str:
    """The reference of a section, of a field, or of everything (""). Raises ConfigError for a name that is none."""
    if not name:
        heads = [_reflowed(Config.__doc__), *(reference(section.name) for section in fields_below(""))]
        return "\n\n\n".join(heads)
    if name in BUILDS_ON:
        return f"{name}: {BUILDS_ON[name]}"
    known = schema_fields().get(name)
    if known is None:
        raise ConfigError([f"{name} is not a field: {did_you_mean(name)}"])
    if not known.is_section:
        return f"{_entry(known)}\n    When a run goes on: {when_resumed(name)}."
    return "\n\n".join([f"{name}\n{'-' * len(name)}\n{_reflowed(known.meaning)}", *map(_entry, fields_below(name))])


def reference_markdown() -> str:
    """The reference as docs/config.md holds it."""
    alone = [field for field in fields_below("") if not field.is_section]
    tables = [_markdown(field) for field in schema_fields().values() if field.is_section]
    return MARKDOWN_HEAD + "\n".join([f"{_table(alone)}\n", *tables])


def _entry(field: SchemaField) -> str:
    unit = f", in {field.unit}" if field.unit else ""
    if field.is_section:
        return textwrap.fill(f"{field.name}: {field.accepted} (`raynium config {field.name}`)", WIDTH)
    head = f"{field.name} ({_default(field)}): {field.accepted}{unit}"
    text = textwrap.fill(field.meaning, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return textwrap.fill(head, WIDTH, subsequent_indent="    ") + "\n" + text


def _default(field: SchemaField) -> str:
    return "required" if field.required else f"default {_shown(field.default)}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _reflowed(text: str | None) -> str:
    paragraphs = (text or "").split("\n\n")
    return "\n\n".join(textwrap.fill(" ".join(paragraph.split()), WIDTH) for paragraph in paragraphs)


def _markdown(section: SchemaField) -> str:
    return f"## {section.name}\n\n{_reflowed(section.meaning)}\n\n{_table(fields_below(section.name))}\n"


def _table(fields: list[SchemaField]) -> str:
    rows = ["| field | default | unit | meaning | accepts | when a run goes on |", "|---|---|---|---|---|---|"]
    for field in fields:
        if field.is_section:
            cells = [f"`{field.name}`", "null", "", "see below", "a section, or null", when_resumed(field.name)]
        else:
            default = "**required**" if field.required else f"`{_shown(field.default)}`"
            cells = [f"`{field.name}`", default, field.unit, field.meaning, field.accepted, when_resumed(field.name)]
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows)


# ------------------------------------------------------------------------------------------------- one config


def differences(config: Config) -> Iterator[tuple[SchemaField, Any]]:
    """Each field that differs from its default, and its value as JSON has it; a section in a section is one value."""
    for section, values in config.model_dump(mode="json").items():
        members = {f"{section}.{key}": value for key, value in values.items()} if isinstance(values, dict) else {}
        for name, value in (members or {section: values}).items():
            field = schema_fields()[name]
            if field.required or value != json.loads(json.dumps(field.default)):
                yield field, value


def difference_lines(config: Config, name: str = "") -> list[str]:
    """What differs from the defaults, a line each with the default beside it.

    name: of a section or field, whose alone are told. Raises ConfigError if it is neither.
    """
    if name and name not in schema_fields():
        raise ConfigError([f"{name} is not a field: {did_you_mean(name)}"])
    return [
        f"{field.name}: {_shown(value)}  ({_default(field)})"
        for field, value in differences(config)
        if f"{field.name}.".startswith(f"{name}." if name else "") or name.startswith(f"{field.name}.")
    ]


def brief(config: Config) -> str:
    """What differs from the defaults as YAML that reads back as the same config, after a line of what it amounts to.

    config: one that keeps the rules (`planning.rules`).
    """
    train, world = config.train, World.of(config)
    sections: dict[str, dict[str, Any]] = {}
    alone: dict[str, Any] = {}
    for field, value in differences(config):
        section, dot, key = field.name.partition(".")
        if dot:
            sections.setdefault(section, {})[key] = value
        else:
            alone[section] = value
    in_all = "" if train.steps is None else f" = {train.steps * config.tokens_per_step:,} tokens"
    times = f"{train.epochs:g} epochs in steps of" if train.steps is None else f"{train.steps:,} steps ×"
    lines = [
        f"# {times} {train.global_batch_size:,} sequences × {config.data.seq_len:,} tokens{in_all}",
        f"# a step's {train.global_batch_size:,} sequences = {world.data:,} data-parallel rank(s) × "
        f"{world.num_micro_batches:,} accumulated pass(es) × {train.micro_batch_size:,} at a time",
    ]
    for section, values in (alone | sections).items():
        lines.append(f"{section}: {_yaml(values, width=WIDTH)}")
    return "\n".join(lines)


def starting_file(name: str, preset: str, overrides: list[str], *, describe: Describe | None = None) -> str:
    """A job file of the run `name` that builds on a preset; what it leaves as it is stands there as a comment.

    describe: as for `load_config`. Raises ConfigError.
    """
    overrides = [*overrides, f"run.name={name}"]
    config = load_config(preset, overrides, describe=describe)
    values = config.model_dump(mode="json")
    given = {override.partition("=")[0].strip() for override in overrides}
    lines = [
        f"# Start it with: raynium train {name}.yaml",
        f"# It is the preset {preset} and what stands below. `raynium config` explains every field,",
        f"# `raynium config --diff {name}.yaml` shows all that is not a default.",
        f"extends: {preset}",
    ]
    shown = [*STARTING_FIELDS, *sorted(given.difference(STARTING_FIELDS))]
    for section in fields_below(""):
        if not section.is_section:
            lines += ["", f"{section.name}: {values[section.name]}"] if section.name in given else []
            continue
        fields = [schema_fields()[each] for each in shown if each.startswith(f"{section.name}.")]
        live = {each.name for each in fields if each.name in given or PLACEHOLDER in str(_value(values, each.name))}
        lines += ["", f"{section.name}:" if live else f"# {section.name}:"] if fields else []
        for field in fields:
            unit = f" In {field.unit}." if field.unit else ""
            lines += textwrap.wrap(field.meaning + unit, WIDTH, initial_indent="  # ", subsequent_indent="  # ")
            line = f"{field.name.partition('.')[2]}: {_yaml(_value(values, field.name), width=10_000)}"
            lines.append(f"  {line}" if field.name in live else f"  # {line}" if live else f"#   {line}")
    text = "\n".join(lines) + "\n"
    assert parse_config(text, describe=describe) == config
    return text


def _yaml(value: Any, *, width: int) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=width)
    return text.removesuffix("...\n").rstrip()


def _value(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return values
