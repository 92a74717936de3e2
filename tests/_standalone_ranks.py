"""Forks the ranks of `raynium.standalone` for each line of stdin, as torchrun would start them: a JSON object.

`standalone_ranks.py` starts this and writes the lines. Each is answered by a line with the exit status. torch and all
that ranks import is loaded once, here, where no thread has been started yet.
"""

import json
import multiprocessing
import os
import sys
import tempfile
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

# What a node's template loads for its ranks.
import raynium.rank.template  # noqa: F401
from raynium import standalone


def run_rank(rank: int, asked: dict[str, Any]) -> None:
    log = os.open(asked["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.clear()
    os.environ.update(asked["environment"], RANK=str(rank), LOCAL_RANK=str(rank))
    tempfile.tempdir = None
    os.chdir(asked["folder"])
    sys.argv = ["standalone", *asked["arguments"]]
    standalone.main()


def main() -> None:
    fork = multiprocessing.get_context("fork")
    for line in sys.stdin:
        asked = json.loads(line)
        ranks = range(int(asked["environment"]["WORLD_SIZE"]))
        processes = [fork.Process(target=run_rank, args=(rank, asked)) for rank in ranks]
        for process in processes:
            process.start()
        status = 0
        while living := {each.sentinel: each for each in processes if each.is_alive()}:
            for ended in [living[sentinel] for sentinel in wait(list(living), 0.02)]:
                ended.join()
                # As torchrun does: where one fails, the others end.
                if ended.exitcode and not status:
                    status = ended.exitcode
                    for each in processes:
                        each.terminate()
            if asked["kill_once"] is not None and Path(asked["kill_once"]).exists():
                for each in processes:
                    each.kill()
        sys.stdout.write(f"{status}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
