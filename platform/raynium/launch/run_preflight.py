"""A preflight, on its own (`raynium preflight`, `jobs/preflight.py`) and before a run (`driver.py`)."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from raynium.config.local_folders import temporary_parent
from raynium.config.schema import Config
from raynium.errors import LaunchError
from raynium.health.report import Report
from raynium.launch.preparation import checked
from raynium.launch.ray_environment import set_ray_environment
from raynium.launch.settle import check_this_machine, settled
from raynium.run.past import Past
from raynium.terminal.streams import print_in_any_locale

# For nodes to be there: an autoscaler needs minutes.
NODES_SECONDS = 600.0


def run_preflight(config: Config, *, address: str | None, tell: Callable[[str], None]) -> Report:
    """Checks every node of the Ray cluster at `address`, or of one started on this machine (None), for this config.

    Takes no run name and writes nothing that stays. Raises ConfigError, StoreError, and LaunchError if the nodes of
    the run do not come.
    """
    config = checked(config)
    saved = Past.read(config).config
    if address is None:
        check_this_machine(settled(config, cluster_resources=None, saved=saved))
    set_ray_environment(starts_cluster=address is None)
    tell("starting a Ray cluster on this machine" if address is None else f"joining the Ray cluster at {address}")
    from raynium.launch.connect import connect
    from raynium.launch.nodes import node_resources, patient, waiting_message
    from raynium.launch.preflight_cluster import check_nodes

    with leaving_no_folder(config.run.root), connect(address, least_cpus=config.cluster.ranks_per_node) as resources:
        config = settled(config, cluster_resources=resources if address is not None else None, saved=saved)
        until = time.monotonic() + NODES_SECONDS
        tell(f"checking every node that the run could take, for at most {config.preflight.seconds:g} s")
        report = check_nodes(
            config,
            resources=node_resources(config),
            level="all",
            wait=patient(config, go_on=lambda: time.monotonic() < until, tell=tell),
            tell=tell,
        )
        if report is None:
            raise LaunchError(
                f"nothing was checked within {NODES_SECONDS:g} s: {waiting_message(config) or 'no node answered'}"
            )
        return report


@contextlib.contextmanager
def leaving_no_folder(root: str) -> Iterator[None]:
    """A root that the storage check had to make, and that nobody else has used meanwhile, is taken away again."""
    folder = None if "://" in root else Path(root)
    made_here = folder is not None and not folder.exists()
    try:
        yield
    finally:
        if folder is not None and made_here and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def main(arguments: list[str] | None = None) -> None:
    """A job's driver: `CONFIG [key=value …]`, on the cluster it runs in. Exits with 1 if the run could not start."""
    from raynium.config.load import load_config
    from raynium.convert.beginning import describe
    from raynium.errors import RayniumError
    from raynium.launch.job_metadata import job_metadata

    print_in_any_locale()
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        sys.exit("error: no config given: name a YAML job file or a preset, then overrides such as cluster.nodes=4")
    config, *overrides = arguments
    is_job = bool(job_metadata())
    try:
        loaded = load_config(config, overrides, describe=describe)
        if is_job:
            # Ray 2.60 removes the job's folder under us when the driver connects.
            os.chdir(temporary_parent())
        report = run_preflight(loaded, address="auto" if is_job else None, tell=_write)
    except RayniumError as error:
        sys.exit(f"error: {error}")
    lines = ["\t".join(row) for row in report.rows()]
    sys.stdout.write("\n".join([*lines, report.summary(), json.dumps(report.to_json())]) + "\n")
    if (refusal := report.refusal()) is not None:
        sys.exit(f"error: {refusal}")


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
