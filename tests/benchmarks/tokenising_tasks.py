"""What bench_tokenising.py runs in processes of its own, and in Ray's workers."""

import json
import os
import resource
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

BATCH_CHARACTERS = 4_000_000
RECORD_VARIABLE = "BENCH_TASKS"


def texts_of(source: str) -> list[str]:
    with Path(source).open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def report(began: float, cpu_seconds: float, tokens: int) -> None:
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps([time.perf_counter() - began, cpu_seconds, tokens, peak_mb]))


def bare(source: str, tokenizer: str) -> None:
    """`encode_batch_fast` of texts that are in memory, on all cores; the ids are not even looked at."""
    import tokenizers

    loaded = tokenizers.Tokenizer.from_file(tokenizer)
    batches, tokens = list(_batches(texts_of(source))), 0
    began, cpu_began = time.perf_counter(), time.process_time()
    for batch in batches:
        tokens += sum(map(len, loaded.encode_batch_fast(batch, add_special_tokens=False)))
    report(began, time.process_time() - cpu_began, tokens)


def datasets_map(source: str, tokenizer: str) -> None:
    """`datasets.map` with two processes, as its documentation tokenises; loading the JSON is not counted."""
    import datasets
    import tokenizers

    loaded = tokenizers.Tokenizer.from_file(tokenizer)

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        return {"ids": [each.ids for each in loaded.encode_batch_fast(batch["text"], add_special_tokens=False)]}

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=source, split="train", cache_dir=f"{source}.cache")
    began = time.perf_counter()
    mapped = rows.map(encode, batched=True, num_proc=2, remove_columns=["text"], load_from_cache_file=False)
    seconds = time.perf_counter() - began
    report(time.perf_counter() - seconds, float("nan"), sum(map(len, mapped["ids"])) if len(mapped) < 1000 else 0)


def ours(source: str, tokenizer: str, place: str) -> None:
    """`raynium data build` on a Ray cluster of this machine, whose workers have made a small store before."""
    from raynium.launch.ray_environment import set_ray_environment

    set_ray_environment(starts_cluster=True)
    import tokenising_tasks

    from raynium.data.build.store_build import build_from_recipe
    from raynium.data.build.tokenise import tokenise_split
    from raynium.data.manifest import Recipe
    from raynium.data.tokenizer import Tokenizer
    from raynium.launch.connect import connect
    from raynium.launch.tasks.ray_tasks import on_ray

    def runner(task: Any, work: Any, items: Any) -> Generator[Any]:
        return on_ray(tokenising_tasks.measured if task is tokenise_split else task, work, items)

    def build(source: str, place: str, **how: Any) -> Any:
        recipe = Recipe(sources=[source], text_field="text", heldout_fraction=0.05, dedup="none")
        return build_from_recipe(place, recipe, Tokenizer.load(tokenizer), runner=runner, tell=_to_stderr, **how)

    with connect(None):
        build(f"{source}.small.jsonl", f"{place}.small", max_left_out=1.0, split_bytes=50_000)
        Path(os.environ[RECORD_VARIABLE]).unlink()
        began = time.perf_counter()
        manifest = build(source, place)
        seconds = time.perf_counter() - began
    lines = [json.loads(line) for line in Path(os.environ[RECORD_VARIABLE]).read_text().splitlines()]
    cpu_seconds, peak_mb = sum(cpu for cpu, _ in lines), max(peak for _, peak in lines)
    print(json.dumps([seconds, cpu_seconds, manifest.train.tokens + manifest.heldout.tokens, peak_mb]))


def measured(work: Any, numbered: Any) -> Any:
    """`tokenise_split`, in a worker."""
    from raynium.data.build.tokenise import tokenise_split

    began = time.process_time()
    done = tokenise_split(work, numbered)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    with Path(os.environ[RECORD_VARIABLE]).open("a") as file:
        file.write(json.dumps([time.process_time() - began, peak_mb]) + "\n")
    return done


def _batches(texts: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
