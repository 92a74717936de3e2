"""From a job file and overrides to a `Config`, and from a `Config` to text.

Reading is done on the submitting machine and reports every problem at once, in one ConfigError.
"""

import difflib
import json
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from raynium.config.fields import BUILDS_ON, accepted_within, did_you_mean, fields_below, schema_fields
from raynium.config.plain_file import read_plain
from raynium.config.schema import Config
from raynium.config.section import Section
from raynium.config.weights import Describe, take_described
from raynium.config.yaml_text import Reading, compose, cut, place_of, read_field, read_section, repeated, shown
from raynium.errors import ConfigError

Overrides = Sequence[str] | Mapping[str, Any]

# In a checkout: platform/raynium/config/load.py → jobs/configs. Where only the package is installed there is no such
# folder, and presets come from the working directory (a Ray job unpacks the checkout there).
CHECKOUT = Path(__file__).parents[3]
PRESET_FOLDER = Path("jobs/configs")
MAX_FILE_BYTES = 2**18
# What records a task is trained on, where data.records does not say.
RECORDS_OF_TASKS = {"sft": "chats", "dpo": "preferences", "orpo": "preferences"}


# ------------------------------------------------------------------------------------------------- reading


def load_config(
    path_or_preset: str | os.PathLike[str],
    overrides: Overrides = (),
    *,
    base_folder: str | Path | None = None,
    describe: Describe | None = None,
) -> Config:
    """Read a job file and lay `overrides` over it.

    path_or_preset: the path of a YAML file, or a preset's bare name. A str without a folder and without the ending
        .yaml or .yml is a preset: `<base_folder>/jobs/configs/<name>.yaml`, else the same file of this checkout.
    overrides: "train.steps=200" strings, or a mapping of dotted names to values, whose quotes belong to the text; later
        ones win.
    base_folder: what relative paths of job files begin at; None: the current folder.
    describe: reads what the weights at `model.init` settle (`convert.adopt.describe`); None: the config says it itself.

    Paths in the result are as written: see `resolve`. Raises ConfigError.
    """
    base = _folder(base_folder)
    reading, files = Reading(), Files(base, ())
    _read_file(files.find(path_or_preset), str(path_or_preset), reading, files)
    return _finish(reading, overrides, files, describe)


def parse_config(
    text: str,
    overrides: Overrides = (),
    *,
    origin: str = "the config",
    base_folder: str | Path | None = None,
    describe: Describe | None = None,
) -> Config:
    """A Config from YAML text (for one, the text that `dump_yaml` wrote). `origin` names it in messages."""
    reading, files = Reading(), Files(_folder(base_folder), ())
    _read_text(text, origin, reading, files)
    return _finish(reading, overrides, files, describe)


def _finish(reading: Reading, overrides: Overrides, files: "Files", describe: Describe | None) -> Config:
    # A preset's model, or that of weights, is what the other overrides are laid over, wherever it stands among them.
    quotes = () if isinstance(overrides, Mapping) else ('"', "'")
    first = ("model.preset", "model.init")
    for key, value in sorted(_split_overrides(overrides, reading), key=lambda each: each[0] not in first):
        _apply_override(key, value, reading, files, quotes=quotes)
    take_described(reading, describe)
    _name_the_store(reading)
    _settle_by_task(reading)
    config = _validate(reading)
    if config is None or reading.problems:
        raise ConfigError(reading.problems)
    return config


def _name_the_store(reading: Reading) -> None:
    """data.path where only data.source is given: runs with the same source share a store.

    Refuses data without either, and without a mixture.
    """
    run, data = reading.values.get("run"), reading.values.get("data")
    if not isinstance(data, dict) or reading.refused & {"", "data", "data.path", "data.source", "data.mixture"}:
        return
    if not (data.get("path") or data.get("source") or data.get("mixture")):
        reading.refuse("data.path", "data.path is missing: give a folder or a URL, or data.source or data.mixture")
    if isinstance(run, dict) and not data.get("mixture"):
        source, root = data.get("source"), run.get("root", "runs")
        if isinstance(source, str) and isinstance(root, str) and data.get("path") is None:
            # Of a glob, the folder that it begins at.
            name = re.split(r"(?:^|/)[^/]*[*?\[]", source)[0].rstrip("/").rpartition("/")[2]
            name = name if name.strip(".~") else run.get("name")
            reading.put("data.path", f"{root.rstrip('/')}/data/{name}", "from run.root and data.source")


