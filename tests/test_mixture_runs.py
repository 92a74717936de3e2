"""Runs on a mixture of stores: prepared, trained by ranks, killed and resumed; and mixtures that cannot be."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from standalone_ranks import trained
from tiny import job_text

from raynium.checkpoint.catalog import latest
from raynium.checkpoint.compare import differences
from raynium.config.load import parse_config
from raynium.data.batch import IGNORED_LABEL
from raynium.data.build.store_build import build_store
from raynium.data.loader import open_loader
from raynium.data.mixed import metrics_of_stores
from raynium.data.order import Order, RowShuffle
from raynium.data.order.mixture import mixture_of
from raynium.data.store import TOKENIZER_NAME, open_store
from raynium.errors import ConfigError, DataError
from raynium.launch.preparation import Prepared, checked, prepare, survey_data
from raynium.run.past import Past
from raynium.run.record import read_record
from raynium.storage.store import Store

# A stage without `web` begins at step 4.
STAGES = [{"from_step": 4, "weights": {"web": 0, "code": 1, "logs": 2}}]
MIXTURE = [{"store": "web", "weight": 0.5}, {"store": "code", "weight": 0.25}, {"store": "logs", "weight": 0.25}]
CHANGES = {
    "data.path": None,
    "data.mixture": MIXTURE,
    "data.stages": STAGES,
    "optimizer.schedule": "constant",
    "checkpoint.every_steps": 3,
    "checkpoint.keep_last": 5,
    "evaluate.every_steps": 3,
    "evaluate.max_documents": 3,
    "train.steps": 6,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with three stores of one tokenizer under `data`."""
    folder = tmp_path_factory.mktemp("mixed")
    tokenizer = None
    for number, name in enumerate(("web", "code", "logs")):
        (folder / "text" / name).mkdir(parents=True)
        for file in range(30):
            text = "\n".join(f"{name} {number * file}: line {line} of it" for line in range(30))
            (folder / "text" / name / f"{file}.txt").write_text(text)
        store = build_store(
            folder / "data" / name,
            source=str(folder / "text" / name),
            vocab_size=400,
            heldout_fraction=0.3,
            tokenizer_path=tokenizer and str(tokenizer),
        )
        tokenizer = tokenizer or store.path / TOKENIZER_NAME
    return folder


