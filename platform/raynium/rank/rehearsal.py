"""What a spare rank does before it is needed: builds an engine among ranks that are not there, and drops it.

DTensor works out each operator's sharding once for each shape and mesh of a process, and FSDP and the optimizer do more
when they are used first: two thirds of a rank's build, which one that has rehearsed finds done.
"""

import gc
import os

import torch.distributed as dist

from raynium.accelerators.detect import detect
from raynium.engines.native import build_native_engine
from raynium.engines.torch_compiles import TorchCompiles
from raynium.rank.plan import RankPlan
from raynium.tasks.registry import task_of


def rehearse(plan: RankPlan) -> None:
    """On a CPU, of the native engine. One block of the model is enough: all have the same shapes. No step is taken.

    No process group of this process is left, and nothing that a generation computes with; reads RANK and LOCAL_RANK.
    """
    # It knows the backend "fake", whose collectives return at once.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    config = plan.config.model_copy(update={"model": plan.config.model.model_copy(update={"num_layers": 1})})
    accelerator = detect(config.cluster.accelerator)
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    if plan.world.size > 1:
        dist.init_process_group("fake", rank=int(os.environ["RANK"]), world_size=plan.world.size, store=FakeStore())
    backend = TorchCompiles().backend(accelerator.compile_backend)
    engine = build_native_engine(
        config, plan.world, accelerator, task_of(config), compile_backend=backend, weights="loaded", base="loaded"
    )
    engine.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    del engine
    gc.collect()
