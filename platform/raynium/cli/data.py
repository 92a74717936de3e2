"""The `raynium data` commands. Thin, and everything heavy is imported inside, as in `cli/app.py`."""

from enum import StrEnum
from typing import Annotated

import typer
from typer import Argument, Option

from raynium.cli.names import RootOption

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Build document stores, and look at them.")


class Dedup(StrEnum):
    none = "none"
    exact = "exact"


class TrainOn(StrEnum):
    all = "all"
    last = "last"


StoreArgument = Annotated[
    str, Argument(metavar="STORE", help="A path or URL, or a name: of what lies at <root>/data/<name>.")
]


@app.command()
def build(
    store: StoreArgument,
    sources: Annotated[
        list[str], Option("--from", help="Folder, file, glob or s3:// URL of text; as in data.source. May be repeated.")
    ],
    tokenizer: Annotated[str | None, Option(help="A tokenizer.json, or a model's folder that holds one.")] = None,
    text_field: Annotated[str, Option(help="Where a record has its text; a.b is b in the object a.")] = "text",
    records: Annotated[
        str, Option(help="text, chats, completions, preferences or package.module:Class, as data.records.")
    ] = "text",
    field: Annotated[
        list[str] | None,
        Option(metavar="NAME=COLUMN[,COLUMN]", help="Where a record has a field, as data.fields. May be repeated."),
    ] = None,
    chat_template: Annotated[
        str | None, Option(help="A Jinja file, or chatml; without it, the template that lies with the tokenizer.")
    ] = None,
    train_on: Annotated[TrainOn, Option(help="Of a chat's assistant turns, those that are learned.")] = TrainOn.all,
    aws_profile: Annotated[
        str | None, Option(help="Of the AWS configuration on each node, for text in another account.")
    ] = None,
    end_of_document: Annotated[
        str | None, Option(help="The token that ends a document, where the tokenizer's files do not say.")
    ] = None,
    dedup: Annotated[Dedup, Option(help="exact: of equal documents keep the first alone.")] = Dedup.none,
    heldout_fraction: Annotated[
        float, Option(min=0, max=1, help="Share of documents to evaluate on, more than 0 and less than 1.")
    ] = 0.05,
    max_left_out: Annotated[float, Option(min=0, max=1, help="Largest share of text that may be unreadable.")] = 0.1,
    root: RootOption = "runs",
    address: Annotated[str | None, Option(help="Ray cluster, e.g. auto. Default: one started here.")] = None,
) -> None:
    """Tokenise text into a document store, on all CPUs of a Ray cluster.

    Whatever ends it, the same command goes on where it was. The store's bytes do not depend on the number of CPUs. For
    example:

    raynium data build web --from 's3://bucket/web/*.jsonl.zst' --tokenizer ./qwen3

    raynium data build talk --from chats.jsonl --records chats --tokenizer ./qwen3
    """
    from raynium.data.build.show import describe
    from raynium.launch.data.build import build_data, store_place

    build_data(
        store,
        sources=sources,
        tokenizer=tokenizer,
        text_field=text_field,
        records=records,
        fields=_fields(field or []),
        chat_template=chat_template,
        train_on=train_on.value,
        aws_profile=aws_profile,
        end_of_document=end_of_document,
        dedup=dedup.value,
        heldout_fraction=heldout_fraction,
        max_left_out=max_left_out,
        root=root,
        address=address,
        tell=typer.echo,
    )
    _print_rows([("store", store_place(store, root)), *describe(store_place(store, root))])


@app.command()
def show(store: StoreArgument, root: RootOption = "runs") -> None:
    """Say what a document store holds: documents, tokens, lengths, what was left out, and how some documents begin.

    For example: raynium data show web
    """
    from raynium.data.build.show import describe
    from raynium.launch.data.build import store_place

    _print_rows(describe(store_place(store, root)))


def _fields(given: list[str]) -> dict[str, list[str]]:
    pairs = [each.partition("=") for each in given]
    if wrong := [name for name, equals, columns in pairs if not (name and equals and columns)]:
        raise typer.BadParameter(f"{wrong[0]!r} is no NAME=COLUMN, as messages=conversations", param_hint="--field")
    return {name: columns.split(",") for name, _, columns in pairs}


def _print_rows(rows: list[tuple[str, str]]) -> None:
    for name, value in rows:
        typer.echo(f"{name:16} {value}")


@app.command()
def verify(store: StoreArgument, root: RootOption = "runs") -> None:
    """Read every byte of a document store and compare checksums.

    Names each damaged range of each file, and exits with 1 if there is one. For example:

    raynium data verify s3://bucket/stores/wikipedia
    """
    from raynium.data.verify import verify_store
    from raynium.launch.data.build import store_place

    place = store_place(store, root)
    manifest = verify_store(place)
    num_bytes = sum(file.size_bytes for file in manifest.files)
    typer.echo(
        f"{place} is whole: {len(manifest.files)} files, {num_bytes / 1e6:,.1f} MB, all checksums right; "
        f"identity {manifest.identity}"
    )
