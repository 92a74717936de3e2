"""Every path of a config absolute or a URL, before it leaves the submitting machine.

A Ray Train worker runs in another folder than the driver, and a job's own folder is thrown away after it: a relative
path would name another place in each process.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from raynium.config.local_folders import nameless
from raynium.config.schema import Config, MixedStore
from raynium.errors import ConfigError

HOME_VARIABLE = "RAYNIUM_HOME"
# Set by Ray for the driver of a submitted job (ray/_private/runtime_env/constants.py).
RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# Where Ray unpacks a job's working_dir: <session>/runtime_resources/working_dir_files/_ray_pkg_<hash>.
RAY_UNPACKED = "/runtime_resources/working_dir_files/"
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.")
BROKEN_URL = re.compile(r"(s3|gs|gcs|abfs|az|file|http|https|sqlite|postgresql|mysql):", re.IGNORECASE)
# `user:password@`, or a query parameter that looks like a secret.
SECRET = re.compile(r"://[^/@]*@|[?&][^=&]*(password|secret|token|key|signature)[^=&]*=", re.IGNORECASE)
# What lies beside the runs under their root, by name and by the beginning of a name.
OUR_NAMES = {"mlartifacts", "compile-cache", "data"}
OUR_PREFIXES = ("mlflow.db", "probe-")
# In the presets, which cannot know it.
PLACEHOLDER = "YOUR-BUCKET"
# Values of data.source that are no path.
WORDS_FOR_SOURCE = {"python-stdlib", "made-chats", "made-preferences"}
# Values of data.chat_template that are none.
WORDS_FOR_TEMPLATE = {"chatml"}
# Values of tracking.uri that MLflow knows by name.
WORDS_FOR_TRACKING = {"databricks"}


def resolve(config: Config, *, base_folder: str | Path | None = None) -> Config:
    """The same config with run.root, all places of its data and tracking.uri absolute or URLs.

    Relative paths begin at $RAYNIUM_HOME where it is set (a folder or a URL); else, inside a Ray job, at the user's
    home folder, because the current folder is Ray's unpacked copy and is deleted; else at `base_folder` (None: the
    current folder). `~` is the home folder. Resolving twice changes nothing. Raises ConfigError with every problem;
    a secret in a URL is one, because the config is printed, logged and stored.
    """
    problems: list[str] = []
    home = relative_paths_begin_at(os.environ, Path(base_folder) if base_folder is not None else Path.cwd(), problems)

    def place(name: str, text: str) -> str:
        placed = _placed(name, text, home, problems)
        if URL.match(placed) and SECRET.search(placed):
            problems.append(_secret_in_url(name, placed))
        return placed

    data, model, adapter, tracking = config.data, config.model, config.adapter, config.tracking
    root = place("run.root", config.run.root)

    def of_store(number: int, store: MixedStore) -> MixedStore:
        by_name = f"{root.rstrip('/')}/data/{store.store}"
        is_name = "/" not in store.store and store.store not in (".", "..", "~")
        placed = by_name if is_name else place(f"data.mixture[{number}].store", store.store)
        return store.model_copy(update={"store": placed})

    resolved = config.model_copy(
        update={
            "run": config.run.model_copy(update={"root": root}),
            "model": model.model_copy(update={"init": model.init and place("model.init", model.init)}),
            "adapter": adapter.model_copy(update={"init": adapter.init and place("adapter.init", adapter.init)}),
            "data": data.model_copy(
                update={
                    "path": data.path and place("data.path", data.path),
                    "mixture": tuple(of_store(number, store) for number, store in enumerate(data.mixture)),
                    "source": data.source
                    if data.source is None or data.source in WORDS_FOR_SOURCE
                    else place("data.source", data.source),
                    "tokenizer": data.tokenizer and place("data.tokenizer", data.tokenizer),
                    "chat_template": data.chat_template
                    if data.chat_template is None or data.chat_template in WORDS_FOR_TEMPLATE
                    else place("data.chat_template", data.chat_template),
                }
            ),
            "evaluate": config.evaluate.model_copy(
                update={
                    name: tuple(place(f"evaluate.{name}[{number}]", each) for number, each in enumerate(places))
                    for name, places in (("sets", config.evaluate.sets), ("tasks", config.evaluate.tasks))
                }
            ),
            "tracking": tracking.model_copy(update={"uri": tracking.uri and _tracking_uri(tracking.uri, place)}),
        }
    )
    if problems:
        raise ConfigError(problems)
    return resolved


def placeholders(config: Config) -> list[str]:
    """What of a preset has still to be filled in: one message for each field; [] when the config may run."""
    places = {
        "run.root": config.run.root,
        "data.path": config.data.path,
        **{f"data.mixture[{number}].store": each.store for number, each in enumerate(config.data.mixture)},
        "data.source": config.data.source,
        "data.tokenizer": config.data.tokenizer,
        "model.init": config.model.init,
        "adapter.init": config.adapter.init,
        "tracking.uri": config.tracking.uri,
    }
    return [
        f"{name} is {place!r}: {PLACEHOLDER} stands for a bucket of yours; set {name} to a place that you may write"
        for name, place in places.items()
        if place is not None and PLACEHOLDER in place
    ]


def collisions(config: Config) -> list[str]:
    """Places that would be two things at once: one message for each. config: resolved."""
    name, problems = config.run.name, []
    if name in OUR_NAMES or name.startswith(OUR_PREFIXES):
        problems.append(
            f"run.name is {name!r}: under run.root that is Raynium's own (MLflow's database and files, the compile "
            "cache, document stores); give the run another name"
        )
    run = f"{config.run.root.rstrip('/')}/{name}"
    for number, store in enumerate(config.data.stores):
        if lies_in(store.store, run):
            field = f"data.mixture[{number}].store" if config.data.mixture else "data.path"
            problems.append(
                f"{field} is {store.store!r}, in the folder of run {name!r}: a run's folder holds what the run "
                "writes; give the document store another place, or the run another name"
            )
    if config.model.init is not None and lies_in(config.model.init.rpartition("@")[0] or config.model.init, run):
        problems.append(
            f"model.init is {config.model.init!r}, in the folder of run {name!r} itself: a run goes on from its own "
            "checkpoints without it; give the new run another name"
        )
    if (source := config.data.source) is not None and source not in WORDS_FOR_SOURCE:
        for field, place in (("run.root", config.run.root), ("data.path", config.data.path)):
            if place is not None and lies_in(place, source):
                problems.append(
                    f"data.source is {source!r}, which holds {field}, {place!r}: what runs write would be read as "
                    f"text; give the text a folder of its own, name its files (data.source='*.txt'), or set {field} to "
                    "a place outside"
                )
    return problems


def lies_in(place: str, folder: str) -> bool:
    """Whether a place, absolute or a URL, is this folder or below it."""
    place, folder = (f"{each.removeprefix('file://').rstrip('/')}/" for each in (place, folder))
    return place.startswith(folder)


def relative_paths_begin_at(environment: Mapping[str, str], current_folder: Path, problems: list[str]) -> str:
    """The folder or URL that relative paths of a config are below; see `resolve`."""
    if home := environment.get(HOME_VARIABLE):
        home = home if URL.match(home) else os.path.expanduser(home)
        if not (URL.match(home) or os.path.isabs(home)):
            problems.append(f"{HOME_VARIABLE} is {home!r}: it must be an absolute folder or a URL; or unset it")
        return home
    if in_ray_job(environment, current_folder):
        return os.path.expanduser("~")
    return str(current_folder.absolute())


def in_ray_job(environment: Mapping[str, str], current_folder: Path) -> bool:
    """Whether this process belongs to a submitted Ray job, whose current folder is a throw-away copy."""
    return RAY_JOB_VARIABLE in environment or RAY_UNPACKED in current_folder.as_posix() + "/"


def _placed(name: str, text: str, home: str, problems: list[str]) -> str:
    place = _absolute(name, text, home, problems)
    is_local = place.startswith("file://") or not URL.match(place)
    if is_local and (problem := nameless(place)):
        problems.append(f"{name} is {place!a}, which {problem}")
    return place


def _absolute(name: str, text: str, home: str, problems: list[str]) -> str:
    if URL.match(text):
        return text
    if BROKEN_URL.match(text):
        problems.append(f"{name} is {text!r}: a URL has two slashes and a name after its scheme, as s3://bucket/folder")
        return text
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        problems.append(f"{name} is {text!r}: there is no user of that name; give an absolute path")
        return text
    if os.path.isabs(expanded):
        return os.path.normpath(expanded)
    relative = os.path.normpath(expanded)
    if not URL.match(home):
        return os.path.normpath(os.path.join(home, relative))
    if relative.startswith(".."):
        problems.append(f"{name} is {text!r}: below {HOME_VARIABLE}={home} a path cannot go up; give a whole URL")
    return f"{home.rstrip('/')}/{relative}"


def _secret_in_url(name: str, url: str) -> str:
    parts = urlsplit(url)
    shown = f"{parts.scheme}://***@{parts.netloc.rpartition('@')[2]}"
    remedy = {
        "http": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
        "https": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
        "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile",
    }.get(parts.scheme, "the variables that the library of this kind of URL reads (PGPASSWORD for postgresql)")
    return (
        f"{name} is {shown}…, a URL that holds credentials: the config is printed, logged and stored, so it may hold "
        f"none. Take them out, and set in the environment {remedy}"
    )


def _tracking_uri(uri: str, place) -> str:
    if uri in WORDS_FOR_TRACKING:
        return uri
    # A path follows, which is relative unless it begins with another slash.
    prefix = "sqlite:///"
    if uri.startswith(prefix):
        return prefix + place("tracking.uri", uri.removeprefix(prefix))
    return place("tracking.uri", uri)


def absolute_root(root: str) -> str:
    """A root given on the command line, placed as `resolve` places run.root. Raises ConfigError."""
    return absolute_path("root", root)


def absolute_path(name: str, text: str) -> str:
    """A path or URL given on the command line as `name`, placed as `resolve` places those of a config."""
    problems: list[str] = []
    home = relative_paths_begin_at(os.environ, Path.cwd(), problems)
    place = _placed(name, text, home, problems)
    if problems:
        raise ConfigError(problems)
    return place
