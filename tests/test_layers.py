"""The layers of the tests, as conftest.py describes them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LONGEST, is_quick

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

pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-m", sys.argv[1]], plugins=[Seen()])
print("LOADED", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def collect(marks: str, *, without: tuple[str, ...] = ()) -> dict[str, set[str]]:
    """What a pytest of its own collects for `-m marks`, in a Python that cannot import `without`."""
    blocked = "".join(f"import sys; sys.modules[{name!r}] = None\n" for name in without)
    done = subprocess.run([sys.executable, "-c", blocked + COLLECT, marks], capture_output=True, text=True, cwd=ROOT)
    lines = [line.split() for line in done.stdout.splitlines()]
    found = {words[0]: set(words[1:]) for words in lines if words and words[0] in ("FILES", "LOADED", "ERROR")}
    assert "FILES" in found and "ERROR" not in found, done.stdout[-3000:] + done.stderr
    return found


def test_collecting_the_quick_layer_reads_all_its_files_and_loads_no_heavy_library() -> None:
    collected = collect("quick")
    assert collected["FILES"] == {file.name for file in FILES if is_quick(file)}
    assert collected["LOADED"] & {"torch", "ray", "mlflow", "transformers", "s3fs"} == set()


def test_a_file_is_quick_as_a_whole_or_not_at_all() -> None:
    for file in FILES:
        not_here = "slow|ray|s3|neuron|cuda" if is_quick(file) else "quick"
        assert re.findall(rf"\bmark\.(?:{not_here})\b", file.read_text()) == [], file.name


def test_what_is_run_first_exists() -> None:
    assert set(LONGEST) <= {file.name for file in FILES}