def _settle_by_task(reading: Reading) -> None:
    """What a task learns from, where nothing else is said. Refuses a training of no length."""
    values, train, data = reading.values, reading.values.get("train"), reading.values.get("data")
    records = RECORDS_OF_TASKS.get(str(values.get("task")))
    if records is not None and isinstance(data, dict):
        whole = {"too_long": "leave_out"} if records == "preferences" else {}
        for key, value in {"records": records, "packing": "documents", **whole}.items():
            if key not in data:
                reading.put(f"data.{key}", value, f"from task {values['task']}")
    if not isinstance(train, dict) or reading.refused & {"", "train", "train.steps", "train.epochs"}:
        return
    if train.get("steps") is None and train.get("epochs") is None:
        reading.refuse("train.steps", "train.steps is missing: give a whole number of at least 1, or train.epochs")


# ------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Files:
    """Where job files are looked for.

    base: what the command line's paths begin at. opened: the files that are being read, each building on the next; the
    paths that the last of them names begin at its folder.
    """

    base: Path
    opened: tuple[Path, ...]

    def find(self, given: str | os.PathLike[str]) -> Path:
        """The job file of a path or of a preset's bare name. Raises ConfigError."""
        text = os.fspath(given)
        folder = self.opened[-1].parent if self.opened else self.base
        is_preset = isinstance(given, str) and not re.search(r"[/\\]|\.ya?ml$", text)
        candidates = [each / f"{text}.yaml" for each in _preset_folders(self.base)] if is_preset else [folder / text]
        for path in candidates:
            try:
                # What is there and no file is refused where it is read.
                if path.exists():
                    return path
            except OSError as error:
                raise ConfigError([f"job file {cut(repr(text))} cannot be looked for: {error.strerror}"]) from error
        presets = preset_names(self.base)
        near = difflib.get_close_matches(Path(text).stem, presets, n=1)
        hint = f"did you mean the preset {near[0]}? " if near else ""
        place = "" if is_preset else f" in {folder}"
        kind = "preset" if is_preset else "job file"
        raise ConfigError(
            [
                f"there is no {kind} {cut(repr(text))}{place}: {hint}"
                f"Give the path of a YAML file, or a preset: {', '.join(presets) or 'none found here'}"
            ]
        )


def _folder(given: str | Path | None) -> Path:
    return Path(given) if given is not None else Path.cwd()


def preset_names(base_folder: str | Path | None = None) -> list[str]:
    """The presets `load_config` finds by bare name, sorted."""
    folders = _preset_folders(_folder(base_folder))
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def preset_path(name: str, base_folder: str | Path | None = None) -> Path:
    """The file of a preset. Raises ConfigError."""
    return Files(_folder(base_folder), ()).find(name)


def _preset_folders(base: Path) -> list[Path]:
    return [base / PRESET_FOLDER, CHECKOUT / PRESET_FOLDER]


