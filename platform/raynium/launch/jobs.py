"""Ray jobs: how a run reaches a cluster, and what runs there."""

import contextlib
import logging
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import raynium
from raynium.config.local_folders import temporary_parent
from raynium.config.proxies import astray, proxy_for, spare_loopback
from raynium.errors import LaunchError
from raynium.launch.job_metadata import SUPERVISED, job_metadata
from raynium.launch.ray_environment import find_token, the_named_address
from raynium.storage.own_folder import temporary_folder
from raynium.terminal.streams import print_in_any_locale
from raynium.tracking.provenance import origin_tags

# `ray job stop` sends SIGTERM, and SIGKILL this long after (Ray's default: 3 s): time for a checkpoint.
STOP_WAIT_SECONDS = 600

ADDRESS_REMEDY = (
    "Give the address of its dashboard (`ray start --head` prints it), and if it asks for a token put that into "
    "RAY_AUTH_TOKEN or ~/.ray/auth_token"
)


def connect_jobs(address: str) -> Any:
    """A Ray JobSubmissionClient of `address`, whatever the environment names.

    Raises LaunchError if nothing answers there, the token is refused, or it would go elsewhere too.
    """
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient
    from requests import RequestException

    spare_loopback()
    token = find_token()
    if token and (problem := astray(address, "the cluster's token")) is not None:
        raise LaunchError(problem)
    try:
        with the_named_address():
            return JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"} if token else None)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        answer = error.response if isinstance(error, RequestException) else None
        if answer is None:
            words = str(error).splitlines()[0].rstrip(".")
            raise LaunchError(f"cannot reach a Ray cluster at {address}: {words}. {ADDRESS_REMEDY}") from error
        told = f"cannot reach a Ray cluster at {address}: {answer.status_code} {answer.reason}"
        if (proxy := proxy_for(address)) is not None:
            host = urlsplit(address).hostname
            raise LaunchError(f"{told}, from the proxy {proxy}. Add {host} to NO_PROXY") from error
        raise LaunchError(
            f"{told}. That is the word of a proxy in front of it, or of something else there: see whether the cluster "
            "runs, and give the address of its dashboard (`ray start --head` prints it)"
        ) from error


def runtime_env(working_dir: str) -> dict[str, Any]:
    """What a job takes along: its folder, and this very package, so that the cluster runs the code that was checked.

    The same as `cluster/runtime_env.yaml`, for code that runs outside a checkout.
    """
    return {
        "working_dir": working_dir,
        "py_modules": [str(Path(raynium.__file__).parent)],
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_SECONDS)},
    }


@contextlib.contextmanager
def _without_rays_notes() -> Iterator[None]:
    """Ray notes each upload on the terminal, in its own form and colours; its warnings are let through."""
    levels = {handler: handler.level for handler in logging.getLogger("ray").handlers}
    for handler, level in levels.items():
        handler.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        for handler, level in levels.items():
            handler.setLevel(level)


def submit_job(client: Any, name: str, config_yaml: str, *, run_url: str, supervised: bool = False) -> str:
    """Starts a resolved config as a job of the run at `run_url`; returns its submission id.

    supervised: see `run.record.claim`.
    """
    supervision = {SUPERVISED: "yes"} if supervised else {}
    with _without_rays_notes(), temporary_folder("job") as folder:
        (folder / "config.yaml").write_text(config_yaml, encoding="utf-8")
        return client.submit_job(
            # By exec, signals reach Python and not a shell.
            entrypoint="exec python -m raynium.launch.jobs config.yaml",
            submission_id=f"raynium-{name}-{secrets.token_hex(3)}",
            runtime_env=runtime_env(str(folder)),
            # The job's folder is a copy without .git, its user the cluster's: say where it came from while we know.
            metadata={"run": name, "run_url": run_url, **origin_tags(Path.cwd()), **supervision},
        )


def main(arguments: list[str] | None = None) -> None:
    """A job's driver: `CONFIG [key=value …]`, on the cluster it runs in. Exits with 1 and the reason on failure.

    A job whose run was stopped did as it was asked: a success. Outside a job it exits as `raynium train` does.
    """
    from raynium.config.load import load_config
    from raynium.convert.beginning import describe
    from raynium.errors import ClusterLost, RayniumError
    from raynium.launch.run import run
    from raynium.terminal.report import exit_code, report_lines

    print_in_any_locale()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if arguments is None:
        arguments = sys.argv[1:]
    if not arguments:
        sys.exit("error: no config given: name a YAML job file or a preset, then overrides such as train.steps=200")
    config, *overrides = arguments
    metadata = job_metadata()
    job_id = metadata.get("job_submission_id")
    tags = {name: value for name, value in metadata.items() if "git." in name or name.startswith("mlflow.")}
    if job_id:
        tags["mlflow.source.type"] = "JOB"
    try:
        loaded = load_config(config, overrides, describe=describe)
        if job_id:
            # Ray 2.60 removes the job's folder under us when the driver connects.
            os.chdir(temporary_parent())
        record = run(loaded, address="auto" if job_id else None, job_id=job_id, tags=tags)
    except ClusterLost as error:
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        os._exit(1)
    except RayniumError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write("\n".join(report_lines(record)) + "\n")
    if not job_id and (code := exit_code(record)):
        sys.exit(code)


if __name__ == "__main__":
    main()
