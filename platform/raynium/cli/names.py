"""How commands name runs and checkpoints, and print JSON: `first`, `first@400`."""

import json
from typing import Annotated, Any

import typer
from typer import Argument, Option

RootOption = Annotated[str, Option(help="Folder or URL that holds the runs.", envvar="RAYNIUM_ROOT")]
RunArgument = Annotated[str, Argument(metavar="RUN", help="The run's name.")]
CheckpointArgument = Annotated[
    str, Argument(metavar="RUN[@STEP]", help="A run's name, and a step if not its newest checkpoint's.")
]
StepOption = Annotated[int | None, Option(help="The same as RUN@STEP.")]
JsonOption = Annotated[bool, Option("--json", help="Print JSON instead of a table.")]


def split_name(text: str, step: int | None = None) -> tuple[str, int | None]:
    """(run, step) of `run` or `run@step`; None: its newest checkpoint. step: of --step."""
    name, at, digits = text.partition("@")
    if at and not digits.isdecimal():
        raise typer.BadParameter(f"{text!r} names no step: write {name}@1000, or {name} for its newest checkpoint")
    if at and step is not None and step != int(digits):
        raise typer.BadParameter(f"{text!r} and --step {step} name two checkpoints: give one of them")
    return name, int(digits) if at else step


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False))
