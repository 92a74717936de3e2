"""docs/walkthrough.md, typed again: each command ends well and prints what the page shows.

`python tests/test_walkthrough.py EMPTY_FOLDER` writes the outputs anew. Numbers, paths and what a model says may
differ; a line of only `…` stands for any lines.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SAMPLED = "-------------------- sampled from the model --------------------"
CHECKOUT = Path(__file__).parents[1]
PAGE = CHECKOUT / "docs" / "walkthrough.md"
ANY = "…"


@dataclass
class Typed:
    """One command of the page, and the lines that it shows below it. refused: it must fail, as the page says."""

    lines: list[str]
    shown: list[str] = field(default_factory=list)

    @property
    def command(self) -> str:
        return "\n".join(line[2:] for line in self.lines)

    @property
    def refused(self) -> bool:
        return any(line.startswith("error: ") for line in self.shown)


def typed(page: str) -> list[Typed]:
    found: list[Typed] = []
    for block in re.findall(r"^```console\n(.*?)^```$", page, flags=re.S | re.M):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append(Typed([line]))
            elif line == ">" or line.startswith("> "):
                found[-1].lines.append(line)
            else:
                found[-1].shown.append(line)
    return found


def run_typed(each: Typed, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAYNIUM_CHECKOUT": str(CHECKOUT),
        "COLUMNS": "110",
    }
    script = f"set -o pipefail\n{each.command}\n"
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


# What may differ → what it may be. The first that fits at a place is taken.
OPEN = {
    # Its causes come by size.
    "^goodput: .*": "goodput: .*",
    r"\s+": r"\s+",
    ANY: ".*",
    r"(?:file://)?(?:/[\w.#-]+)+/?": r"(?:file://)?(?:/[\w.#-]+)+/?",
    r"[0-9a-f]{32}": "[0-9a-f]{32}",
    r"\d+(?:[.,:-]+\d+)*": r"[\d.,:-]+",
}


def pattern(line: str) -> str:
    """A regular expression for lines that say the same of other numbers, at another place."""
    parts = re.split("(" + "|".join(OPEN) + ")", line.rstrip())
    return "".join(
        next((may_be for what, may_be in OPEN.items() if re.fullmatch(what, part)), re.escape(part)) for part in parts
    )


def interrupted(shown: list[str]) -> list[str]:
    """With room for what a slow machine has to say in between."""
    return [ANY, *(part for line in shown for part in (line, ANY))]


def unsampled(shown: list[str]) -> Iterator[str]:
    """What a model said is left open."""
    speaks = False
    for line in shown:
        if speaks and not line.startswith("-" * 20):
            yield ANY
        else:
            yield line
            speaks = line == SAMPLED


def shows(printed: list[str], shown: list[str]) -> str | None:
    """The first shown line that was not printed where the page has it; None if all were."""
    at, anywhere = 0, False
    for line in unsampled(shown):
        if line.strip() == ANY:
            anywhere = True
            continue
        ahead = range(at, len(printed)) if anywhere else range(at, min(at + 1, len(printed)))
        found = next((index for index in ahead if re.fullmatch(pattern(line), printed[index].rstrip())), None)
        if found is None:
            return line
        at, anywhere = found + 1, False
    return None if at == len(printed) or anywhere else f"(no line) where {printed[at]!r} was printed"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_walk_goes_as_its_page_says(transformers: object) -> None:
    # A short name: long ones make longer lines than the page has.
    with tempfile.TemporaryDirectory(prefix="w") as folder:
        walk(Path(folder))


def walk(folder: Path) -> None:
    for each in typed(PAGE.read_text()):
        done = run_typed(each, folder)
        assert (done.returncode != 0) == each.refused, f"{each.command}\n{done.stdout}"
        missed = shows(
            done.stdout.splitlines(), interrupted(each.shown) if "raynium train" in each.command else each.shown
        )
        assert missed is None, f"{each.command}\nprinted:\n{done.stdout}\nbut not: {missed}"


@pytest.mark.parametrize(
    ("printed", "shown", "missed"),
    [
        (["step 1,024 of /tmp/x"], ["step 7 of /walk/runs"], None),
        (["a", "b", "c"], ["a", "…", "c"], None),
        (["a", "b"], ["a", "…"], None),
        (["a", "b"], ["a"], "(no line) where 'b' was printed"),
        (["a"], ["a", "b"], "b"),
        (["loss 2.5"], ["los 2.5"], "los 2.5"),
        ([], ["…", "a"], "a"),
    ],
)
def test_what_differs_from_the_page_is_told(printed: list[str], shown: list[str], missed: str | None) -> None:
    assert shows(printed, shown) == missed


def rewrite(folder: Path) -> None:
    page = PAGE.read_text()
    for each in typed(page):
        done = run_typed(each, folder)
        before = "\n".join([*each.lines, *each.shown]) + "\n"
        assert before in page
        page = page.replace(before, "\n".join([*each.lines, *shortened(done.stdout.splitlines(), folder)]) + "\n", 1)
    PAGE.write_text(page)


def shortened(printed: list[str], folder: Path) -> list[str]:
    """Without what differs from run to run: progress between its ends, the port that was free; the folder renamed."""
    lines = [line.rstrip().replace(str(folder), "/walk") for line in printed]
    steps = [index for index, line in enumerate(lines) if re.match(r"step \d", line)]
    for index in steps[1:-1]:
        lines[index] = ANY
    for index, line in enumerate(lines):
        if "served by: " in line:
            lines[index] = line.partition("served by: ")[0] + "served by: raynium ui " + ANY
    return [line for index, line in enumerate(lines) if line != ANY or lines[index - 1] != ANY]


if __name__ == "__main__":
    rewrite(Path(sys.argv[1]))
