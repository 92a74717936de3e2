"""The commands about job files, and what a shell completes. Thin, and heavy imports are inside, as in `cli/app.py`."""

from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Annotated, get_args

import typer
from typer import Argument, Option


def complete_config(incomplete: str) -> Iterator[str]:
    """Presets and YAML files that begin so."""
    from raynium.config.load import preset_names

    yield from (name for name in preset_names() if name.startswith(incomplete))
    yield from sorted(glob(incomplete + "*.y*ml"))


def complete_field(incomplete: str) -> Iterator[tuple[str, str]]:
    """Sections and fields that begin so."""
    from raynium.config.fields import BUILDS_ON, schema_fields

    meanings = {name: field.meaning for name, field in schema_fields().items()} | BUILDS_ON
    yield from ((name, text) for name, text in meanings.items() if name.startswith(incomplete))


def complete_override(ctx: typer.Context, incomplete: str) -> Iterator[tuple[str, str]]:
    """`key=` of fields that begin so; after it, the values of a field that has a list of them."""
    from raynium.config.fields import schema_fields
    from raynium.config.load import preset_names

    fields = [*(name for name, field in schema_fields().items() if not field.is_section), "model.preset"]
    # bash splits words at "=", and replaces the last part by what is completed: `engine.kind`, `=`, `nat`. While that
    # part is empty, click leaves out the "=".
    words = [word for word in ctx.params.get("overrides") or [] if word != "="]
    was_split = (ctx.params.get("overrides") or [""])[-1] in ("=", *fields)
    key, equals, value = (words[-1], "=", incomplete) if was_split else incomplete.partition("=")
    if not equals:
        yield from ((f"{name}=", text) for name, text in complete_field(key) if name in fields)
        return
    known = schema_fields().get(key)
    choices = preset_names() if key == "model.preset" else get_args(known.type) if known else ()
    for choice in choices:
        if isinstance(choice, str) and choice.startswith(value):
            yield choice if was_split else f"{key}={choice}", ""


ConfigArgument = Annotated[
    str,
    Argument(
        help="A YAML job file, or the name of a preset (quickstart, llama3-8b, …).", autocompletion=complete_config
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    Argument(help="Dotted overrides, e.g. train.steps=200 run.name=first", autocompletion=complete_override),
]


def config(
    name: Annotated[str, Argument(help="A section or field. Default: all.", autocompletion=complete_field)] = "",
    diff: Annotated[
        str | None, Option(metavar="FILE", help="What a job file or preset changes.", autocompletion=complete_config)
    ] = None,
    markdown: Annotated[bool, Option("--markdown", help="All, as docs/config.md has it.")] = False,
) -> None:
    """Explain the fields of a job file, or show what one changes."""
    from raynium.config.load import load_config
    from raynium.config.reference import difference_lines, reference, reference_markdown
    from raynium.convert.beginning import describe

    if diff is not None:
        lines = difference_lines(load_config(diff, describe=describe), name)
        typer.echo("\n".join(lines) or f"{name or diff} is as by default")
    else:
        typer.echo(reference_markdown() if markdown else reference(name), nl=not markdown)


def presets() -> None:
    """List the presets that job files can build on."""
    from raynium.config.load import preset_names, preset_path

    for name in preset_names():
        typer.echo(f"{name:16}{preset_path(name).read_text(encoding='utf-8').partition(chr(10))[0].lstrip('# ')}")


def init(
    name: Annotated[str, Argument(help="The run's name; the file is NAME.yaml in the current folder.")],
    overrides: OverridesArgument = None,
    preset: Annotated[str, Option(help="What it builds on.", autocompletion=complete_config)] = "quickstart",
) -> None:
    """Write a small, commented job file to start from."""
    from raynium.config.reference import starting_file
    from raynium.convert.beginning import describe
    from raynium.errors import ConfigError

    text = starting_file(name, preset, overrides or [], describe=describe)
    path = Path(f"{name}.yaml")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError([f"{path} exists and is left as it is: choose another name, or remove it"]) from None
    except OSError as error:
        raise ConfigError([f"{path} cannot be written: {error}; change to a folder that you may write"]) from error
    typer.echo(f"wrote {path}; edit it, then: raynium train {path}")
