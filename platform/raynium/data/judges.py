"""What evaluations read beside the run's own held-out documents: evaluate.sets and evaluate.tasks."""

from raynium.config.judged import name_of_place
from raynium.config.schema import Config
from raynium.data.access import open_fetched
from raynium.data.questions import Question, parse, read_file, rows_of
from raynium.data.remote import find_manifest, local_path
from raynium.data.store import OpenStore
from raynium.data.tokenizer import Tokenizer
from raynium.errors import DataError
from raynium.storage.store import Store

# In the run's store, as the driver found them: nodes need not see where they lie.
QUESTIONS_FOLDER = "questions"


def check_judges(config: Config) -> None:
    """What can be known of them before the run has a tokenizer. Raises DataError."""
    for place in config.evaluate.tasks:
        parse(read_file(place), place)
    for place in config.evaluate.sets:
        if find_manifest(place) is None:
            raise DataError(
                f"evaluate.sets names {place!r}, which is no document store: build it with `raynium data build`, with "
                "the run's tokenizer"
            )


def keep_judges(config: Config, store: Store, tokenizer: Tokenizer) -> None:
    """Checks them against the run's tokenizer, and keeps the questions in the run's store. Raises DataError."""
    for place in config.evaluate.tasks:
        content = read_file(place)
        rows_of(parse(content, place, most=config.evaluate.max_questions), tokenizer, seq_len=config.data.seq_len)
        store.replace(_key(place), content)
    for place in config.evaluate.sets:
        manifest = find_manifest(place)
        if manifest is None or manifest.tokenizer_sha256 not in tokenizer.sha256s:
            raise DataError(
                f"evaluate.sets names {place!r}, which has another tokenizer: build it from that text with the run's "
                "tokenizer and --heldout-fraction 0.99"
            )


def kept_questions(config: Config, store: Store) -> dict[str, list[Question]]:
    """By name. Of a rank."""
    return {
        name_of_place(place): parse(store.read(_key(place)), place, most=config.evaluate.max_questions)
        for place in config.evaluate.tasks
    }


def open_sets(config: Config) -> dict[str, OpenStore]:
    """By name. Of a rank: little is read of them, so that they are read where they lie. Raises DataError."""
    alone = {"mixture": (), "stages": ()}
    return {
        name_of_place(place): open_fetched(
            config.data.model_copy(update=alone | {"access": "auto" if local_path(place) else "stream", "path": place}),
            place,
            identity=None,
            run=config.run.place,
        )
        for place in config.evaluate.sets
    }


def _key(place: str) -> str:
    return f"{QUESTIONS_FOLDER}/{name_of_place(place)}.jsonl"
