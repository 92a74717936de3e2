"""The one door to the mlflow library: imported on first use, silent, sending nothing home, and never hanging.

mlflow takes a second to import, so nothing here imports it at module level.
"""

import fcntl
import logging
import os
import re
import shutil
import socket
import sqlite3
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from raynium.config.proxies import astray, spare_loopback
from raynium.errors import TrackingAway, TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient

SERVER_SCHEMES = ("http", "https")
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}

# What MLflow sends to whatever server it is given.
CREDENTIALS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")

# Read by mlflow's telemetry in every process that imports it, the UI's server included.
NO_TELEMETRY = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}

_limits_mutex = threading.Lock()
_limits_depth = 0
_limits_saved: dict[str, str | None] = {}


@contextmanager
def mlflow_client(uri: str, *, timeout_seconds: float) -> Iterator["MlflowClient"]:
    """An MlflowClient whose requests wait `timeout_seconds` at most and are not repeated.

    Whatever mlflow raises inside becomes a TrackingError that names the address, the cause and a remedy.
    """
    spare_loopback()
    if uri.startswith("http"):
        for name in CREDENTIALS:
            if os.environ.get(name) and (problem := astray(uri, name)) is not None:
                raise TrackingError(problem)
    client_class = _load_mlflow()
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    with _request_limits(timeout_seconds):
        try:
            if uri.startswith("sqlite"):
                _make_sqlite(sqlite_path(uri), client_class)
            store = mlflow_uri(uri)
            yield client_class(tracking_uri=store, registry_uri=store)
        except (MlflowException, RequestException, SQLAlchemyError, OSError) as error:
            raise _error(error, uri=uri, timeout_seconds=timeout_seconds) from error


class ArtifactsAway(TrackingError):
    """MLflow answers, and the place where the run's artifacts are kept does not take them."""


def log_text(client: "MlflowClient", run_id: str, *, path: str, text: str) -> None:
    """Store an artifact (UTF-8), over one of the same path. Raises ArtifactsAway, which names their location."""
    try:
        client.log_text(run_id, text, path)
    # Each kind of location has a library of its own, which raises what it likes.
    except Exception as error:
        # If it is MLflow itself that is away, this says so.
        location = client.get_run(run_id).info.artifact_uri or "nowhere"
        proxy = "start the MLflow server with --serve-artifacts and make a new experiment there (tracking.experiment)"
        match error:
            case ImportError():
                remedy = f"pip install {error.name or 'what it names'} here and on the nodes, or {proxy}"
            case OSError() if location.startswith(("/", "file:")):
                remedy = f"This folder is looked for on this machine, not on the server's: mount it here, or {proxy}"
            case _:
                remedy = f"Check this machine's credentials and endpoint for it (MLFLOW_S3_ENDPOINT_URL), or {proxy}"
        cause = redact(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
        raise ArtifactsAway(f"the run's artifacts are kept in {redact(location)}: {cause}. {remedy}") from error


def refuse_stranger(uri: str) -> None:
    """TrackingError if `uri`, which stands in a run record, would get credentials that this user has for elsewhere.

    Whoever may write a record could have them sent to himself. MLFLOW_TRACKING_URI says whose they are.
    """
    given = [name for name in CREDENTIALS if os.environ.get(name)]
    server, named = urlsplit(uri), urlsplit(os.environ.get("MLFLOW_TRACKING_URI", ""))
    if given and server.scheme in SERVER_SCHEMES and (server.scheme, server.netloc) != (named.scheme, named.netloc):
        raise TrackingError(
            f"the run's record names MLflow at {redact(uri)}, and {given[0]} is set: it is sent to no address that you "
            f"have not named. Set MLFLOW_TRACKING_URI={server.scheme}://{server.netloc} if it is that server's, or "
            f"unset {given[0]}"
        )


def _load_mlflow() -> "type[MlflowClient]":
    # Before the import, which starts the telemetry thread.
    os.environ.update(NO_TELEMETRY)
    # GitPython warns where git is not installed.
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    # Progress of schema creation: dozens of INFO lines on the first use of an SQLite file.
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)

    # mlflow 3.17 on SQLAlchemy 2.1; where warnings are errors, its tables would stay broken for the whole process.
    warnings.filterwarnings("ignore", message="The ``noload`` loader strategy is deprecated")

    from mlflow import MlflowClient
    from mlflow.telemetry import get_telemetry_client, set_telemetry_client

    # It logs with a traceback what it also raises.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    # The caller's process had imported mlflow before us.
    if get_telemetry_client() is not None:
        set_telemetry_client()
    return MlflowClient


@contextmanager
def _request_limits(timeout_seconds: float) -> Iterator[None]:
    """Bound mlflow's HTTP requests, which wait 120 s and are repeated 7 times by default.

    mlflow reads the environment at each request and has no argument for these, so they are set while one of our calls
    runs and put back after the last. Calls that overlap in time share the limits of the one that began last.
    """
    global _limits_depth
    limits = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, round(timeout_seconds))),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        # Of boto3, which takes artifacts to S3.
        "AWS_MAX_ATTEMPTS": "1",
    }
    with _limits_mutex:
        if _limits_depth == 0:
            _limits_saved.update({name: os.environ.get(name) for name in limits})
        _limits_depth += 1
        os.environ.update(limits)
    try:
        yield
    finally:
        with _limits_mutex:
            _limits_depth -= 1
            if _limits_depth == 0:
                for name, value in _limits_saved.items():
                    os.environ.pop(name, None) if value is None else os.environ.update({name: value})
                _limits_saved.clear()


