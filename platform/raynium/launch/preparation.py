"""Everything a driver checks and makes before it asks Ray for a node. No ray in here.

The order is: what the config says about itself, then the places it names, then the run's own past; only then is the
run's name taken and anything written. An error leaves nothing behind.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from raynium.config.judged import judged_alike
from raynium.config.load import dump_yaml
from raynium.config.local_folders import ignored_tmpdir, scratch_folder
from raynium.config.paths import collisions, placeholders, resolve
from raynium.config.resume import resume_conflicts
from raynium.config.schema import Config
from raynium.convert.beginning import adopt_weights, with_own_tokenizer
from raynium.data.build.prepare import check_stores, prepare_stores
from raynium.data.build.survey import Survey
from raynium.data.judges import check_judges, keep_judges
from raynium.data.mixed import with_steps
from raynium.data.packed_index import ensure_index
from raynium.data.records.template import OWN_NAME
from raynium.data.remote import find_identities
from raynium.data.rows import open_rows, packable
from raynium.data.runner import Runner
from raynium.data.store import TOKENIZER_NAME, OpenStore
from raynium.data.tokenizer import Tokenizer
from raynium.errors import ConfigError, DataError, TrackingAway, TrackingError
from raynium.launch.job_metadata import is_supervised
from raynium.launch.notify import notifier_of, tell_end
from raynium.models.flops import parameter_count
from raynium.node.scratch import log_folder
from raynium.planning.rules import check, doubts
from raynium.run.past import Past
from raynium.run.record import RecordKeeper, RunRecord, claim
from raynium.storage.store import Store
from raynium.tasks.registry import checked_task, refuse_other_samples
from raynium.tracking.client import check_reachable, redact
from raynium.tracking.provenance import provenance_tags
from raynium.tracking.runs import TrackedRun, log_artifact_text, log_dataset, open_run, resolve_uri

# A request to S3 is tried again for about as long.
MLFLOW_WAIT_SECONDS = 40.0


@dataclass(frozen=True)
class Prepared:
    """A claimed run, ready for its ranks.

    config: resolved. store: the run's folder. documents: open on this machine. scratch: node-local folder for spools,
    caches and logs, the same path on every node. log_path: of the driver, on this machine.
    """

    config: Config
    store: Store
    keeper: RecordKeeper
    mlflow: TrackedRun
    # Again, where it did not answer. Holds the address with its credentials.
    open_mlflow: Callable[[], TrackedRun] = field(repr=False)
    documents: list[OpenStore]
    scratch: str
    log_path: Path


def finished_record(config: Config, past: Past) -> RunRecord | None:
    """The record of this very run, if it has already finished at the steps that the config asks for.

    Raises ConfigError when what finished under this name was trained in another way.
    """
    record = past.record
    if record is None or record.state != "finished":
        return None
    # One that evaluate.patience ended is over for as long as it is judged the same way.
    if record.step != config.train.steps and (record.cause is None or not judged_alike(record.config, config)):
        return None
    if conflicts := resume_conflicts(record.config, identified(config), step=record.step):
        raise ConfigError(conflicts)
    return record


def checked(config: Config) -> Config:
    """The config, resolved and free of contradictions; raises ConfigError with every problem."""
    config = resolve(config)
    if problems := [*placeholders(config), *collisions(config), *check(config)]:
        raise ConfigError(problems)
    # A task of the user's own must be importable here, before any node is asked.
    checked_task(config)
    return config


def identified(config: Config, identities: list[str | None] | None = None) -> Config:
    """The config with these identities of its stores, or those that the stores have; as it is where there is none yet.

    Reads manifests only. Raises DataError if one cannot be read, or is not what the config says.
    """
    identities = identities or find_identities(config.data)
    return config.model_copy(update={"data": config.data.identified(identities)})


def checkpoint_bytes(config: Config) -> int:
    """Size of one checkpoint: each parameter and its two moments in float32."""
    return 12 * parameter_count(config.model).total


def survey_data(config: Config, past: Past, tell: Callable[[str], None]) -> Survey | None:
    """Whether the run can train on its data, as far as that shows before anything is started or written.

    Returns the survey of the source, where there is no store yet. Raises DataError.
    """
    check_judges(config)
    found = check_stores(with_own_tokenizer(config, scratch_folder() / "tokenizers"), tell=tell)
    # An imported model, which no driver has trained yet. One that trains here may build the same store anew.
    imported = past.record is None and past.store.exists(TOKENIZER_NAME)
    if found is not None and config.data.tokenizer is None and imported:
        raise DataError(
            f"the run has a tokenizer, {past.store.uri(TOKENIZER_NAME)}, and a new document store at "
            f"{config.data.path} would get another: give that file as data.tokenizer, or the data.path of a store "
            "that was made with it"
        )
    return found


def prepare(
    config: Config,
    past: Past,
    *,
    surveyed: Survey | None,
    job_id: str | None,
    tags: Mapping[str, str],
    tell: Callable[[str], None],
    runner: Runner | None = None,
) -> Prepared:
    """Checks all that can be checked without a node, takes the run's name, and makes what the ranks will need.

    config: from `checked`. surveyed: from `survey_data`. runner: as in `prepare_stores`. tell: gets a line for each
    thing that takes time. Raises RayniumError.
    """
    store = past.store
    config = identified(config)
    uri = resolve_uri(config.tracking.uri, config.run.root)
    past.refuse_live()
    notes = [*past.check_resume(config), *doubts(config), *ignored_tmpdir()]
    # One more than is kept: the oldest is deleted only once the newest is whole. (keep_every_steps may keep many more)
    to_keep = config.checkpoint.keep_last + config.checkpoint.keep_best
    checkpoints_to_come = max(1, to_keep + 1 - past.num_checkpoints)
    store.check_writable(need_bytes=checkpoints_to_come * checkpoint_bytes(config))
    known = (
        past.record is not None and past.record.mlflow_run_id is not None and past.record.mlflow_uri == _address(uri)
    )
    _meet_mlflow(uri, known=known, tell=tell)
    for note in notes:
        tell(f"note: {note}")
    supervised = is_supervised()
    keeper = claim(
        store, config.run.name, config.model_dump(mode="json"), job_id=job_id, supervised=supervised, tell=tell
    )
    try:
        with keeper.beating():
            config = adopt_weights(config, store, past.config, tell)
            config, documents = prepare_data(config, past, tell, surveyed, runner)
            keep_tokenizer(store, documents[0])
            keep_judges(config, store, documents[0].tokenizer())
            store.replace("config.yaml", dump_yaml(config).encode())
            open_mlflow = partial(_open_mlflow, config, documents, keeper.record, uri, tags, tell)
            try:
                mlflow = open_mlflow()
            except TrackingAway:
                if not known:
                    raise
                mlflow = _unopened(keeper.record, uri)
    except (KeyboardInterrupt, SystemExit):
        keeper.update(state="stopped", stopped_by="SIGINT")
        raise
    except BaseException as error:
        keeper.update(**keeper.failure(f"{type(error).__name__}: {error}"))
        tell_end(notifier_of(config.fault, keeper, tell), keeper, keeper.record, tell)
        raise
    log_path = log_folder(store.url) / "driver.log"
    keeper.update(
        config=config.model_dump(mode="json"),
        packing=_packing_facts(config, documents),
        mlflow_uri=_address(mlflow.uri),
        mlflow_run_id=mlflow.run_id,
        mlflow_experiment_id=mlflow.experiment_id,
        log_path=str(log_path),
    )
    return Prepared(config, store, keeper, mlflow, open_mlflow, documents, str(scratch_folder()), log_path)


def prepare_data(
    config: Config,
    past: Past,
    tell: Callable[[str], None],
    surveyed: Survey | None = None,
    runner: Runner | None = None,
) -> tuple[Config, list[OpenStore]]:
    """The document stores on this machine; one is built first if the config names a source and there is none.

    Returns the config with their identities, too. past: of the run, which must be able to go on with this data.
    """
    own = with_own_tokenizer(config, scratch_folder() / "tokenizers")
    documents = prepare_stores(own, cache_dir=scratch_folder() / "data", surveyed=surveyed, runner=runner, tell=tell)
    refuse_other_samples(config, documents)
    # A store that is new: what it holds was not known when the run's past was looked at.
    found = identified(config, [store.manifest.identity for store in documents])
    if config.train.epochs is not None:
        rows = open_rows(documents[0], config.data, config.data.place, config.run.place)
        found = with_steps(found, len(rows) * rows.rows_per_sample)
        tell(f"train: {config.train.epochs:g} epochs are {found.train.num_steps:,} steps")
        if problems := check(found):
            raise ConfigError(problems)
    if found != config:
        past.check_resume(found)
    return found, documents


def _packing_facts(config: Config, documents: list[OpenStore]) -> dict[str, int | float] | None:
    """Of the indices that `prepare_data` made; those of a mixture with the name of the store before."""
    if config.data.packing != "documents":
        return None
    facts = dict[str, int | float]()
    for entry, store in zip(config.data.stores, documents, strict=True):
        packed = ensure_index(packable(store, entry.store, config.run.place), config.data).index
        prefix = f"{entry.name}." if config.data.mixture else ""
        facts |= {f"{prefix}{name}": value for name, value in packed.facts().items()}
    return facts


def _address(uri: str) -> str:
    """Of MLflow, without what MLFLOW_TRACKING_URI may hold of credentials: it is stored and shown."""
    return redact(uri).replace("***@", "")


def keep_tokenizer(store: Store, documents: OpenStore) -> None:
    """The run keeps its own tokenizer, so that it can be sampled without the data.

    An imported model brought one along: DataError if the documents were tokenised with another.
    """
    if (template := documents.chat_template()) is not None and not store.exists(OWN_NAME):
        store.replace(OWN_NAME, template.to_json())
    if not store.exists(TOKENIZER_NAME):
        documents.tokenizer().keep(store)
        return
    kept = Tokenizer.kept(store)
    if documents.manifest.tokenizer_sha256 not in kept.sha256s:
        raise DataError(
            f"document store {documents.place} was tokenised with another tokenizer (sha256 "
            f"{documents.manifest.tokenizer_sha256}) than the run's own, {store.uri(TOKENIZER_NAME)} (sha256 "
            f"{kept.sha256}): token ids would mean other text. Give another data.path, and that file as "
            "data.tokenizer, to make a store for this model"
        )


def _meet_mlflow(uri: str, *, known: bool, tell: Callable[[str], None]) -> None:
    """Returns once MLflow answers: for a run that it knows at once, since its points wait on disk.

    Raises TrackingError, and TrackingAway after as long as a store that does not answer is waited for.
    """
    began, tries = time.monotonic(), 0
    while True:
        try:
            return check_reachable(uri)
        except TrackingAway as error:
            if known:
                tell(f"note: the run starts without its MLflow page, and metrics wait on node 0's disk: {error}")
                return
            left = MLFLOW_WAIT_SECONDS - (time.monotonic() - began)
            if left <= 0:
                raise
            if tries == 0:
                tell(f"waiting for MLflow, for {MLFLOW_WAIT_SECONDS:g} s at most: {error}")
            tries += 1
            time.sleep(min(0.5 * 2**tries, 10.0, left))


def _open_mlflow(
    config: Config,
    documents: list[OpenStore],
    record: RunRecord,
    uri: str,
    tags: Mapping[str, str],
    tell: Callable[[str], None],
) -> TrackedRun:
    """The run's one MLflow run: opened again if it has one at this address."""
    token_budget = config.train.num_steps * config.tokens_per_step
    mlflow = open_run(
        uri,
        experiment=config.tracking.experiment,
        run_name=config.run.name,
        run_id=record.mlflow_run_id if record.mlflow_uri == _address(uri) else None,
        params={"parameters": parameter_count(config.model).total, "token_budget": token_budget}
        | config.model_dump(mode="json"),
        tags=provenance_tags(Path.cwd(), accelerator=config.cluster.accelerator)
        | {"raynium.run": config.run.name}
        | dict(tags),
    )
    # The run is worth more than this page of it.
    try:
        for data, store in zip(config.data.of_each_store(), documents, strict=True):
            train, heldout = store.manifest.train, store.manifest.heldout
            packed = _packing_facts(config.model_copy(update={"data": data}), [store]) or {}
            log_dataset(
                mlflow.uri,
                mlflow.run_id,
                path=data.place,
                identity=store.manifest.identity,
                facts={"documents": train.documents, "tokens": train.tokens}
                | {"heldout_documents": heldout.documents, "vocab_size": store.manifest.vocab_size}
                | {f"packed_{name}": value for name, value in packed.items()},
            )
    except TrackingError as error:
        tell(f"the MLflow page does not name the data: {error}")
    try:
        log_artifact_text(mlflow.uri, mlflow.run_id, "config.yaml", dump_yaml(config))
    except TrackingError as error:
        tell(f"the MLflow page does not show config.yaml: {error}")
    return mlflow


def _unopened(record: RunRecord, uri: str) -> TrackedRun:
    assert record.mlflow_run_id is not None and record.mlflow_experiment_id is not None
    return TrackedRun(record.mlflow_run_id, record.mlflow_experiment_id, uri, is_open=False)
