"""Tokenising on Ray against the bare `tokenizers` library, on both cores: python tests/benchmarks/bench_tokenising.py

200 MB of JSONL: the Python standard library, again and again with its lines in another order. `bare` is
encode_batch_fast on all cores of texts that are in memory, nothing read or written, no id taken out. `ours` is a whole
build from the file to the committed store, by two workers of a Ray cluster that made a small store before; its CPU
seconds are those of the tasks. `datasets.map` (two processes, to Arrow files) runs where --datasets-python names an
interpreter that has it.
They take turns; the best of each counts. Passes with at least 0.9 of the bare library's speed, and 1 GB a worker.
"""

import json
import math
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from benchmark import heading, parser, verdict

from raynium.data.tokenizer import Tokenizer

FOLDER = Path(__file__).parent
LEAST_RATIO = 0.9
MOST_WORKER_MB = 1000.0
VOCAB_SIZE = 8192


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--megabytes", type=float, default=200)
    options.add_argument("--turns", type=int, default=2)
    options.add_argument("--datasets-python", help="an interpreter with `datasets` and `tokenizers`")
    arguments = options.parse_args()
    megabytes, turns = (1.0, 1) if arguments.tiny else (arguments.megabytes, arguments.turns)
    heading()
    with tempfile.TemporaryDirectory() as scratch:
        source, tokenizer = Path(scratch, "text.jsonl"), Path(scratch, "tokenizer.json")
        text_mb = write_text(source, megabytes) / 1e6
        texts = [json.loads(line)["text"] for line in Path(f"{source}.small.jsonl").read_text().splitlines()]
        tokenizer.write_text(Tokenizer.train(texts, vocab_size=300 if arguments.tiny else VOCAB_SIZE).file_text)
        contestants = {"bare": sys.executable, "ours": sys.executable}
        if arguments.datasets_python:
            contestants["datasets_map"] = arguments.datasets_python
        best: dict[str, list[float]] = {}
        print("| | MB/s | CPU s | tokens | peak RSS of a process, MB |\n|---|---|---|---|---|")
        for turn in range(turns):
            for name, python in contestants.items():
                result = run(python, name, source, tokenizer, Path(scratch, f"store-{turn}"))
                seconds, cpu_seconds, tokens, peak_mb = result
                print(
                    f"| {name} | {text_mb / seconds:.2f} | {cpu_seconds:.1f} | {tokens:,} | {peak_mb:.0f} |", flush=True
                )
                best[name] = min(best.get(name, result), result)
    ratio = best["bare"][0] / best["ours"][0]
    cpu_ratio = best["bare"][1] / best["ours"][1]
    print(f"\nours / bare: {ratio:.2f} in time, {cpu_ratio:.2f} in CPU time; required {LEAST_RATIO} in time")
    if "datasets_map" in best:
        print(f"ours / datasets.map: {best['datasets_map'][0] / best['ours'][0]:.2f} in time")
    print(f"a worker's peak: {best['ours'][3]:.0f} MB, at most {MOST_WORKER_MB:.0f}")
    return verdict(ratio >= LEAST_RATIO and best["ours"][3] <= MOST_WORKER_MB, arguments.tiny)


def run(python: str, name: str, source: Path, tokenizer: Path, place: Path) -> list[float]:
    """Seconds, CPU seconds, tokens, peak megabytes of a process."""
    environment = {**os.environ, "BENCH_TASKS": f"{place}.tasks", "PYTHONPATH": str(FOLDER)}
    if name == "datasets_map":
        environment["TOKENIZERS_PARALLELISM"] = "false"
    command = [python, str(FOLDER / "tokenising_tasks.py"), name, str(source), str(tokenizer)]
    command += [str(place)] if name == "ours" else []
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    return [math.nan if each is None else each for each in result]


def write_text(path: Path, megabytes: float) -> int:
    """Bytes of text. Beside it a small file of the same kind."""
    root, chance = Path(sysconfig.get_paths()["stdlib"]), random.Random(0)
    files = [each for each in sorted(root.rglob("*.py")) if not {"site-packages", "test"} & set(each.parts)]
    texts = [text for each in files if (text := each.read_text(encoding="utf-8", errors="replace")[:20_000])]
    written = number = 0
    with path.open("w") as file:
        while written < megabytes * 1e6:
            text = texts[number % len(texts)]
            if number >= len(texts):
                lines = text.splitlines(keepends=True)
                chance.shuffle(lines)
                text = "".join(lines)
            file.write(json.dumps({"text": text}) + "\n")
            written, number = written + len(text.encode()), number + 1
    small = "".join(json.dumps({"text": text}) + "\n" for text in texts[:200])
    Path(f"{path}.small.jsonl").write_text(small)
    return written


if __name__ == "__main__":
    sys.exit(main())
