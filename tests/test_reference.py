"""The reference pass: computed once, kept beside the store, verified, and gone on with where it was broken off."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raynium.data.batch import IGNORED_LABEL, Batch
from raynium.engines.base import FakeEngine
from raynium.errors import StoreError
from raynium.rank import reference
from raynium.rank.reference import ReferencePass
from raynium.storage.store import Store

ROWS = 11


class SummingEngine(FakeEngine):
    """A row's log-probability is minus the sum of its labels. It ends in the call of that number."""

    def __init__(self, *, ends_in_call: int | None = None):
        super().__init__()
        self.calls: list[int] = []
        self._ends_in_call = ends_in_call

    def row_log_probs(self, batch: Batch) -> torch.Tensor:
        counted_BT = batch.labels_BT != IGNORED_LABEL
        self.calls.append(int(counted_BT.any(1).sum()))
        if len(self.calls) == self._ends_in_call:
            raise KeyboardInterrupt
        return -(batch.labels_BT * counted_BT).sum(1).float()


class RowsOfNumbers:
    def __len__(self) -> int:
        return ROWS

    def read(self, rows: np.ndarray) -> Mapping[str, np.ndarray]:
        tokens = np.stack((rows, rows + 100), axis=1).astype(np.uint16)
        return {"tokens": tokens, "labels": tokens}


EXPECTED = np.array([-(2.0 * row + 100) for row in range(ROWS)], np.float32)


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "ROWS_PER_FILE", 4)
    monkeypatch.setenv("RANK", "0")


def references(
    folder: Path, engine: FakeEngine, *, store: str = "store", weights: str = "w", **known_by: Any
) -> tuple[np.ndarray, list[str]]:
    """And what was done on the way."""
    done: list[str] = []
    asked = ReferencePass(
        engine,
        known_by={"weights": weights},
        run_store=Store(folder / "run"),
        batch_size=2,
        begin=lambda: done.append("began"),
        tell=lambda at, total: done.append(f"{at} of {total}"),
    )
    found = asked.of(RowsOfNumbers(), store_url=str(folder / store), subset="train", **known_by)
    assert asked.computed == ("began" in done)
    return found, done


def test_the_pass_is_taken_once_and_read_from_then_on(tmp_path: Path) -> None:
    engine = SummingEngine()
    found, done = references(tmp_path, engine)
    np.testing.assert_array_equal(found, EXPECTED)
    assert done == ["began", *(f"{at} of 11" for at in (0, 2, 4, 6, 8, 10))]
    assert engine.calls == [2, 2, 2, 2, 2, 1], "rows that fill up a call count nothing"
    again = SummingEngine()
    found, done = references(tmp_path, again)
    np.testing.assert_array_equal(found, EXPECTED)
    assert found.dtype == np.float32 and not again.calls and not done


def test_a_pass_that_was_broken_off_goes_on_behind_what_it_has_written(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        references(tmp_path, SummingEngine(ends_in_call=4))
    engine = SummingEngine()
    found, done = references(tmp_path, engine)
    np.testing.assert_array_equal(found, EXPECTED)
    assert done == ["began", *(f"{at} of 11" for at in (4, 6, 8, 10))]


@pytest.mark.parametrize(
    "other", [{"weights": "other"}, {"store_identity": "other"}, {"seq_len": 3}, {"subset_of": "heldout"}]
)
def test_what_depends_on_something_else_is_another_reference(tmp_path: Path, other: dict[str, Any]) -> None:
    references(tmp_path, SummingEngine())
    engine = SummingEngine()
    references(tmp_path, engine, **other)
    assert len(engine.calls) == 6


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:-2] + b"??", lambda _: b""])
def test_a_damaged_file_is_not_used_but_computed_again(
    tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    references(tmp_path, SummingEngine())
    files = sorted((tmp_path / "store/reference").rglob("*.bin"))
    assert [file.name for file in files] == [
        "000000000000-000000000004.bin",
        "000000000004-000000000008.bin",
        "000000000008-000000000011.bin",
    ]
    files[1].write_bytes(damage(files[1].read_bytes()))
    engine = SummingEngine()
    with caplog.at_level(logging.WARNING):
        found, _ = references(tmp_path, engine)
    np.testing.assert_array_equal(found, EXPECTED)
    assert engine.calls == [2, 2]
    assert "is damaged, so it is not used: the reference is computed again" in caplog.text
    assert references(tmp_path, SummingEngine())[1] == [], "the new file took the damaged one's place"


def test_where_the_store_cannot_be_written_the_run_keeps_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    with caplog.at_level(logging.WARNING):
        references(tmp_path, SummingEngine(), store="file/store")
    assert "the reference is kept with the run" in caplog.text
    assert len(list((tmp_path / "run/reference").rglob("*.bin"))) == 3
    engine = SummingEngine()
    found, _ = references(tmp_path, engine, store="file/store")
    np.testing.assert_array_equal(found, EXPECTED)
    assert not engine.calls


def test_where_neither_can_be_written_the_run_does_not_go_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "run").write_text("no folder either")
    with pytest.raises(StoreError):
        references(tmp_path, SummingEngine(), store="file/store")
