"""From a job file and overrides to a `Config`, and from a `Config` to text.

Reading is done on the submitting machine and reports every problem at once, in one ConfigError.
"""

import difflib
import json
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from raynium.config.fields import did_you_mean, fields_below, schema_fields
from raynium.config.plain_file import read_plain
from raynium.config.schema import Config, Section
from raynium.config.yaml_text import Reading, compose, read_field, read_section
from raynium.errors import ConfigError

Overrides = Sequence[str] | Mapping[str, Any]

# In a checkout: platform/raynium/config/load.py → jobs/configs. Where only the package is installed there is no such
# folder, and presets come from the working directory (a Ray job unpacks the checkout there).
CHECKOUT = Path(__file__).parents[3]
PRESET_FOLDER = Path("jobs/configs")
MAX_FILE_BYTES = 2**18


# ------------------------------------------------------------------------------------------------- reading


def load_config(
    path_or_preset: str | os.PathLike[str], overrides: Overrides = (), *, base_folder: str | Path | None = None
) -> Config:
    """Read a job file and lay `overrides` over it.

    path_or_preset: the path of a YAML file, or a preset's bare name. A str without a folder and without the ending
        .yaml or .yml is a preset: `<base_folder>/jobs/configs/<name>.yaml`, else the same file of this checkout.
    overrides: "train.steps=200" strings, or a mapping of dotted names to values; later ones win.
    base_folder: what relative paths of job files begin at; None: the current folder.

    Paths in the result are as written: see `resolve`. Raises ConfigError.
    """
    base = Path(base_folder) if base_folder is not None else Path.cwd()
    path = _find_job_file(path_or_preset, base)
    try:
        text = read_plain(path, max_bytes=MAX_FILE_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path_or_preset} cannot be read as text: {error}"]) from error
    return parse_config(text, overrides, origin=str(path_or_preset))


def parse_config(text: str, overrides: Overrides = (), *, origin: str = "the config") -> Config:
    """A Config from YAML text (for one, the text that `dump_yaml` wrote). `origin` names it in messages."""
    reading = Reading()
    node = compose(text, origin, "", reading)
    if node is not None:
        read_section(node, "", origin, reading)
    elif "" not in reading.refused:
        reading.refuse("", f"{origin} is empty: it must hold {_required_in_words('')}")
    for key, value in _split_overrides(overrides, reading):
        _apply_override(key, value, reading)
    config = _validate(reading)
    if config is None or reading.problems:
        raise ConfigError(reading.problems)
    return config


def preset_names(base_folder: str | Path | None = None) -> list[str]:
    """The presets `load_config` finds by bare name, sorted."""
    folders = _preset_folders(Path(base_folder) if base_folder is not None else Path.cwd())
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def _preset_folders(base: Path) -> list[Path]:
    return [base / PRESET_FOLDER, CHECKOUT / PRESET_FOLDER]


def _find_job_file(given: str | os.PathLike[str], base: Path) -> Path:
    text = os.fspath(given)
    is_preset = isinstance(given, str) and not re.search(r"[/\\]|\.ya?ml$", text)
    candidates = [folder / f"{text}.yaml" for folder in _preset_folders(base)] if is_preset else [base / text]
    for path in candidates:
        # What is there and no file is refused where it is read.
        if path.exists():
            return path
    presets = preset_names(base)
    near = difflib.get_close_matches(Path(text).stem, presets, n=1)
    hint = f"did you mean the preset {near[0]}? " if near else ""
    place = "" if is_preset else f" in {base}"
    kind = "preset" if is_preset else "job file"
    raise ConfigError(
        [
            f"there is no {kind} {text!r}{place}: {hint}"
            f"Give the path of a YAML file, or a preset: {', '.join(presets) or 'none found here'}"
        ]
    )


def _split_overrides(overrides: Overrides, reading: Reading) -> Iterator[tuple[str, Any]]:
    if isinstance(overrides, str):
        reading.problems.append(f"overrides is the text {overrides!r}: it must be a list such as [{overrides!r}]")
        return
    if isinstance(overrides, Mapping):
        yield from overrides.items()
        return
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            reading.problems.append(f"override {override!r} has no '=': write {key.strip() or 'train.steps'}=VALUE")
            continue
        yield key.strip(), value.strip()


def _apply_override(key: str, value: Any, reading: Reading) -> None:
    """Lay one override over what was read; text is YAML, except that a text field takes it as it is."""
    known = schema_fields().get(key)
    if known is None:
        reading.problems.append(f"{key or 'an override without a name'} is not a field (override): {did_you_mean(key)}")
        return
    origin = f"override {key}"
    is_bare_text = isinstance(value, str) and known.type is str and not value.startswith(('"', "'"))
    if is_bare_text and not (known.nullable and value in ("", "null", "~")):
        reading.put(key, value, origin)
        return
    # Python values take the road of text, so that both are judged by the same rules.
    node = compose(value if isinstance(value, str) else _to_yaml(value), origin, key, reading)
    if key not in reading.refused:
        read_field(node or yaml.ScalarNode("tag:yaml.org,2002:null", ""), key, origin, reading)


def _to_yaml(value: Any) -> str:
    try:
        return json.dumps(value.model_dump(mode="json") if isinstance(value, Section) else value, default=os.fspath)
    except (TypeError, ValueError, RecursionError):
        # Nothing of the schema takes it: it is refused under its own name.
        return json.dumps(reprlib.repr(value))


def _validate(reading: Reading) -> Config | None:
    """The Config, or None with the reasons added to `reading.problems`."""
    try:
        # JSON mode is the strict one that knows lists: "3" is no number, true is no 1, [1, 2] is a pair.
        return Config.model_validate_json(json.dumps(reading.values), strict=True)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            problem = _problem_in_words(item, reading)
            if problem and problem not in reading.problems:
                reading.problems.append(problem)
        return None


def _problem_in_words(item: Any, reading: Reading) -> str | None:
    """One pydantic error in our words: field, value given, what is accepted, where. None: already reported."""
    parts = [str(part) for part in item["loc"]]
    # A position in a list ("sample.prompts.0") or a validator's inner step is no name of ours: go up to the field.
    while parts and ".".join(parts) not in schema_fields():
        parts.pop()
    if not parts:
        return f"the config cannot be read: {item['msg']}"
    name = ".".join(parts)
    known = schema_fields()[name]
    if item["type"] == "missing" and parts == [str(part) for part in item["loc"]]:
        if reading.refused & {"", *(".".join(parts[:depth]) for depth in range(1, len(parts) + 1))}:
            return None
        if known.is_section:
            return f"{name} is missing: it must hold {_required_in_words(name)}"
        return f"{name} is missing: give {known.accepted}"
    value: Any = reading.values
    for part in parts:
        value = value[part]
    near = difflib.get_close_matches(str(value), re.findall(r"[\w.-]+", known.accepted), n=1, cutoff=0.75)
    hint = f"; did you mean {near[0]}?" if near and known.accepted.startswith("one of") else ""
    return f"{name} is {json.dumps(value)} ({reading.origins[name]}): it must be {known.accepted}{hint}"


def _required_in_words(section: str) -> str:
    return ", ".join(field.name for field in fields_below(section) if field.required)


# ------------------------------------------------------------------------------------------------- writing


def dump_yaml(config: Config) -> str:
    """The whole config as YAML, defaults included; `parse_config` reads the same config back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