def _read_file(path: Path, origin: str, reading: Reading, files: Files) -> None:
    try:
        text = read_plain(path, max_bytes=MAX_FILE_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{origin} cannot be read as text: {error}"]) from error
    _read_text(text, origin, reading, Files(files.base, (*files.opened, path.resolve())))


def _read_text(text: str, origin: str, reading: Reading, files: Files) -> None:
    """Lay a job file over what was read so far, and what it builds on between them."""
    node = compose(text, origin, "", reading)
    if node is not None:
        _lay_below(node, "", origin, reading, files)
        read_section(node, "", origin, reading)
    elif "" not in reading.refused:
        reading.refuse("", f"{origin} is empty: it must hold {_required_in_words('')}")


def _lay_below(node: yaml.Node, name: str, source: str, reading: Reading, files: Files) -> None:
    """Read what the section `name` ("" for a whole file) builds on.

    A file that is extended is laid over what is there, field by field; a preset's model takes the place of any other,
    since no field of one model is meant for another, and so do weights to begin with.
    """
    if name == "" and (given := _member(node, "extends")) is not None:
        _read_base("extends", given, source, reading, files)
    model = {"": _member(node, "model"), "model": node}.get(name)
    if model is not None and (given := _member(model, "preset")) is not None:
        _take_preset(given, source, reading, files)
    elif model is not None and (given := _member(model, "init")) is not None and shown(given) != "empty":
        _leave_model(reading)


def _leave_model(reading: Reading) -> None:
    """Weights that are named over a model are another model; tokens to add are for whatever is."""
    model = reading.values.get("model")
    if isinstance(model, dict):
        reading.values["model"] = {key: value for key, value in model.items() if key == "add_tokens"}


def _take_preset(given: yaml.Node, source: str, reading: Reading, files: Files) -> None:
    preset = Reading(problems=reading.problems)
    _read_base("model.preset", given, source, preset, files)
    reading.values["model"] = preset.values.get("model", {})
    reading.origins |= preset.origins
    if preset.refused:
        reading.refused.add("model")


def _read_base(key: str, given: yaml.Node, source: str, reading: Reading, files: Files) -> None:
    """Read the job file that `key` names; a problem with it is noted, and that fields are missing then is none."""
    place = place_of(given, source)
    if not isinstance(given, yaml.ScalarNode) or shown(given) == "empty":
        reading.refuse("", f"{key} is {shown(given)} ({place}): it must be {BUILDS_ON[key]}")
        return
    try:
        path = files.find(given.value)
        if path.resolve() in files.opened:
            circle = " → ".join(each.name for each in (*files.opened, path))
            problem = f"it is being read already ({circle}); a file cannot build on itself: take one of them out"
            raise ConfigError([problem])
        _read_file(path, given.value, reading, files)
    except ConfigError as error:
        reading.refuse("", f"{key} is {shown(given)} ({place}): {error.problems[0]}")


def _member(node: yaml.Node, key: str) -> yaml.Node | None:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((child for name, child in pairs if name.value == key), None)


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
            name = key.strip() or "train.steps"
            reading.problems.append(cut(f"override {override!r} has no '='") + f": write {cut(name)}=VALUE")
            continue
        yield key.strip(), value.strip()


def _apply_override(key: str, value: Any, reading: Reading, files: Files, *, quotes: tuple[str, ...]) -> None:
    """Lay one override over what was read; text is YAML, except that a text field takes it as it is.

    quotes: what begins text that is YAML for a text field too.
    """
    if key == "model.preset":
        _take_preset(yaml.ScalarNode("tag:yaml.org,2002:str", str(value)), f"override {key}", reading, files)
        return
    if key == "model.init" and value not in (None, "", "null", "~"):
        _leave_model(reading)
    known = schema_fields().get(key)
    if key == "extends":
        reading.problems.append(
            f"extends is not for an override: it stands in a job file, as `extends: {cut(str(value))}`"
        )
        return
    if known is None:
        reading.problems.append(
            f"{cut(key) or 'an override without a name'} is not a field (override): {did_you_mean(key)}"
        )
        return
    origin = f"override {key}"
    is_bare_text = isinstance(value, str) and known.type is str and not value.startswith(quotes)
    if is_bare_text and not (known.nullable and value in ("", "null", "~")):
        reading.put(key, value, origin)
        return
    # Python values take the road of text, so that both are judged by the same rules.
    node = compose(value if isinstance(value, str) else _to_yaml(value), origin, key, reading)
    if key not in reading.refused:
        if node is not None:
            _lay_below(node, key, origin, reading, files)
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
    if known.lists_sections and len(item["loc"]) > len(parts):
        return _member_in_words(item, name, [str(part) for part in item["loc"][len(parts) :]], reading)
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
    return f"{name} is {repeated(name, json.dumps(value))} ({reading.origins[name]}): it must be {known.accepted}{hint}"


def _member_in_words(item: Any, name: str, parts: list[str], reading: Reading) -> str:
    """The same of what is inside a list of sections; parts: the way from the list, as ["0", "weight"]."""
    label = name + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in parts)
    accepted, origin = accepted_within(schema_fields()[name].type, parts), reading.origins[name]
    if item["type"] == "missing":
        return f"{label} is missing ({origin}): give {accepted}"
    if item["type"] == "extra_forbidden":
        return f"{label} is not a field ({origin}): there must be {accepted}"
    return f"{label} is {repeated(name, json.dumps(item['input']))} ({origin}): it must be {accepted}"


def _required_in_words(section: str) -> str:
    # Data needs one of several.
    required = ", ".join(field.name for field in fields_below(section) if field.required)
    return required or "data.path, data.source or data.mixture"


# ------------------------------------------------------------------------------------------------- writing


def dump_yaml(config: Config) -> str:
    """The whole config as YAML, defaults included; `parse_config` reads the same config back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
