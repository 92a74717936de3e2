"""The log of a node's ranks: whole for its readers, and no larger than the disk can bear."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from raynium import find_run
from raynium.node import node_log
from raynium.node.scratch import log_folder
from raynium.storage.store import Store

pytestmark = pytest.mark.quick


@pytest.fixture
def ours() -> Iterator[logging.Logger]:
    """The package's logger, put back afterwards."""
    logger = logging.getLogger("raynium")
    level, before = logger.level, list(logger.handlers)
    yield logger
    logger.setLevel(level)
    for handler in set(logger.handlers) - set(before):
        logger.removeHandler(handler)
        handler.close()


def test_only_the_newest_lines_are_kept_and_read_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: logging.Logger
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(node_log, "FILE_BYTES", 1000)
    monkeypatch.chdir(tmp_path)
    run = find_run("first")
    url = Store(run.url).url
    node_log.log_to_file(url, 3)
    for number in range(50):
        ours.info("rank 0 | %d", number)
    files = node_log.node_logs(url)
    assert [path.name for path in files] == ["node-00003.log.1", "node-00003.log"], "not full yet"
    for number in range(50, 500):
        ours.info("rank 0 | %d", number)
    (log_folder(url) / "node-00001.log").write_text("of another node\n")

    first, *lines = run.logs(of="ranks").splitlines()
    assert first == "of another node"
    numbers = [int(line.rpartition("| ")[2]) for line in lines]
    assert numbers == list(range(numbers[0], 500)) and numbers[0] > 300
    sizes = [path.stat().st_size for path in log_folder(url).glob("node-00003*")]
    assert len(sizes) == 1 + node_log.OLDER_FILES and max(sizes) <= 1000
