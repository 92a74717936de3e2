"""`raynium chaos`. Thin, and heavy imports are inside."""

import shutil
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from raynium.cli.checks import print_table
from raynium.cli.config import ConfigArgument, OverridesArgument


def chaos(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    faults: Annotated[int, Option(min=1, help="How many happen.")] = 200,
    seed: Annotated[int, Option(min=0, help="Of the schedule: the same faults at the same steps.")] = 1,
) -> None:
    """Train a config under faults, and show that nothing is lost.

    Trains it once without faults and once while processes are killed or stopped and the store, MLflow and the disk
    fail, all on this machine; says what each fault cost; and compares the two runs. A run of several CPU nodes gets a
    cluster of loopback nodes here, which are lost, cut off and drained. Ends with 1 unless weights and losses are
    bit-equal, no point in MLflow is lost or doubled, no checkpoint is bad, and the ledger sums to the wall time. It is
    meant for a short run: try `train.steps` of some hundred, with a checkpoint every few.
    """
    from raynium.chaos.soak import soak
    from raynium.config.load import load_config
    from raynium.config.local_folders import scratch_folder
    from raynium.convert.beginning import describe

    loaded = load_config(config, overrides or [], describe=describe)
    (kept := scratch_folder() / "chaos").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{loaded.run.name}-", dir=kept))
    found = soak(loaded, faults=faults, seed=seed, folder=folder, tell=_tell)
    if found.happened:
        typer.echo("")
        print_table(("fault", "times", "median s", "worst s", "most steps again"), found.table())
    typer.echo("")
    for claim in found.claims:
        typer.echo(f"{'ok' if claim.holds else 'NO':3} {claim.text}")
    if found.passed:
        shutil.rmtree(folder)
    else:
        typer.echo(f"the drivers' output and every step's loss: {folder}")
        raise typer.Exit(1)


def _tell(line: str) -> None:
    typer.echo(f"{datetime.now():%H:%M:%S} {line}")
