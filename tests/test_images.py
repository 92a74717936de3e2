"""Snapshot memory: private, and given back also by agents that had no time to."""

import subprocess
import sys
from pathlib import Path

from raynium.launch.images import make_image_folder


def test_a_killed_agents_memory_is_freed_by_the_next_agent_and_a_live_ones_is_not(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from raynium.launch.images import make_image_folder;"
        "(make_image_folder('dead', Path(sys.argv[1])) / 'image').write_bytes(b'x');"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert [path.name.rpartition("-")[2] for path in tmp_path.iterdir()] == ["dead"]
    (tmp_path / "raynium-somebody-else").mkdir()
    first = make_image_folder("first", tmp_path)
    second = make_image_folder("second", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [first.name, second.name, "raynium-somebody-else"]
    )
    assert first.stat().st_mode & 0o777 == 0o700
