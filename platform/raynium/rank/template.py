"""Loads into a node's template what its ranks would load, each time anew.

Only the template imports this (`node/ranks.py`), and importing modules is all that a template can be asked to do.
Nothing in here may start a thread or open a device: neither survives a fork.
"""

# By this `socket` reads a host name.
import encodings.idna  # noqa: F401
import gc
import logging

# By this a rank takes over its pipes.
import multiprocessing.popen_forkserver  # noqa: F401
import os

import torch
import torch._dynamo

# The one that torch's compiler uses.
from torch.hub import tqdm  # pyright: ignore[reportPrivateImportUsage]

import raynium.rank.build  # noqa: F401
from raynium.accelerators.detect import look
from raynium.rank.entry import COMPILE_BACKEND_VARIABLE

logger = logging.getLogger(__name__)


def warm_up_compiler(backend: str) -> None:
    """Compiles a function of one line, for what torch loads and the tables it fills on the way.

    A rank whose graphs are all in inductor's cache is back at its first step in half of the time. A backend of a device
    cannot be had in here: what torch does before it is warmed up then.
    """
    import torch._inductor.config as inductor_config

    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x @ weight, (8,)).sum()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # torch's compiler makes bars that nobody sees, and tqdm a thread that looks after them.
    tqdm.monitor_interval = 0
    with inductor_config.patch(compile_threads=1, fx_graph_cache=False):
        compiled = torch.compile(function, backend="inductor" if backend == "inductor" else "aot_eager", dynamic=False)
        x, weight = torch.ones(8, 8), torch.ones(8, 8, requires_grad=True)
        compiled(x, weight)
        # Evaluation's graphs go another way.
        with torch.no_grad():
            compiled(x, weight)
    torch._dynamo.reset()
    torch.set_num_threads(threads)


if COMPILE_BACKEND_VARIABLE in os.environ:
    try:
        warm_up_compiler(os.environ[COMPILE_BACKEND_VARIABLE])
    except Exception as error:
        # Whatever it is, ranks meet it again, and their agent tells the user.
        logger.warning("ranks will start more slowly, because the compiler does not work here: %s", error)

# It keeps what it has read of installed packages.
look()
# What is here lives as long as the ranks. Else the garbage collector goes through its 300,000 objects in each of them,
# which takes 0.15 s of a step, and 76 MB of memory that they had shared.
gc.collect()
gc.freeze()
