"""What a rank must know and the standard environment does not say. Made by the agent, read by the rank; no torch."""

import json
from dataclasses import dataclass, field

from raynium.config.schema import Config
from raynium.config.world import World


@dataclass(frozen=True)
class RankPlan:
    """The same for all ranks of a node and generation.

    run_url: the run's folder or URL. resume_step: of the checkpoint to start from; None: the initial weights.
    data_places: of the document stores, on this node's disk, or where they are streamed from. image_folder: shared
    memory that outlives the rank.
    """

    config: Config
    world: World
    run_url: str
    resume_step: int | None
    data_places: list[str]
    image_folder: str
    # Rank → the images its predecessor left there of `resume_step`, as checkpoint.manifest.ImageInfo in JSON: they are
    # used in place of the checkpoint. Empty: the checkpoint is read.
    resume_images: dict[int, list[str]] = field(default_factory=dict)
    # A file that says where ranks of another world left their images of `resume_step`, see `checkpoint/held.py`: these
    # are used in place of the checkpoint.
    held: str | None = None
    # Steps that are left out; see `run/protocol.py`, LeftOut.
    undone_steps: list[int] = field(default_factory=list)
    suspected_steps: list[int] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(vars(self) | {"config": self.config.model_dump(mode="json"), "world": self.world.to_json()})

    @classmethod
    def from_json(cls, text: str) -> "RankPlan":
        fields = json.loads(text)
        # JSON's keys are text.
        images = {int(rank): infos for rank, infos in fields["resume_images"].items()}
        config, world = Config.model_validate(fields["config"]), World.from_json(fields["world"])
        return cls(**fields | {"config": config, "world": world, "resume_images": images})
