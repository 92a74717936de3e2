"""From a rank's written image to a shard that the coordinator knows of: offers, uploads, and what is told of them."""

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from io import FileIO
from pathlib import Path

from raynium.checkpoint.format.manifest import ShardEntry
from raynium.config.images import IMAGE_SLOTS
from raynium.errors import StoreError
from raynium.node.images import FailedUpload, NodeImages, SavedShard, Slot, Snapshot, image_files
from raynium.node.ranks import RankGroup
from raynium.node.uploader import Uploader
from raynium.run.held_images import HeldImages
from raynium.run.last_save import pause_before_next_try
from raynium.run.protocol import AgentInfo, Coordinator, NodeEnded, Order, Said, ShardFailed, ShardSaved, Uploaded
from raynium.train.link import ImageFree


class Saving:
    """Of one node's ranks, over the life of its agent, whose thread calls it."""

    def __init__(
        self,
        coordinator: Coordinator,
        uploader: Uploader,
        *,
        ranks_per_node: int,
        num_images: int = IMAGE_SLOTS,
        host: str = "",
    ):
        """host: this node's, in incidents."""
        self.images = NodeImages(num_images)
        self._coordinator = coordinator
        self._uploader = uploader
        self._host = host
        # The ranks of now, to whom images are offered, from any thread.
        self._group: RankGroup | None = None
        self._group_lock = threading.Lock()
        # Threads that wait for the uploader: one for each image that can be on its way.
        self._threads = ThreadPoolExecutor(num_images * ranks_per_node, thread_name_prefix="upload")
        # Each is done when the coordinator knows how that upload ended.
        self._running: list[Future[None]] = []

    def begin_generation(self, ranks: Sequence[int], keep: HeldImages | None, folder: Path) -> None:
        """No rank runs. ranks: of this node from now on. keep: what they start from. folder: with all images."""
        for rank, number in self.images.start_generation(ranks, keep):
            for path in image_files(folder, rank, number):
                # What is uploaded is open.
                path.unlink()
        # A coordinator that was started again knows of no shard, and who starts from the last step saves it no more.
        self._running += [self._threads.submit(self._tell_saved, saved) for saved in self.images.saved()]

    def serve(self, group: RankGroup | None) -> None:
        """Whom images are offered to from now on."""
        with self._group_lock:
            self._group = group
        self._offer_free()

    def take(self, rank: int, slot: int, snapshot: Snapshot, *, upload: bool) -> None:
        """The rank has written this image, and goes on training."""
        written = self.images.complete(rank, slot, snapshot, upload=upload)
        self._offer_free()
        if not upload:
            return
        self._running = [upload for upload in self._running if not upload.done()]
        self._running.append(self._begin(rank, written, snapshot, again=False))

    def finish(self, agent: AgentInfo, order: Order) -> None:
        """The ranks are through. Their last checkpoint must be in before the run may count as finished.

        Whichever generation saved it. What could not be uploaded is still in memory, and tried again for a while.
        """
        # A node whose ranks still run may lose one.
        over = self._coordinator.watch(agent, order, stop_known=True)
        began, tries = time.monotonic(), 0
        while True:
            for upload in self._running:
                upload.result()
            failed = self.images.failed()
            tries += 1
            pause = pause_before_next_try(tries, time.monotonic() - began)
            if not failed or pause is None:
                # The coordinator may have been started again since it heard of some, and knows nothing of them.
                for told in [self._threads.submit(self._tell_saved, saved) for saved in self.images.saved()]:
                    told.result()
                return
            self._coordinator.tell(Said(_still_in_memory(agent, failed, pause)))
            wait([over], pause)
            if over.done():
                over.result()
                return
            self._running = [self._begin(each.rank, each.slot, each.snapshot, again=True) for each in failed]

    def tell_end(self, agent: AgentInfo, order: Order, ended: NodeEnded) -> None:
        """All ranks have ended. Uploads that still run go on: the coordinator is told of them, and when they are over.

        Until then a bad node's instance is not rebooted.
        """
        uploading = self.images.uploading()
        running = [upload for upload in self._running if not upload.done()]
        self._coordinator.exited(replace(agent, uploading=uploading), order, ended).result()

        def tell_uploaded() -> None:
            wait(running)
            self._coordinator.tell(Uploaded(agent.agent_id, uploading))

        if uploading:
            threading.Thread(target=tell_uploaded, name="uploads-end", daemon=True).start()

    def _offer_free(self) -> None:
        with self._group_lock:
            if self._group is not None:
                for rank, slot in self.images.take_offers():
                    self._group.send(rank, ImageFree(slot))

    def uploader_pid(self) -> int | None:
        return self._uploader.pid()

    def wait(self) -> None:
        """Until no upload runs. None may follow."""
        self._threads.shutdown(wait=True)

    def close(self) -> None:
        self.wait()
        self._uploader.close()

    def _begin(self, rank: int, slot: Slot, snapshot: Snapshot, *, again: bool) -> "Future[None]":
        """An upload, of the file that is there now: a later generation may give the name to another one."""
        try:
            image = os.open(snapshot.info.path, os.O_RDONLY)
        except OSError as error:
            image = error
        return self._threads.submit(self._upload, rank, slot, snapshot, image, again=again)

    def _upload(self, rank: int, slot: Slot, snapshot: Snapshot, image: int | OSError, *, again: bool) -> None:
        try:
            if isinstance(image, OSError):
                raise image
            with FileIO(image):
                path = f"/proc/{os.getpid()}/fd/{image}"
                entry: ShardEntry = self._uploader.upload(
                    snapshot.info.model_copy(update={"path": path}),
                    generation=snapshot.generation_id,
                    rank=rank,
                    again=again,
                    died=lambda text: self._coordinator.tell(Said(text, "uploader", self._host)),
                )
        except Exception as error:
            # Whatever it was, this image is in memory only.
            failure = str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
            self.images.uploaded(slot, failure=failure)
            self._offer_free()
            self._coordinator.tell(ShardFailed(snapshot.info.step, rank, failure)).result()
            return
        saved = SavedShard(rank, snapshot, entry, time.monotonic() - snapshot.taken)
        self.images.uploaded(slot, saved=saved)
        self._offer_free()
        self._tell_saved(saved)

    def _tell_saved(self, saved: SavedShard) -> None:
        snapshot = saved.snapshot
        entry, seconds = saved.entry.to_json(), saved.upload_seconds
        event = ShardSaved(snapshot.info.step, saved.rank, entry, seconds, snapshot.parent_step, snapshot.world)
        self._coordinator.tell(event).result()


def _still_in_memory(agent: AgentInfo, failed: Sequence[FailedUpload], pause: float) -> str:
    step = max(each.snapshot.info.step for each in failed)
    return (
        f"node {agent.seat}: {len(failed)} shard(s) of step {step} are still in memory only, and are uploaded "
        f"again in {pause:.0f} s: {failed[0].failure}"
    )
