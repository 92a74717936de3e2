"""Where the state of a generation comes from, and the weights that its run began with."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from raynium.accelerators.cpu import usable_cores
from raynium.checkpoint.base import ADAPTER_NAME, base_of
from raynium.checkpoint.catalog import open_checkpoint
from raynium.checkpoint.format.manifest import ImageInfo
from raynium.checkpoint.held import find_held
from raynium.checkpoint.state import MODEL_PREFIX
from raynium.engines.base import Engine
from raynium.models.adapter import is_adapters
from raynium.models.init import init_block
from raynium.rank.plan import RankPlan
from raynium.rank.snapshots import Snapshots
from raynium.storage.store import Store


def resumes(plan: RankPlan) -> bool:
    """Whether the generation goes on from a snapshot or checkpoint."""
    return bool(plan.resume_images) or plan.resume_step is not None


class Origin:
    """Of one generation, whose engine is built. Every rank calls the methods."""

    def __init__(self, plan: RankPlan, engine: Engine, snapshots: Snapshots):
        self._plan, self._engine, self._snapshots = plan, engine, snapshots
        self.run_store = Store(plan.run_url)

    def restore(self) -> int:
        """Gives the engine the state that the generation goes on from; returns its step."""
        plan = self._plan
        if self._engine.frozen_state() and plan.config.model.init is not None:
            self._snapshots.read_frozen(base_of(self.run_store))
        if plan.resume_images:
            images = plan.resume_images[int(os.environ["RANK"])]
            return self._snapshots.restore_images([ImageInfo.from_json(text) for text in images])
        if plan.held is not None:
            return self._snapshots.restore(find_held(Path(plan.held)))
        if plan.resume_step is not None:
            return self._snapshots.restore(open_checkpoint(self.run_store, plan.resume_step))
        self._read_beginning()
        return 0

    def to_the_beginning(self) -> None:
        """Gives the engine the weights that the run began with, where it has others; `restore` brings those back."""
        if not resumes(self._plan):
            return
        config, threads = self._plan.config, max(1, usable_cores() // int(os.environ["LOCAL_WORLD_SIZE"]))
        for chunk in self._engine.state():
            name = chunk.name.removeprefix(MODEL_PREFIX)
            if chunk.name.startswith(MODEL_PREFIX) and (config.model.init is None or is_adapters(name)):
                values = init_block(
                    name,
                    global_shape=chunk.global_shape,
                    offsets=chunk.offsets,
                    shape=tuple(chunk.tensor.shape),
                    seed=config.run.seed,
                    config=config.model,
                    threads=threads,
                )
                chunk.tensor.copy_(values)
        self._read_beginning()
        self._engine.set_updates(0)

    def identity(self) -> str:
        """Of the weights that the run began with: a text that others do not have."""
        config = self._plan.config
        known: dict[str, Any] = {"seed": config.run.seed, "model": config.model.model_dump(mode="json")}
        if config.model.init is not None:
            known = {"base": base_of(self.run_store).manifest.identity}
        if config.adapter.init is not None:
            adapter = base_of(self.run_store, name=ADAPTER_NAME).manifest.identity
            known |= {"adapter": adapter, "as": config.adapter.model_dump(mode="json")}
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def _read_beginning(self) -> None:
        """What was not drawn."""
        if self._plan.config.model.init is not None:
            self._snapshots.begin_with(base_of(self.run_store))
        if self._plan.config.adapter.init is not None:
            self._snapshots.begin_with_adapter(base_of(self.run_store, name=ADAPTER_NAME))
