"""Fills the compile cache before a run needs it: the run's own job for two steps and an evaluation, nothing kept.

It is a run of its own, with a name, an MLflow experiment and a folder of its own, which is removed at the end. Its
ranks are as many as the run's, since the collectives are part of the graphs; so it costs the run's nodes, but for the
compilation only, and once: the cache lies beside the runs. On torch-xla, too, these are real steps: AWS's
neuron_parallel_compile, which compiles extracted graphs side by side, is not used.
"""

import logging
import os
import secrets
import sys

from raynium.config.load import load_config
from raynium.config.local_folders import temporary_parent
from raynium.config.schema import Config
from raynium.convert.beginning import describe
from raynium.errors import ClusterLost, RayniumError, StoreError
from raynium.launch.job_metadata import job_metadata
from raynium.launch.preparation import checked
from raynium.launch.run import run
from raynium.node.compile_cache import FOLDER
from raynium.run.past import Past
from raynium.run.record import RunRecord
from raynium.storage.store import Store
from raynium.terminal.streams import print_in_any_locale

# As in train/compiles.py, WARM_UP_CALLS: after them every shape of training has been seen.
STEPS = 2


def precompile(config: Config, *, address: str | None, job_id: str | None = None) -> RunRecord:
    """Compiles what `config` will need, on the Ray cluster at `address` or on this machine (None).

    Touches neither the run's folder nor its MLflow run. Returns the record of the short run; RayniumError as `run`.
    """
    config = checked(config)
    short = short_config(config)
    try:
        return run(short, address=address, job_id=job_id)
    finally:
        try:
            Store(short.run.root).delete_prefix(short.run.name)
        except StoreError as error:
            logging.getLogger(__name__).warning("%s was left behind: %s", short.run.name, error)


def short_config(config: Config) -> Config:
    """The config of the short run: the same shapes in the same layout.

    config: from `checked`. All that a graph may depend on stays, such as the number of micro-batches in a step.
    """
    saved = Past.read(config).config
    dtype = config.engine.dtype
    if dtype == "auto" and saved is not None and "engine" in saved:
        # What the run will go on with; see launch/settle.py.
        dtype = saved["engine"]["dtype"]
    changes = {
        "run": {"name": f"{config.run.name[:45]}.precompile-{secrets.token_hex(3)}"},
        "engine": {"dtype": dtype},
        "optimizer": {"warmup_steps": 0},
        "train": {"steps": STEPS},
        "data": {"leave_out_steps": ()},
        "checkpoint": {"save": "never"},
        "fault": {"snapshot_every_steps": None},
        "evaluate": {"every_steps": STEPS, "max_documents": 1},
        "tracking": {"experiment": f"{config.tracking.experiment}-precompile"},
        "sample": {"prompts": ()},
    }
    sections = {name: getattr(config, name).model_copy(update=fields) for name, fields in changes.items()}
    return checked(config.model_copy(update=sections))


def summary(record: RunRecord) -> str:
    """What was compiled and where it is now, in a line."""
    metrics = record.metrics or {}
    graphs, seconds = (metrics.get(f"compile/{name}", 0.0) for name in ("graphs", "seconds"))
    if not graphs:
        return (
            "nothing was compiled: with engine.compile=none this accelerator runs operator by operator. "
            "Set engine.compile=block in the run's config and here"
        )
    root = Store(record.config["run"]["root"])
    sizes = root.list(FOLDER).sizes.values()
    made = f"{graphs:.0f} graphs in {seconds:.1f} s on rank 0"
    if not sizes:
        accelerator = record.config["cluster"]["accelerator"]
        return f"{made}, kept by nobody: executables of {accelerator!r} on this machine are not shared between nodes"
    return f"{made}; {root.uri(FOLDER)} holds {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB"


def main(arguments: list[str] | None = None) -> None:
    """A job's driver: `CONFIG [key=value …]`, as `jobs.main`. Exits with 1 and the reason on failure."""
    print_in_any_locale()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if arguments is None:
        arguments = sys.argv[1:]
    if not arguments:
        sys.exit("error: no config given: name the run's YAML job file or preset, and its overrides")
    path, *overrides = arguments
    job_id = job_metadata().get("job_submission_id")
    try:
        config = load_config(path, overrides, describe=describe)
        if job_id:
            os.chdir(temporary_parent())
        record = precompile(config, address="auto" if job_id else None, job_id=job_id)
        sys.stdout.write(summary(record) + "\n")
    except ClusterLost as error:
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        os._exit(1)
    except RayniumError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
