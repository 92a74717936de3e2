"""Ranks without Ray, for debugging: `torchrun --nproc-per-node 2 -m raynium.standalone CONFIG [key=value …]`.

The same `rank.run` with another link: each rank saves its own shard, rank 0 commits, metrics go to the log. No
restarts, no MLflow. The run's folder and its checkpoints are the same as under Ray, so either continues what the other
began.
"""

import faulthandler
import logging
import os
import secrets
import signal
import sys
import time
from typing import Any

import torch.distributed as dist

from raynium.checkpoint.catalog import resume_point
from raynium.checkpoint.commit import commit_checkpoint
from raynium.checkpoint.format.manifest import ImageInfo, ShardEntry
from raynium.checkpoint.retention import Retention, apply_retention
from raynium.checkpoint.state import checkpoint_state
from raynium.checkpoint.upload import upload_shard
from raynium.config.load import load_config
from raynium.config.schema import Config
from raynium.config.world import World
from raynium.convert.beginning import adopt_weights, describe
from raynium.data.judges import keep_judges
from raynium.errors import RayniumError
from raynium.launch.preparation import checked, identified, keep_tokenizer, prepare_data
from raynium.launch.settle import settled
from raynium.rank.build import run
from raynium.rank.plan import RankPlan
from raynium.run.past import Past
from raynium.storage.own_folder import temporary_folder
from raynium.storage.store import Store

logger = logging.getLogger(__name__)


class StandaloneLink:
    """The link of a rank that nobody watches. Saving blocks the loop; every rank calls `image` at the same step."""

    def __init__(self, config: Config, world: World, store: Store):
        self._config = config
        self._world = world
        self._store = store
        self._stop = False
        self._generation = ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request_stop)

    def _request_stop(self, signal_number: int, frame: Any) -> None:
        self._stop = True

    def phase(self, name: str, step: int) -> None:
        logger.debug("%s, step %d", name, step)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        if dist.get_rank() == 0:
            logger.info("step %d: %s", step, ", ".join(f"{name} {value:.6g}" for name, value in metrics.items()))

    def bad_step(self, step: int, why: str) -> None:
        if dist.get_rank() == 0:
            logger.warning("step %d: %s", step, why)

    def artifact(self, path: str, text: str) -> None:
        if dist.get_rank() == 0:
            self._store.replace(path, text.encode())

    def took(self, step: int, *, own_seconds: float, step_seconds: float) -> None:
        # Nobody compares the ranks here.
        pass

    def evaluating(self, done: int, total: int) -> None:
        pass

    def compiled(self, step: int, *, graphs: int, seconds: float, surprises: list[str]) -> None:
        if dist.get_rank() == 0:
            logger.info("step %d: %d graph(s) compiled in %.1f s", step, graphs, seconds)
        for surprise in surprises:
            logger.warning("step %d: %s", step, surprise)

    def stop_requested(self) -> bool:
        return self._stop

    def has_free_image(self) -> bool:
        return True

    def compiling(self, started: bool) -> None:
        pass

    def wait_free_image(self) -> int:
        # `image` returns when the image is no longer needed.
        return 0

    def image(self, slot: int, info: str, replicas: str, *, upload: bool) -> None:
        """Uploads this rank's shard; rank 0 commits when all are in. A rank that dies in here stops the others."""
        if not upload:
            # For a restart, and nobody restarts this run.
            return
        if not self._generation:
            names = [f"torchrun-{secrets.token_hex(4)}"]
            dist.broadcast_object_list(names)
            self._generation = names[0]
        image = ImageInfo.from_json(info)
        entry = upload_shard(self._store, image, generation=self._generation, rank=dist.get_rank())
        entries: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(entries, entry.to_json())
        if dist.get_rank() == 0:
            commit_checkpoint(
                self._store,
                step=image.step,
                generation=self._generation,
                entries=[ShardEntry.from_json(each) for each in entries],
                state=checkpoint_state(self._config, image.step),
                world_size=self._world.size,
                layout=self._world.degrees(),
            )
            apply_retention(
                self._store,
                policy=Retention.of(self._config.checkpoint),
                living=[self._generation],
                now_unix=time.time(),
            )
            logger.info("checkpoint of step %d committed", image.step)
        dist.barrier()


def main() -> None:
    """One rank's process; torchrun has set the standard environment."""
    if "RANK" not in os.environ or len(sys.argv) < 2:
        sys.exit("usage: torchrun --nproc-per-node RANKS -m raynium.standalone CONFIG [key=value …]")
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format=f"rank {os.environ['RANK']} %(levelname)s: %(message)s")
    path, *overrides = sys.argv[1:]
    try:
        config = checked(load_config(path, overrides, describe=describe))
        world = World.of(config)
        if int(os.environ["WORLD_SIZE"]) != world.size:
            sys.exit(
                f"error: torchrun started {os.environ['WORLD_SIZE']} ranks, the config asks for {world.size} "
                f"(cluster.nodes × cluster.ranks_per_node). Make them equal"
            )
        past = Past.read(config)
        config = past.with_steps(config)
        config, store = identified(settled(config, cluster_resources=None, saved=past.config)), past.store
        past.refuse_live()
        notes = past.check_resume(config)
        store.check_writable()
        # The others wait for it as they join the process group.
        if os.environ["RANK"] == "0":
            config = adopt_weights(config, store, past.config, logger.info)
        # One rank builds, the others wait and use it.
        config, documents = prepare_data(config, past, logger.info)
        if os.environ["RANK"] == "0":
            for note in notes:
                logger.info("note: %s", note)
            keep_tokenizer(store, documents[0])
            keep_judges(config, store, documents[0].tokenizer())
        checkpoint = resume_point(store, if_damaged=config.checkpoint.if_damaged).checkpoint
        with temporary_folder("images") as images:
            plan = RankPlan(
                config=config,
                world=world,
                run_url=store.url,
                resume_step=checkpoint.step if checkpoint else None,
                data_places=[each.place for each in documents],
                image_folder=str(images),
            )
            outcome = run(plan, StandaloneLink(config, world, store))
    except RayniumError as error:
        sys.exit(f"error: {error}")
    logger.info("%s at step %d%s", outcome.reason, outcome.step, f": {outcome.why}" if outcome.why else "")


if __name__ == "__main__":
    main()