def check_reachable(uri: str, *, timeout_seconds: float = 5.0) -> None:
    """Raise TrackingError, within about `timeout_seconds`, unless MLflow at `uri` answers and may be written.

    TrackingAway, if it does not answer at all.

    An SQLite file is created if it is missing; its folder must exist.
    """
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme == "sqlite":
        _check_sqlite(sqlite_path(uri))
    elif scheme in DATABASE_PORTS:
        _check_port(uri, default_port=DATABASE_PORTS[scheme], timeout_seconds=timeout_seconds)
    with mlflow_client(uri, timeout_seconds=timeout_seconds) as client:
        client.search_experiments(max_results=1)


def _check_sqlite(path: Path) -> None:
    """mlflow itself tries for a minute before it says that it cannot open a file."""
    # Not pathlib's, which raises where this user may not look.
    if not os.path.isdir(path.parent):
        raise TrackingError(
            f"tracking store {path}: folder {path.parent} does not exist, or this user may not look into it. Make "
            "it, or set tracking.uri"
        )
    try:
        connection = sqlite3.connect(path, timeout=20)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("CREATE TABLE raynium_write_check (x)")
            connection.rollback()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise TrackingError(
            f"tracking store {path}: {error}. It must be an SQLite file that this user may write, on a disk with room. "
            "Repair or remove it, or set tracking.uri"
        ) from error


def _make_sqlite(path: Path, client_class: "type[MlflowClient]") -> None:
    """Make MLflow's tables in a new file, whole or not at all.

    Left to mlflow, two processes that meet a new file at once, or one killed while its hundred migrations run, leave
    a database that no later start can repair. So they run on a file beside it, one process at a time.
    """
    if path.exists() and path.stat().st_size > 0:
        return
    with open(f"{path}.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists() and path.stat().st_size > 0:
            return
        folder = Path(f"{path}.new")
        # A process that was killed here may have left one.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        client_class(tracking_uri=mlflow_uri(f"sqlite:///{folder}/new.db"))
        # mlflow keeps a connection to the first.
        shutil.copyfile(folder / "new.db", folder / "copy.db")
        os.replace(folder / "copy.db", path)
        shutil.rmtree(folder)


def _check_port(uri: str, *, default_port: int, timeout_seconds: float) -> None:
    """mlflow tries for minutes before it says that a database server is not there."""
    parts = urlsplit(uri)
    try:
        socket.create_connection((parts.hostname or "localhost", parts.port or default_port), timeout_seconds).close()
    except OSError as error:
        raise _error(error, uri=uri, timeout_seconds=timeout_seconds) from error


def sqlite_path(uri: str) -> Path:
    """The file of an `sqlite:///path` address: what follows is the path, character for character."""
    return Path(uri.partition(":///")[2])


def mlflow_uri(uri: str) -> str:
    """The address as MLflow must be given it: SQLAlchemy ends a path at `?`, and since 2.1 decodes `%` in it."""
    if not uri.startswith("sqlite"):
        return uri
    from sqlalchemy.engine import make_url

    path = str(sqlite_path(uri))
    # With the driver named, MLflow makes no folder of the name that has the percent signs in it.
    quoted = path.replace("%", "%25").replace("?", "%3F")
    for candidate in (f"sqlite:///{path}", f"sqlite+pysqlite:///{quoted}"):
        if make_url(candidate).database == path:
            return candidate
    raise TrackingError(f"tracking store {path}: this version of SQLAlchemy takes no '?' in a path. Set tracking.uri")


def redact(text: str) -> str:
    """Remove credentials from the URLs in a text: `user:password@`, and query parameters that look like secrets."""
    text = re.sub(r"(?<=://)[^/@\s'\"]+@", "***@", text)
    return re.sub(r"(?i)([?&][^=&\s]*(?:password|secret|token|key|signature)[^=&\s]*=)[^&\s'\"]+", r"\1***", text)


def _error(error: BaseException, *, uri: str, timeout_seconds: float) -> TrackingError:
    """One line: address, cause, remedy."""
    causes = list(_chain(error))
    names = {type(cause).__name__ for cause in causes}
    system = next((cause for cause in causes if isinstance(cause, OSError) and cause.errno and cause.strerror), None)
    kind = TrackingError if uri.startswith("sqlite") else TrackingAway
    if names & {"ReadTimeout", "ConnectTimeout", "ReadTimeoutError", "ConnectTimeoutError", "TimeoutError"}:
        cause, remedy = f"no answer within {timeout_seconds:g} s", "Check that the server is well"
    elif names & {"NameResolutionError", "gaierror"}:
        cause, remedy = "no such host", "Check the address"
    elif system is not None:
        cause, remedy = system.strerror, "Check the address and that the server runs"
    else:
        cause, remedy = " ".join(str(error).split())[:400], "Check the server's log"
        # What a proxy says of a server behind it that is gone.
        if not re.search(r"error code 50[234]\b", cause):
            kind = TrackingError
        if "out-of-date database schema" in cause:
            remedy = "Back up the database, then run `mlflow db upgrade` on it"
        elif "PERMISSION_DENIED" in cause or "401" in cause or "403" in cause:
            remedy = "Set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        elif "RESOURCE_DOES_NOT_EXIST" in cause or "not found" in cause:
            remedy = "It was deleted, or this is another MLflow: check tracking.uri"
        elif "deleted" in cause:
            remedy = "Restore it in MLflow"
    return kind(redact(f"MLflow at {uri}: {cause}. {remedy}, or set tracking.uri (or MLFLOW_TRACKING_URI)"))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it; requests and urllib3 keep causes in `args` and `reason`."""
    waiting, seen = [error], set()
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        linked = [current.__cause__, current.__context__, getattr(current, "reason", None), *current.args]
        waiting += [link for link in linked if isinstance(link, BaseException)]
