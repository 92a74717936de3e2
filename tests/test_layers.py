"""The layers of the tests, as conftest.py describes them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LONGEST, PEERS, is_quick

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "tests").glob("test_*.py"))
# Collects as `make quick` does, and says which files it read and which heavy libraries that loaded.
COLLECT = """
import sys
import pytest

class Seen:
    def pytest_collection_finish(self, session):
        print("FILES", *sorted({item.path.name for item in session.items}))

pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "quick"], plugins=[Seen()])
print("LOADED", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_collecting_the_quick_layer_reads_all_its_files_and_loads_no_heavy_library() -> None:
    done = subprocess.run([sys.executable, "-c", COLLECT], capture_output=True, text=True, cwd=ROOT)
    found = {words[0]: set(words[1:]) for line in done.stdout.splitlines() if (words := line.split())}
    assert "FILES" in found and "ERROR" not in found, done.stdout[-3000:] + done.stderr
    assert found["FILES"] == {file.name for file in FILES if is_quick(file)}
    assert found["LOADED"] & {"torch", "ray", "mlflow", "transformers", "s3fs"} == set()


def test_a_file_is_quick_as_a_whole_or_not_at_all() -> None:
    for file in FILES:
        not_here = "slow|ray|s3|neuron|cuda" if is_quick(file) else "quick"
        assert re.findall(rf"\bmark\.(?:{not_here})\b", file.read_text()) == [], file.name


def test_peers_are_loaded_by_their_fixtures_only() -> None:
    for file in (ROOT / "tests").glob("*.py"):
        if file.name != "conftest.py":
            assert re.findall(rf"^\s*(?:import|from) (?:{'|'.join(PEERS)})\b", file.read_text(), re.MULTILINE) == [], (
                file.name
            )


def test_what_is_run_first_exists() -> None:
    assert set(LONGEST) <= {file.name for file in FILES}
