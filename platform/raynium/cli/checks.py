"""The commands that look at machines: `raynium doctor` and `raynium preflight`. Thin, and heavy imports are inside."""

import json
import sys
from typing import Annotated

import typer
from typer import Option

from raynium.cli.config import ConfigArgument, OverridesArgument
from raynium.cli.names import JsonOption

MARKS = {"ok": "ok", "warning": "warning", "failed": "FAILED", "skipped": "-"}


def doctor(
    as_json: JsonOption = False,
    clean: Annotated[bool, Option("--clean", help="First remove what your killed processes have left here.")] = False,
) -> None:
    """Say what this machine can train on, and what it lacks.

    Ends with 1 if something is wrong.

    --clean ends compilers and removes snapshots in memory, Ray's sessions and sockets of runs that were killed. Nothing
    of a process that lives is touched.
    """
    from raynium.health.doctor import examine
    from raynium.health.host import ThisHost
    from raynium.node.scratch import clean_up

    if clean:
        for line in clean_up():
            _to_stderr(line)
    found = examine(ThisHost(), python=sys.version_info[:3])
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
    else:
        typer.echo(f"{found.machine}: {found.chosen or 'nothing'} is what cluster.accelerator=auto takes\n")
        for each in found.findings:
            typer.echo(f"{'can use' if each.usable else 'cannot use':10} {each.accelerator}")
            for reason in each.reasons:
                typer.echo(f"           {reason}")
        typer.echo("")
        rows = [(each.name, MARKS[each.status], _text(each.found, each.remedy)) for each in found.checks]
        print_table(("check", "", "found"), rows)
    if not found.is_well:
        raise typer.Exit(1)


def preflight(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    address: Annotated[str | None, Option(help="Ray cluster to check, e.g. auto. Default: one started here.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check every node of a cluster before a job file is run.

    Devices, driver, memory, disks, storage, a matrix product per core, and all-reduces within and between the nodes.
    Ends with 1 if the run could not start.
    """
    from raynium.config.load import load_config
    from raynium.convert.beginning import describe
    from raynium.launch.run_preflight import run_preflight

    report = run_preflight(load_config(config, overrides or [], describe=describe), address=address, tell=_to_stderr)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        rows = [(where, check, MARKS[status], text) for where, check, status, text in report.rows()]
        print_table(("node", "check", "", "found"), rows)
        typer.echo(report.summary())
    if (refusal := report.refusal()) is not None:
        typer.secho(f"error: {refusal}", fg="red", err=True)
        raise typer.Exit(1)


def print_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Long cells wrap on a terminal; in a file every row is one line."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 2000)
    table = Table(*head, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _text(found: str, remedy: str) -> str:
    return f"{found}; {remedy}" if remedy else found


def _to_stderr(line: str) -> None:
    typer.echo(line, err=True)
