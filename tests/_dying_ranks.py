"""What the ranks of `test_diagnosis.py` run in place of training. Imported in their processes by name."""

import os
import sys
import time
from typing import Any, NoReturn

from raynium.train.loop import Outcome

BROKEN_LINE = "(FATAL-RT-UNDEFINED-STATE) execution timeout (600000 ms) on Neuron Device 2 NC 1, model a.neff"
GRAPH = "MODULE_f412a6bebf32d04bf191+2c2d707e"
HUNG_LINE = "(FATAL-RT-UNDEFINED-STATE) missing collectives status on Neuron Device 0 NC 0, model a.neff"


def hang_on_a_broken_device(plan_json: str, link: Any) -> Outcome:
    """Rank 0's device is broken: it says so and never ends. Rank 1 waits for it, and ends first."""
    if os.environ["RANK"] == "0":
        sys.stdout.write(BROKEN_LINE + "\n")
        link.phase("up", 0)
        time.sleep(300)
    return end_of_a_hang()


def end_of_a_hang() -> NoReturn:
    time.sleep(0.5)  # rank 0's line is out by then: a runtime's timeouts are minutes
    sys.stdout.write(HUNG_LINE + "\n")
    raise RuntimeError("Failed to execute the model status=5 message=Operation timed out")


def fail_in_a_step(plan_json: str, link: Any) -> NoReturn:
    """Rank 1 has a fault of its own in the middle of a step; rank 0 only notices that its peer is gone."""
    import torch
    import torch.distributed as dist

    from raynium.rank.group import join_group

    join_group("gloo", rank=int(os.environ["RANK"]), world_size=2, timeout_seconds=60)
    numbers = torch.ones(4)
    dist.all_reduce(numbers)
    if os.environ["RANK"] == "1":
        [][1]
    while True:
        dist.all_reduce(numbers)


def cannot_load_a_graph(plan_json: str, link: Any) -> NoReturn:
    sys.stdout.write(f"ERROR  NMGR:kmgr_load_nn_post_metrics  Failed to load NN: /tmp/model.{GRAPH}.neff, err: 10\n")
    raise RuntimeError("nrt_load status=10")
