"""`raynium data build`: the tasks of a build on all nodes of a Ray cluster, or of one started on this machine."""

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Literal

from pydantic import ValidationError

from raynium.config.local_folders import temporary_parent
from raynium.config.paths import WORDS_FOR_SOURCE, WORDS_FOR_TEMPLATE, absolute_path, absolute_root, lies_in
from raynium.data.build.fit import refuse_unfit_tokens
from raynium.data.build.store_build import build_from_recipe
from raynium.data.manifest import Recipe, StoreManifest
from raynium.data.records.registry import records_of
from raynium.data.remote import find_manifest
from raynium.data.runner import Item, Result, Runner, Shared
from raynium.data.tokenizer import Tokenizer, beside
from raynium.errors import ConfigError
from raynium.launch.job_metadata import job_metadata
from raynium.launch.ray_environment import set_ray_environment
from raynium.planning.rules import STORE_NAME


def store_place(store: str, root: str) -> str:
    """The folder or URL of a store: a name lies at `<root>/data/<name>`, a path or URL is where it says.

    Raises ConfigError for what is neither, as that of an empty name.
    """
    if "/" in store or store in (".", "..", "~"):
        return absolute_path("the store", store)
    if not STORE_NAME.fullmatch(store):
        raise ConfigError(
            [
                f"the store is {store!r}: a name is 1 to 64 of letters, digits, '.', '_' and '-', the first a letter "
                "or digit; rename it, or give a path, which has a slash, as ./web"
            ]
        )
    return f"{absolute_root(root).rstrip('/')}/data/{store}"


def build_data(
    store: str,
    *,
    sources: Sequence[str],
    tokenizer: str | None,
    text_field: str = "text",
    records: str = "text",
    fields: Mapping[str, Sequence[str]] | None = None,
    chat_template: str | None = None,
    train_on: Literal["all", "last"] = "all",
    aws_profile: str | None = None,
    end_of_document: str | None = None,
    dedup: Literal["none", "exact"] = "none",
    heldout_fraction: float = 0.05,
    max_left_out: float = 0.1,
    root: str = "runs",
    address: str | None = None,
    tell: Callable[[str], None],
) -> StoreManifest:
    """Makes the store of these sources, or finds it made; goes on where an earlier call broke off.

    store: as in `store_place`. records, fields, chat_template, train_on: as in `data`. tokenizer: a tokenizer.json, or
    the folder of one. max_left_out: the largest share of the text that may be left out. aws_profile: `profile` in
    `sources.open_source`. address: of the Ray cluster; None starts one here, but in a job takes the job's.
    Raises ConfigError, DataError, LaunchError.
    """
    place = store_place(store, root)
    if tokenizer is None:
        raise ConfigError(
            [
                "no tokenizer is given, and a store is for models of one: name its tokenizer.json, or the folder of a "
                "model (--tokenizer). To train one on the text, let `raynium train` build the store (data.source)"
            ]
        )
    tokenizer_place = absolute_path("the tokenizer", tokenizer)
    if chat_template not in (None, *WORDS_FOR_TEMPLATE):
        chat_template = absolute_path("the chat template", chat_template)
    made = records_of(
        records,
        fields=fields,
        chat_template=chat_template,
        train_on=train_on,
        read=beside(tokenizer_place)[0],
        where=f"tokenizer {tokenizer_place!r}",
    )
    try:
        recipe = Recipe(
            sources=_placed(sources, place),
            text_field=text_field,
            heldout_fraction=heldout_fraction,
            dedup=dedup,
            records=made.recipe if made else None,
        )
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, each['loc']))} = {each['input']!r}: {each['msg']}" for each in error.errors()]
        raise ConfigError(problems) from error
    loaded = Tokenizer.load(tokenizer_place, end_of_document=end_of_document)
    refuse_unfit_tokens(loaded, tokenizer_place, made)
    if find_manifest(place) is not None:
        tell(f"data: {place} is there already")
    with ExitStack() as connected:

        @cache
        def cluster() -> Runner:
            return connected.enter_context(_cluster(address, tell))

        def runner(task: Callable[[Shared, Item], Result], shared: Shared, items: Sequence[Item]) -> Generator[Result]:
            # Not before there is something to do: a wrong field or a damaged file is told before any node is asked.
            yield from cluster()(task, shared, items) if items else ()

        return build_from_recipe(
            place,
            recipe,
            loaded,
            records=made,
            runner=runner,
            tell=tell,
            profile=aws_profile,
            max_left_out=max_left_out,
        )


@contextmanager
def _cluster(address: str | None, tell: Callable[[str], None]) -> Iterator[Runner]:
    """Tasks on a Ray cluster, until the driver leaves it."""
    if address is None and job_metadata():
        address = "auto"
        # Ray 2.60 removes the job's folder under us when the driver connects.
        os.chdir(temporary_parent())
    set_ray_environment(starts_cluster=address is None)
    tell("starting a Ray cluster on this machine" if address is None else f"joining the Ray cluster at {address}")
    from raynium.launch.connect import connect
    from raynium.launch.tasks.ray_tasks import on_ray

    with connect(address):
        yield on_ray


def _placed(sources: Sequence[str], store: str) -> list[str]:
    """The sources as absolute paths and URLs. Raises ConfigError for one that holds the store."""
    places = [each if each in WORDS_FOR_SOURCE else absolute_path("the source", each) for each in sources]
    if holders := [source for source in places if lies_in(store, source)]:
        raise ConfigError(
            [
                f"the source {holders[0]!r} holds the store, {store!r}, which would be read as text: give the text a "
                "folder of its own, name its files (--from '*.txt'), or give the store a place outside"
            ]
        )
    return places