@pytest.fixture
def job(root: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the job file of a run of this name."""

    def write(name: str, **changes: Any) -> Path:
        text = job_text(CHANGES | {"run.name": name, "run.root": str(root)} | changes)
        (tmp_path / f"{name}.yaml").write_text(text)
        return tmp_path / f"{name}.yaml"

    return write


def metrics(log: str, name: str) -> dict[int, float]:
    return {int(step): float(value) for step, value in re.findall(rf"step (\d+): .*?{name} ([-+.e\d]+)", log)}


# ------------------------------------------------------------------------------------------------- ranks


def test_a_run_that_was_broken_off_before_a_stage_and_in_it_has_the_bits_of_a_whole_one(
    root: Path, job: Callable[..., Path]
) -> None:
    whole = trained(job("whole"))
    pieces = [trained(job("broken"), f"train.steps={steps}") for steps in (2, 5, 6)]
    one, other = latest(Store(root / "whole")), latest(Store(root / "broken"))
    assert one is not None and other is not None and one.step == other.step == 6
    assert not list(differences(one, other))
    expected = metrics(whole, "train/loss")
    assert {step: loss for log in pieces for step, loss in metrics(log, "train/loss").items()} == expected
    alone = trained(job("alone", **{"cluster.ranks_per_node": 1}), ranks=1)
    assert metrics(alone, "train/loss") == pytest.approx(expected, rel=1e-5)
    # 4 sequences of 32 tokens a step: 12 before the stage, half of them of `web`, and none in it.
    for log in (whole, alone):
        seen = {name: metrics(log, f"data/{name}/tokens")[6] / 32 for name in ("web", "code", "logs")}
        assert seen == {"web": 6, "code": 7, "logs": 11} and sum(seen.values()) == 24
        assert metrics(log, "data/web/tokens")[3] == metrics(log, "data/web/tokens")[6]
        assert metrics(log, "data/web/epochs")[6] > 0


def test_the_held_out_loss_is_that_of_all_documents_and_of_each_store(root: Path, job: Callable[..., Path]) -> None:
    log = trained(job("judged", **{"train.steps": 1}))
    tokens, num_bytes, nats, bits = 0, 0, 0.0, 0.0
    for name in ("web", "code", "logs"):
        documents = open_store(root / "data" / name).heldout_documents(3)
        of_store = sum(document.num_tokens for document in documents)
        tokens += of_store
        nats += metrics(log, f"eval/{name}/loss")[1] * of_store
        of_store = sum(document.utf8_bytes for document in documents)
        num_bytes += of_store
        bits += metrics(log, f"eval/{name}/bits_per_byte")[1] * of_store
    assert metrics(log, "eval/loss")[1] == pytest.approx(nats / tokens, rel=1e-5)
    assert metrics(log, "eval/bits_per_byte")[1] == pytest.approx(bits / num_bytes, rel=1e-5)


def test_a_store_alone_has_no_metrics_of_its_own(root: Path, job: Callable[..., Path]) -> None:
    one = {"data.mixture": [MIXTURE[1]], "data.stages": None, "train.steps": 1}
    mixture = trained(job("one", **one))
    path = trained(job("path", **one | {"data.mixture": None, "data.path": f"{root}/data/code"}))
    assert metrics(mixture, "train/loss") == metrics(path, "train/loss") != {}
    assert "eval/loss" in mixture and "code/" not in mixture


# ------------------------------------------------------------------------------------------------- refused


@pytest.fixture
def attempt(root: Path, tmp_path: Path) -> Callable[..., Prepared]:
    """What a driver does before it asks for a node."""
    told: list[str] = []

    def run(**changes: Any) -> Prepared:
        name = changes.pop("name", tmp_path.name.replace("_", "-")[:60].strip("-"))
        config = checked(parse_config(job_text(CHANGES | {"run.name": name, "run.root": str(root)} | changes)))
        past = Past.read(config)
        surveyed = survey_data(config, past, told.append)
        return prepare(config, past, surveyed=surveyed, job_id=None, tags={}, tell=told.append)

    run.told = told
    return run


def test_every_store_is_known_by_its_identity_and_named_on_the_page(root: Path, attempt: Any) -> None:
    prepared = attempt()
    identities = [open_store(root / "data" / store["store"]).manifest.identity for store in MIXTURE]
    assert [store.identity for store in prepared.config.data.mixture] == identities
    assert [store.manifest.identity for store in prepared.documents] == identities
    record = read_record(prepared.store)
    assert record is not None and [store["identity"] for store in record.config["data"]["mixture"]] == identities
    run = MlflowClient(prepared.mlflow.uri).get_run(prepared.mlflow.run_id)
    assert {each.dataset.name: each.dataset.digest for each in run.inputs.dataset_inputs} == {
        store["store"]: identity[:36] for store, identity in zip(MIXTURE, identities, strict=True)
    }
    assert any(re.fullmatch(r"data: web: 25\.0% of the samples, [\d.e-]+ epochs", line) for line in attempt.told)
    assert any(re.match(r"data: logs: 2\d documents, ", line) for line in attempt.told)
    kept = checked(parse_config(prepared.store.read("config.yaml").decode()))
    assert kept == prepared.config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data.mixture": [*MIXTURE[:2], {"store": "lgos", "weight": 1}], "data.stages": None},
            r"data\.mixture's store '.*/data/lgos' is no document store: it has no manifest\.json",
        ),
        (
            {"data.mixture": [MIXTURE[0], {"store": "code", "weight": 1, "identity": "ab" * 32}], "data.stages": None},
            r"document store .*/data/code holds other data \(identity \w+\) than data\.identity = 'abab",
        ),
        (
            {"data.max_epochs": 1, "train.steps": 2000},
            r"data\.max_epochs is 1: store .*/code runs out at step \d+ of 2,000: it has \d+ rows, and the run takes "
            r".*; store .*/logs runs out at step \d+ of 2,000.* or add text",
        ),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_before_anything_is_written(
    root: Path, attempt: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        attempt(name="refused", **changes)
    assert not (root / "refused").exists()


def test_stores_of_different_tokenizers_are_not_mixed(root: Path, tmp_path: Path, attempt: Any) -> None:
    build_store(tmp_path / "other", source=str(root / "text/logs"), vocab_size=300, heldout_fraction=0.3)
    mixture = [MIXTURE[0], {"store": str(tmp_path / "other"), "weight": 1}]
    with pytest.raises(DataError) as raised:
        attempt(name="refused", **{"data.mixture": mixture, "data.stages": None})
    ours, theirs = (open_store(path).manifest.tokenizer_sha256 for path in (root / "data/web", tmp_path / "other"))
    assert str(raised.value) == (
        f"data.mixture has stores of different tokenizers (sha256 {ours} in {root}/data/web, {theirs} in "
        f"{tmp_path}/other): a token id would mean two things; build both with one tokenizer, given as `--tokenizer`"
    )
    assert not (root / "refused").exists()


def test_the_same_data_twice_is_refused(root: Path, tmp_path: Path, attempt: Any) -> None:
    (tmp_path / "copy").symlink_to(root / "data/web")
    mixture = [MIXTURE[0], {"store": str(tmp_path / "copy"), "weight": 1}]
    with pytest.raises(DataError, match=r"data\.mixture has the same data twice, in .*/data/web and .*/copy"):
        attempt(name="refused", **{"data.mixture": mixture, "data.stages": None})


def test_problems_of_a_mixture_are_told_at_once(root: Path) -> None:
    changes = {"data.stages": [{"from_step": 3, "weights": {"wbe": 1}}], "data.source": "/text", "run.root": str(root)}
    with pytest.raises(ConfigError) as raised:
        checked(parse_config(job_text(CHANGES | changes)))
    assert len(raised.value.problems) == 2
    assert "data.stages[0].weights names 'wbe', no store of data.mixture: did you mean 'web'?" in str(raised.value)


def test_what_came_of_each_store_is_a_function_of_the_step() -> None:
    config = parse_config(job_text(CHANGES))
    order = Order([RowShuffle(rows, seed=0) for rows in (10, 20, 5)], mixture_of(config.data, 4))
    assert metrics_of_stores(config, order.counts(6 * 4), num_rows=[10, 20, 5], num_labels=[320, 640, 160]) == {
        "data/web/tokens": 6 * 32.0,
        "data/web/epochs": 0.6,
        "data/code/tokens": 7 * 32.0,
        "data/code/epochs": 0.35,
        "data/logs/tokens": 11 * 32.0,
        "data/logs/epochs": 2.2,
    }


def test_tokens_of_a_store_leave_out_what_fills_rows_up_exactly_after_an_epoch(root: Path) -> None:
    changes = {"data.stages": None, "data.packing": "documents", "data.seq_len": 256, "model.max_seq_len": 256}
    changes |= {"data.mixture": [each | {"store": str(root / "data" / each["store"])} for each in MIXTURE]}
    config = parse_config(job_text(CHANGES | changes | {"train.global_batch_size": 1, "train.steps": 200}))
    stores = [open_store(root / "data" / name) for name in ("web", "code", "logs")]
    loader = open_loader(config, stores, data_rank=0, data_size=1)
    labels, whole_epochs = {"web": 0, "code": 0, "logs": 0}, set()
    for step in range(1, config.train.steps + 1):
        (number,) = loader.samples(step).stores
        name = list(labels)[number]
        batch = loader.batch(step)
        assert batch.tokens_BT.dtype == batch.labels_BT.dtype == torch.int64 and batch.tokens_BT.is_contiguous()
        labels[name] += int((batch.labels_BT != IGNORED_LABEL).sum())
        told = loader.metrics(step)
        if told[f"data/{name}/epochs"] == 1:
            whole_epochs.add(name)
            assert told[f"data/{name}/tokens"] == labels[name]
    assert whole_epochs == set(labels)
