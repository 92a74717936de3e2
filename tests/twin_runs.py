"""Whole runs of one node agent in a process of its own, with the twin of TorchNeuron or without."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from raynium.config.schema import Config

PROGRAM = Path(__file__).with_name("_neuron_agent.py")


def run_agent(config: Config, run_folder: Path, document_folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """What `_neuron_agent.py` says of the run. `environment`: what `write_site` returns, or nothing for the CPU."""
    given = {
        "config": config.model_dump(mode="json"),
        "run_folder": str(run_folder),
        "data_folder": str(document_folder),
    }
    done = subprocess.run(
        [sys.executable, str(PROGRAM)],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ended"] == "finished", "\n".join([found["cause"], *found["log"][-40:]])
    return found
