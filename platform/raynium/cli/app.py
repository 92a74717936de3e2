"""The `raynium` command. Thin: each command parses, calls one function, and prints.

`raynium --help` must answer in 0.3 s, so everything heavy is imported inside the commands.
"""

import errno
import os
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from raynium.cli import chaos as cli_chaos
from raynium.cli import checkpoints as cli_checkpoints
from raynium.cli import checks as cli_checks
from raynium.cli import cluster as cli_cluster
from raynium.cli import config as cli_config
from raynium.cli import data as cli_data
from raynium.cli import generation as cli_generation
from raynium.cli.config import ConfigArgument, OverridesArgument
from raynium.cli.names import JsonOption, RootOption, RunArgument, print_json
from raynium.errors import ClusterLost, ConfigError, LaunchError, RayniumError, StoreError
from raynium.terminal.streams import print_in_any_locale

if TYPE_CHECKING:
    from raynium.sdk import Run

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Plain help: rich would cost 0.1 s.
    rich_markup_mode=None,
    help="Train large language models on AWS Trainium, on CUDA machines, or right here.",
)

# Columns of a terminal beside whose other columns the causes in `raynium runs` can be read.
WIDE = 120

DashboardOption = Annotated[
    str, Option(help="Dashboard of the Ray cluster.", envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"])
]
DASHBOARD = "http://127.0.0.1:8265"


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        _print(f"raynium {version('raynium')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command(epilog="Example: raynium train quickstart train.steps=200 run.name=first")
def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    address: Annotated[
        str | None, Option(help="Ray cluster to train on, e.g. auto. Default: one started here.")
    ] = None,
) -> None:
    """Train here and now.

    Prepares the data, trains, evaluates, and ends with text from the model. Ctrl-C saves a checkpoint and ends; the
    same command goes on from it, also after a crash. Exits with 0 once the run has finished; else with 130 after
    Ctrl-C, 143 after SIGTERM, 3 after `raynium stop`, 1 after a failure, 2 for a mistake in the config.
    """
    from raynium.config.load import load_config
    from raynium.convert.beginning import describe
    from raynium.launch.run import run
    from raynium.terminal.report import exit_code, report_lines

    try:
        record = run(load_config(config, overrides or [], describe=describe), address=address)
    except KeyboardInterrupt:
        _print("interrupted: the same command goes on from the newest checkpoint")
        raise typer.Exit(130) from None
    _print(*report_lines(record))
    raise typer.Exit(exit_code(record))


@app.command(epilog="Example: raynium submit job.yaml run.name=first --address http://10.0.0.1:8265 --wait")
def submit(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    address: DashboardOption = DASHBOARD,
    wait: Annotated[bool, Option("--wait", help="Print the log as it comes, until the run has ended.")] = False,
) -> None:
    """Check a job file, then start it as a job of a Ray cluster.

    With --wait the exit code is that of `raynium train`; Ctrl-C then ends the command and not the run.
    """
    from raynium.sdk import Client
    from raynium.terminal.report import exit_code

    run = Client(address).submit(config, overrides or [])
    _print(f"run {run.name} is job {run.job_id}", f"it writes to {run.url}")
    if wait:
        try:
            _follow(run)
            raise typer.Exit(exit_code(run.wait()))
        except KeyboardInterrupt:
            _print(
                f"no longer waiting: the run goes on. `raynium logs -f {run.name}` follows it, `raynium stop` ends it"
            )
            raise typer.Exit(130) from None


@app.command(epilog="Example: raynium runs --root s3://bucket/runs --json")
def runs(root: RootOption = "runs", as_json: JsonOption = False) -> None:
    """List the runs under a root, newest first."""
    from raynium.launch.page import end_abandoned_pages
    from raynium.sdk import list_runs
    from raynium.terminal.report import record_json, table_row

    records = list_runs(root)
    end_abandoned_pages(records)
    if as_json:
        print_json([record_json(record, time.time()) for record in records])
        return
    from rich.console import Console
    from rich.table import Column, Table

    # For grep, a run is one line.
    console = Console(width=None if sys.stdout.isatty() else 1000, highlight=False, markup=False)
    rows = [table_row(record, time.time()) for record in records]
    if not rows:
        _print(f"no runs under {root}")
        return
    columns = [Column("run", overflow="fold"), "state", "step", "held-out", "created"]
    fits = console.width >= WIDE
    table = Table(*columns, *([Column("cause", overflow="fold")] if fits else []), box=None)
    for row in rows:
        table.add_row(*row[: len(table.columns)])
    console.print(table)
    for name, *_, cause in rows if not fits else []:
        if cause:
            console.print(f"{name}: {cause}")


@app.command(epilog="Example: raynium status first --json")
def status(name: RunArgument, root: RootOption = "runs", as_json: JsonOption = False) -> None:
    """Show one run: state, metrics, checkpoints, page."""
    from raynium.launch.page import end_abandoned_pages
    from raynium.sdk import find_run
    from raynium.terminal.report import record_json, report_lines

    run = find_run(name, root)
    record = run.record()
    end_abandoned_pages([record])
    if as_json:
        facts = {"checkpoints": cli_checkpoints.summaries_json(run.checkpoints(), run.retention())}
        print_json(record_json(record, time.time()) | facts)
        return
    _print(*report_lines(record))
    for key, value in sorted((record.metrics or {}).items()):
        _print(f"  {key:42} {value:,.6g}")
    for each in run.checkpoints():
        _print(f"  checkpoint of step {each.step:,}: {each.num_bytes / 1e6:,.1f} MB{_problem(each.problem)}")


@app.command(epilog="Example: raynium logs first -f")
def logs(
    name: RunArgument,
    root: RootOption = "runs",
    follow: Annotated[bool, Option("--follow", "-f", help="Go on until the run has ended.")] = False,
    ranks: Annotated[bool, Option("--ranks", help="The ranks' output on this host instead.")] = False,
    address: DashboardOption = DASHBOARD,
) -> None:
    """Print what a run's driver has printed.

    That of a submitted run comes from its cluster; once that is gone, from the driver's disk, if it is this machine's.
    """
    from raynium.sdk import Client, Run, find_run

    if ranks and follow:
        raise typer.BadParameter("--follow is for the driver's log: leave out --ranks, or look at these again later")
    run = find_run(name, root)
    job_id = run.record().job_id
    if ranks:
        _print(run.logs(of="ranks").rstrip())
        return
    run = Run(run.name, run.url, Client(address), job_id) if job_id else run
    if follow:
        _follow(run)
    else:
        _print(run.logs().rstrip())


@app.command(epilog="Example: raynium stop first --no-wait")
def stop(
    name: RunArgument,
    root: RootOption = "runs",
    wait: Annotated[bool, Option("--wait/--no-wait", help="Stay until it has stopped.")] = True,
) -> None:
    """Have a run save a checkpoint at its next step and end."""
    from raynium.sdk import find_run
    from raynium.terminal.report import report_lines

    run = find_run(name, root)
    record, now = run.record(), time.time()
    if not record.owner_is_alive(now):
        _print(f"run {name} does not run: it is {record.shown_state(now)} at step {record.step:,}")
        if record.job_id is not None and record.is_orphaned(now):
            run.stop()
            _print("no supervisor starts it again; start or submit it yourself, and it goes on")
        return
    run.stop()
    _print(f"asked run {name} to save and end")
    if wait:
        _print(*report_lines(run.wait()))


@app.command(epilog="Example: raynium ui first --port 5001")
def ui(
    name: Annotated[str | None, Argument(help="A run to print the page of.")] = None,
    root: RootOption = "runs",
    port: Annotated[int, Option(min=1, max=65535, help="Port of the MLflow UI.")] = 5000,
) -> None:
    """Serve the MLflow UI of the runs under a root.

    On this machine only: nothing asks who is looking.
    """
    from raynium.config.paths import absolute_root
    from raynium.launch.page import end_abandoned_pages
    from raynium.rank.ports import is_free
    from raynium.sdk import find_run, list_runs
    from raynium.storage.local_files import look
    from raynium.terminal.report import ui_lines, ui_port
    from raynium.tracking.client import sqlite_path
    from raynium.tracking.runs import home_url, resolve_uri, ui_command, ui_environment

    record = find_run(name, root).record() if name else None
    uri = (record.mlflow_uri if record else None) or resolve_uri(None, absolute_root(root))
    page = ui_lines(record, port)[0] if record is not None else None
    if record is not None:
        end_abandoned_pages([record])
    if uri.startswith("http"):
        _print(page or f"MLflow: {home_url(uri)}")
        return
    if not look(sqlite_path(uri).exists):
        raise StoreError(f"there is no {sqlite_path(uri)} yet: runs under {root} have tracked nothing there")
    if not is_free("127.0.0.1", port):
        raise LaunchError(
            f"port {port} of 127.0.0.1 is in use, perhaps by another `raynium ui`: end that, or give a free port, such "
            f"as --port {ui_port()}"
        )
    if record is None:
        end_abandoned_pages(list_runs(root))
    _print(page or f"MLflow: {home_url(f'http://127.0.0.1:{port}')}")
    sys.stdout.flush()
    command = ui_command(uri, host="127.0.0.1", port=port)
    os.execve(command[0], command, ui_environment())


@app.command(epilog="Example: raynium supervisor --root s3://bucket/runs")
def supervisor(
    roots: Annotated[
        list[str], Option("--root", help="Folder or URL that holds runs; may be given again.", envvar="RAYNIUM_ROOT")
    ],
    address: DashboardOption = DASHBOARD,
    once: Annotated[bool, Option("--once", help="Look once, for cron.")] = False,
) -> None:
    """Start again what died with its driver or cluster.

    Runs on a cluster's head, for submitted runs: same run, same MLflow page, from the newest checkpoint. What a person
    stopped, what failed by itself, and what `raynium train` started stays as it is.
    """
    from raynium.config.paths import absolute_root
    from raynium.launch.supervisor import Supervisor

    def tell(line: str) -> None:
        _print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")
        sys.stdout.flush()

    found = Supervisor([absolute_root(root) for root in roots], address=address, tell=tell)
    found.look() if once else found.serve()


app.command(epilog='Example: raynium sample first@400 "def main(" --temperature 0')(cli_generation.sample)
app.command(epilog='Example: raynium chat my-sft --system "Answer in one sentence."')(cli_generation.chat)
app.command(epilog="Example: raynium evaluate first --task arc.jsonl")(cli_generation.evaluate)
app.command(epilog="Example: raynium init mine --preset llama3-1b data.source=my-text")(cli_config.init)
app.command(epilog="Example: raynium config train.steps; raynium config --diff llama3-8b")(cli_config.config)
app.command(epilog="Example: raynium presets")(cli_config.presets)
app.command(epilog="Example: raynium doctor --json")(cli_checks.doctor)
app.command(epilog="Example: raynium preflight job.yaml --address auto")(cli_checks.preflight)
app.command(epilog="Example: raynium chaos quickstart --faults 12 train.steps=650")(cli_chaos.chaos)
app.add_typer(cli_checkpoints.app, name="checkpoints")
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_cluster.app, name="cluster")


def main() -> None:
    """Runs the command line. A mistake of the user's ends in one message, not in a traceback."""
    print_in_any_locale()
    try:
        app(prog_name="raynium")
    except ConfigError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)
    except ClusterLost as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        os._exit(1)
    except RayniumError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(1)
    except OSError as error:
        # A file says its name; the standard output has none. (A pipe that nobody reads any more is click's.)
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        typer.secho("error: no space is left where the output goes", fg="red", err=True)
        # Not sys.exit: what is still in the buffer would fail once more.
        os._exit(1)


def _problem(problem: str | None) -> str:
    return f" (damaged: {problem})" if problem else ""


def _follow(run: "Run") -> None:
    for text in run.follow():
        typer.echo(text, nl=False)
        sys.stdout.flush()


def _print(*lines: str) -> None:
    for line in lines:
        typer.echo(line)


if __name__ == "__main__":
    main()
