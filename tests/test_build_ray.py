"""Tokenising on a real Ray cluster: the same bytes whatever number of workers there is, and whichever of them dies."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from raynium.data.build.store_build import build_from_recipe
from raynium.data.manifest import Recipe
from raynium.data.runner import in_this_process
from raynium.data.tokenizer import Tokenizer
from raynium.data.verify import verify_store

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

TESTS = Path(__file__).parent
NUM_SPLITS = 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of 200 kB, a tokenizer, and the store that this process makes of them."""
    folder, chance = tmp_path_factory.mktemp("build"), random.Random(3)
    words = [f"word{i}" for i in range(500)]
    (folder / "source").mkdir()
    for name in ("a", "b"):
        texts = (" ".join(chance.choices(words, k=chance.randrange(5, 200))) for _ in range(150))
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"source/{name}.jsonl").write_text("".join([*lines, *lines[:9]]))
    (folder / "tokenizer.json").write_text(Tokenizer.train([" ".join(words)], vocab_size=600).file_text)
    recipe = Recipe(sources=[str(folder / "source")], text_field="text", heldout_fraction=0.2, dedup="exact")
    build_from_recipe(
        folder / "here",
        recipe,
        Tokenizer.load(folder / "tokenizer.json"),
        runner=in_this_process,
        tell=print,
        split_bytes=20_000,
        unit_bytes=4096,
    )
    return folder


def build(folder: Path, name: str, cpus: int, then: str = "", *, place: str | None = None) -> str:
    """The standard error of a build that is to fail, else of one that has not."""
    command = [sys.executable, TESTS / "_build_on_ray.py", place or folder / name, folder / "source"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [*map(str, command), str(folder / "tokenizer.json"), str(cpus), then],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == (then != "stop"), done.stderr
    return done.stderr


def tasks_of(folder: Path, name: str) -> list[list[str]]:
    """Of each task that began: number of its split, its process, whether the tokenizer was to use several threads."""
    return [line.split() for line in (folder / f"{name}.tasks").read_text().splitlines()]


def same_bytes(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir() if path.is_file())
    assert names == sorted(path.name for path in other.iterdir() if path.is_file())
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_any_number_of_workers_gives_the_same_bytes(folder: Path, cpus: int):
    build(folder, f"by-{cpus}", cpus)
    assert same_bytes(folder / f"by-{cpus}", folder / "here")
    tasks = tasks_of(folder, f"by-{cpus}")
    assert sorted(int(number) for number, _, _ in tasks) == list(range(NUM_SPLITS))
    assert {several for _, _, several in tasks} == {"false"}
    assert len({process for _, process, _ in tasks}) <= cpus


def test_a_worker_that_is_killed_in_the_middle_of_a_split_changes_nothing(folder: Path):
    build(folder, "killed", 2, "die")
    assert (folder / "killed.tasks.died").exists()
    assert sorted(int(number) for number, _, _ in tasks_of(folder, "killed")) == sorted([*range(NUM_SPLITS), 2])
    assert same_bytes(folder / "killed", folder / "here")


def test_a_build_that_broke_off_goes_on(folder: Path):
    assert "stopped by the test" in build(folder, "stopped", 1, "stop")
    parts = {int(path.name[:5]) for path in (folder / "stopped/building/parts").iterdir()}
    assert 3 <= len(parts) < NUM_SPLITS and not (folder / "stopped/manifest.json").exists()
    (folder / "stopped.tasks").unlink()
    build(folder, "stopped", 2)
    assert {int(number) for number, _, _ in tasks_of(folder, "stopped")} == {*range(NUM_SPLITS)} - parts
    assert same_bytes(folder / "stopped", folder / "here")


def test_two_builders_on_two_clusters_make_one_store(folder: Path):
    command = [sys.executable, str(TESTS / "_build_on_ray.py"), str(folder / "both"), str(folder / "source")]
    command += [str(folder / "tokenizer.json"), "1"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    builders = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)
    ]
    errors = [builder.communicate()[1] for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0], errors
    assert len(tasks_of(folder, "both")) == NUM_SPLITS
    assert same_bytes(folder / "both", folder / "here")


def test_the_command_builds_and_shows_a_store(folder: Path):
    raynium = str(Path(sys.executable).parent / "raynium")
    command = [raynium, "data", "build", "web", "--from", folder / "source", "--tokenizer", folder]
    command += ["--root", folder, "--heldout-fraction", "0.2", "--dedup", "exact"]
    built = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert verify_store(folder / "data/web").identity == verify_store(folder / "here").identity
    shown = subprocess.run([raynium, "data", "show", "web", "--root", str(folder)], capture_output=True, text=True)
    assert shown.returncode == 0 and shown.stdout in built.stdout
    assert "18 equal to an earlier document (first: a.jsonl:" in shown.stdout
    again = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert again.returncode == 0 and "is there already" in again.stdout and "Ray" not in again.stdout
    other = subprocess.run([*map(str, command[:-2])], capture_output=True, text=True)
    assert other.returncode == 1 and "built with dedup = 'exact', and is asked for with 'none'" in other.stderr
