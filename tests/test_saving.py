"""What an agent tells of its uploads: no ranks, and an uploader that the test holds back."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import pytest
from waiting import wait_for

from raynium.checkpoint.format.manifest import ImageInfo, SavedBlocks
from raynium.config.world import World
from raynium.errors import StoreError
from raynium.node.images import Snapshot
from raynium.node.saving import Saving
from raynium.run.protocol import AgentInfo, NodeEnded, Order, ShardFailed, Uploaded

pytestmark = pytest.mark.quick

WORLD = World(nodes=1, ranks_per_node=2, tensor=1, pipeline=1, num_micro_batches=1)
ORDER = Order(WORLD, (0,), (0,), 1, "g1", "127.0.0.1", 29500)
AGENT = AgentInfo("a", 0, 1, "127.0.0.1", 29500, pid=1)


class Words:
    """Of the coordinator, in the order in which it heard them."""

    def __init__(self) -> None:
        self.heard: list[object] = []

    def exited(self, agent: AgentInfo, order: Order, ended: NodeEnded) -> Future[None]:
        return self._hears(agent)

    def tell(self, event: object) -> Future[None]:
        return self._hears(event)

    def _hears(self, word: object) -> Future[None]:
        self.heard.append(word)
        answer: Future[None] = Future()
        answer.set_result(None)
        return answer


class SlowStore:
    """In place of the uploader: each upload waits until it may fail, and has read its file by then."""

    def __init__(self) -> None:
        self.may_fail = {rank: threading.Event() for rank in range(2)}
        self.read: list[str] = []

    def upload(self, info: ImageInfo, *, rank: int, **_: object) -> Any:
        assert self.may_fail[rank].wait(60)
        self.read.append(Path(info.path).read_text())
        raise StoreError("no answer of S3")

    def close(self) -> None:
        pass


@pytest.fixture
def saving(tmp_path: Path) -> Iterator[tuple[Saving, Words, SlowStore]]:
    words, store = Words(), SlowStore()
    saving = Saving(cast(Any, words), cast(Any, store), ranks_per_node=2)
    saving.begin_generation([0, 1], None, tmp_path)
    yield saving, words, store
    for each in store.may_fail.values():
        each.set()
    saving.close()


@pytest.fixture
def image(tmp_path: Path) -> ImageInfo:
    path = tmp_path / "rank-00000.0.safetensors"
    path.write_text("of step 3")
    return ImageInfo(step=3, path=str(path), size=9, tensors=SavedBlocks.of(()))


def test_the_coordinator_hears_what_is_still_uploaded_as_ranks_end_and_when_the_last_of_it_is_over(
    saving: tuple[Saving, Words, SlowStore], image: ImageInfo
) -> None:
    agent, words, store = saving
    for rank in range(2):
        agent.take(rank, 0, Snapshot("g1", WORLD, None, image, image), upload=True)
    agent.tell_end(AGENT, ORDER, NodeEnded())
    (told,) = words.heard
    assert isinstance(told, AgentInfo) and told.uploading == ("g1",) and not AGENT.uploading
    for rank in range(2):
        assert not any(isinstance(each, Uploaded) for each in words.heard)
        store.may_fail[rank].set()
        wait_for(lambda: sum(isinstance(each, ShardFailed) for each in words.heard) == rank + 1)  # noqa: B023
    wait_for(lambda: words.heard[-1] == Uploaded(AGENT.agent_id, ("g1",)))


def test_nothing_is_told_of_uploads_where_none_runs(saving: tuple[Saving, Words, SlowStore]) -> None:
    agent, words, _ = saving
    agent.tell_end(AGENT, ORDER, NodeEnded())
    assert words.heard == [AGENT] and not [each for each in threading.enumerate() if each.name == "uploads-end"]


@pytest.mark.parametrize("renamed", [True, False])
def test_what_has_the_name_of_an_image_later_is_not_uploaded_for_it(
    saving: tuple[Saving, Words, SlowStore], image: ImageInfo, renamed: bool
) -> None:
    agent, words, store = saving
    agent.take(0, 0, Snapshot("g1", WORLD, None, image, image), upload=True)
    path = Path(image.path)
    if renamed:
        path.rename(path.with_name("copy"))
    else:
        path.unlink()
    path.write_text("of step 4")
    store.may_fail[0].set()
    wait_for(lambda: len(words.heard) == 1)
    assert store.read == ["of step 3"] and words.heard == [ShardFailed(3, 0, "no answer of S3")]


def test_an_image_that_is_not_there_is_told(saving: tuple[Saving, Words, SlowStore], image: ImageInfo) -> None:
    agent, words, _ = saving
    Path(image.path).unlink()
    agent.take(0, 0, Snapshot("g1", WORLD, None, image, image), upload=True)
    wait_for(lambda: len(words.heard) == 1)
    (failed,) = words.heard
    assert isinstance(failed, ShardFailed) and "No such file or directory" in failed.cause


@pytest.mark.parametrize("ranks", [[0, 1], []])
def test_ranks_that_begin_with_none_of_a_nodes_images_find_no_file_that_is_uploaded(
    saving: tuple[Saving, Words, SlowStore], image: ImageInfo, tmp_path: Path, ranks: list[int]
) -> None:
    """They would resize it under the uploader, or fetch another's bytes into it."""
    agent, words, store = saving
    agent.take(0, 0, Snapshot("g1", WORLD, None, image, image), upload=True)
    agent.begin_generation(ranks, None, tmp_path)
    assert not list(tmp_path.glob("rank-00000.0.*")) and agent.images.uploading() == ("g1",)
    store.may_fail[0].set()
    wait_for(lambda: len(words.heard) == 1)
    assert store.read == ["of step 3"] and agent.images.uploading() == ()
