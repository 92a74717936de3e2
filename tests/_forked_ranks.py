"""Forks ranks for each folder that a test writes to stdin. `_engine_ranks.py` and its like hand it what a rank does.

A process of its own, because forking is only safe before torch has started threads.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from raynium.rank.template import warm_up_compiler

RunRank = Callable[[int, Path, dict[str, Any]], None]


def serve_folders(run_rank: RunRank, replies: TextIO = sys.stdout) -> None:
    """For each FOLDER of stdin: `run_rank(rank, FOLDER, scenario)` in every rank of FOLDER/scenario.json's config.

    A line in `replies` says that all have ended, and with which exit status.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    fork = multiprocessing.get_context("fork")
    compiler_is_warm = False
    for line in sys.stdin:
        folder = Path(line.rstrip("\n"))
        scenario = json.loads((folder / "scenario.json").read_text())
        if scenario["config"]["engine"]["compile"] != "none" and not compiler_is_warm:
            # As a node's template does: 5 s of each rank otherwise.
            warm_up_compiler("aot_eager")
            compiler_is_warm = True
        ranks = range(scenario["config"]["cluster"]["ranks_per_node"])
        processes = [fork.Process(target=run_rank, args=(rank, folder, scenario)) for rank in ranks]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        replies.write(f"{max(abs(process.exitcode or 0) for process in processes)}\n")
        replies.flush()
