"""A driver, its coordinator's saves and its agent's metrics in one process, on what it takes for a host of its own.

Told by lines on stdin; answers each with a line.
"""

import asyncio
import json
import socket
import sys
from pathlib import Path
from typing import Any

from checkpoints import halves, random_tensor, upload_all
from tiny import job_text

import raynium.run.record as record_module
from raynium.config.load import parse_config
from raynium.config.world import World
from raynium.errors import RayniumError
from raynium.run.fence import Fence
from raynium.run.points import PendingPoints
from raynium.run.protocol import ShardSaved
from raynium.run.record import RecordKeeper, claim
from raynium.run.saves import Saves
from raynium.storage.store import Store
from raynium.tracking.sender import MlflowTracker


def main(run_url: str, spool: str, mlflow_uri: str, mlflow_run_id: str, host: str) -> None:
    socket.gethostname = lambda: host
    store, config = Store(run_url), parse_config(job_text({"train.steps": 8}))
    try:
        keeper = claim(store, "test", config.model_dump(mode="json"), tell=lambda line: None)
    except RayniumError as error:
        say(f"refused: {error}")
        return
    fence = Fence(store, keeper.claim_number)
    saves = Saves(
        config, store, fence, PendingPoints(), life=host, tell=lambda line: None, note=lambda step, cause: None
    )
    tracker = MlflowTracker(
        Path(spool), uri=mlflow_uri, run_id=mlflow_run_id, flush_seconds=0.05, may_send=fence.check, wait_seconds=20
    )
    say("claimed")
    with keeper.beating():
        for line in sys.stdin:
            word, step = line.split()
            say(answer(word, int(step), store, keeper, saves, tracker, host))


def do(
    word: str, step: int, store: Store, keeper: RecordKeeper, saves: Saves, tracker: MlflowTracker, host: str
) -> object:
    match word:
        case "beat":
            keeper.update(state="running", step=step)
            return "done"
        case "append":
            tracker.append({"train/loss": step / 7}, step=step, unix_ms=step)
            return "done"
        case "sent":
            return tracker.close(timeout_seconds=30).points_pending
        case _:
            entries = upload_all(store, halves("model/w", random_tensor("float32", (8, 3))), step=step, generation=host)
            world = World.of(parse_config(job_text()))
            told = [
                saves.shard_saved(ShardSaved(step, rank, entry.to_json(), 1.0, None, world))
                for rank, entry in enumerate(entries)
            ]
            assert told[-1] is not None
            return asyncio.run(saves.commit(told[-1], living=[host]))


def answer(*asked: Any) -> str:
    try:
        return json.dumps(do(*asked))
    except RayniumError as error:
        return f"{type(error).__name__}: {error}"


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    # The takers of a test do not wait a minute.
    record_module.OWNER_LOST_SECONDS = float(sys.argv[6])
    record_module.HEARTBEAT_SECONDS = record_module.OWNER_LOST_SECONDS / 8
    main(*sys.argv[1:6])
