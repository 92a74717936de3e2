"""A Ray cluster that runs are submitted to, and stores are built on."""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raynium.errors import ConfigError, LaunchError
from raynium.sdk.run import Run

if TYPE_CHECKING:
    from raynium.config.schema import Config
    from raynium.data.manifest import StoreManifest

logger = logging.getLogger(__name__)


class Client:
    """A Ray cluster, by the address of its dashboard (`http://127.0.0.1:8265`).

    If the cluster asks for a token, it is read from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
    Raises LaunchError for another kind of address; whether the cluster answers is seen when it is asked.
    """

    def __init__(self, address: str):
        # Ray would take another kind of address, and wait for it.
        if not address.startswith(("http://", "https://")):
            raise LaunchError(
                f"{address!r} is not the address of a Ray dashboard: it begins with http:// or https://, as in "
                f"http://127.0.0.1:8265 (`ray start --head` prints it)"
            )
        self.address = address
        self._jobs: Any = None

    def submit(
        self,
        config: str | Path | Mapping[str, Any],
        overrides: Mapping[str, Any] | Sequence[str] = (),
        *,
        name: str | None = None,
    ) -> Run:
        """Checks a job file, then starts it as a job of the cluster; returns at once.

        config: a YAML file, the name of a preset, or what such a file holds, as nested dicts. Raises ConfigError with
        every problem, RunInUse while a live run has this name, LaunchError if the cluster cannot be reached. Nothing
        is started then.
        """
        from raynium.config.load import dump_yaml
        from raynium.launch.jobs import submit_job
        from raynium.launch.preparation import checked
        from raynium.run.past import Past

        resolved = checked(_loaded(config, _with_name(overrides, name)))
        past = Past.read(resolved)
        past.refuse_live()
        past.check_resume(resolved)
        job_id = self._ask(
            lambda jobs: submit_job(jobs, resolved.run.name, dump_yaml(resolved), run_url=past.store.url)
        )
        return Run(resolved.run.name, past.store.url, self, job_id)

    def job_state(self, job_id: str) -> str:
        """Ray's word: PENDING, RUNNING, SUCCEEDED, STOPPED or FAILED."""
        return self._ask(lambda jobs: str(jobs.get_job_status(job_id).value))

    def job_logs(self, job_id: str) -> str:
        """All output of the job's driver so far."""
        return self._ask(lambda jobs: str(jobs.get_job_logs(job_id)))

    def _ask(self, question: Callable[[Any], str]) -> str:
        """The answer of Ray's JobSubmissionClient. Raises LaunchError if there is none."""
        jobs = self._connected()
        try:
            return question(jobs)
        except (OSError, RuntimeError) as error:
            # What its HTTP library raises, and Ray for an answer other than 200.
            raise LaunchError(f"the Ray cluster at {self.address} did not do what it was asked: {error}") from error

    def _connected(self) -> Any:
        if self._jobs is None:
            from raynium.launch.jobs import connect_jobs

            self._jobs = connect_jobs(self.address)
        return self._jobs


def build_data(
    store: str, sources: Sequence[str], *, tokenizer: str, root: str | Path = "runs", **options: Any
) -> "StoreManifest":
    """Tokenises text into the document store of this name, path or URL, and waits for it.

    options: of `raynium data build` (text_field, end_of_document, dedup, heldout_fraction, max_left_out, address).
    Raises ConfigError, DataError, LaunchError.
    """
    from raynium.launch.data.build import build_data

    return build_data(store, sources=sources, tokenizer=tokenizer, root=str(root), tell=logger.info, **options)


def _loaded(config: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | Sequence[str]) -> "Config":
    from raynium.config.load import load_config, parse_config
    from raynium.convert.beginning import describe

    if not isinstance(config, Mapping):
        return load_config(config, overrides, describe=describe)
    try:
        # Python values take the road of text, so that both are judged by the same rules.
        text = json.dumps(config, default=os.fspath)
    except (TypeError, ValueError) as error:
        raise ConfigError([f"the config holds what no job file can hold: {error}"]) from error
    return parse_config(text, overrides, describe=describe)


def _with_name(overrides: Mapping[str, Any] | Sequence[str], name: str | None) -> Mapping[str, Any] | Sequence[str]:
    """The overrides with `run.name` laid over them; they are judged by `load_config`."""
    if name is None or isinstance(overrides, str):
        return overrides
    if isinstance(overrides, Mapping):
        return {**overrides, "run.name": name}
    return [*overrides, f"run.name={name}"]
