"""The `raynium data` commands. Thin, and everything heavy is imported inside, as in `cli/app.py`."""

from typing import Annotated

import typer
from typer import Argument

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Check document stores.")


@app.callback()
def _group() -> None:
    """With one command only, typer would leave out its name."""


@app.command()
def verify(
    place: Annotated[str, Argument(metavar="PATH_OR_URL", help="The store's folder or s3:// URL, as in data.path.")],
) -> None:
    """Read every byte of a document store and compare checksums.

    Names each damaged range of each file, and exits with 1 if there is one. For example:

    raynium data verify s3://bucket/stores/wikipedia
    """
    from raynium.config.paths import absolute_path
    from raynium.data.verify import verify_store

    manifest = verify_store(absolute_path("PATH_OR_URL", place))
    num_bytes = sum(file.size_bytes for file in manifest.files)
    typer.echo(
        f"{place} is whole: {len(manifest.files)} files, {num_bytes / 1e6:,.1f} MB, all checksums right; "
        f"identity {manifest.identity}"
    )
