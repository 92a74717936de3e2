"""The job that most tests run: two layers, two CPU ranks, four steps; and the text it learns from."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from raynium.data.loader import Loader
    from raynium.data.store import DocumentStore

JOB = """
run: {name: test}
cluster: {accelerator: cpu, ranks_per_node: 2}
model: {vocab_size: 512, hidden_size: 32, num_layers: 2, num_heads: 2, num_kv_heads: 1, head_dim: 16, ffn_size: 64,
        max_seq_len: 64}
data: {path: /nowhere, seq_len: 32}
train: {steps: 4, global_batch_size: 4}
"""


def job_text(changes: Mapping[str, Any] = {}, *, root: Path | None = None) -> str:
    """The job as a file has it, with `changes` by dotted name ("train.steps"; None takes a field away).

    With `root`, the run goes there and reads the documents that `build_documents(root)` makes.
    """
    job = yaml.safe_load(JOB)
    places = {} if root is None else {"run.root": str(root), "data.path": f"{root}/data"}
    for name, value in (places | dict(changes)).items():
        section, field = name.split(".")
        job.setdefault(section, {})[field] = value
        if value is None:
            del job[section][field]
    return yaml.safe_dump(job)


def build_documents(root: Path, *, num_files: int = 40) -> Path:
    """Builds a document store of made-up functions in root/data, and returns that path. About half a second."""
    from raynium.data.build.store_build import build_store

    (root / "text").mkdir()
    for number in range(num_files):
        text = "\n".join(f"def function_{number}_{line}(x): return x * {line}" for line in range(60))
        (root / f"text/{number}.py").write_text(text)
    build_store(root / "data", source=str(root / "text"), vocab_size=512, heldout_fraction=0.2)
    return root / "data"


def publish(store: Path, url: str, **options: Any) -> None:
    """Puts a store at a URL, as `aws s3 sync` would. options: of the `Store` there."""
    from raynium.storage.store import Store

    for path in store.iterdir():
        if path.is_file():
            Store(url, **options).upload_file(path.name, path)


def loader_of(
    store: "DocumentStore",
    *,
    seq_len: int,
    global_batch_size: int,
    data_rank: int = 0,
    data_size: int = 1,
    seed: int = 0,
) -> "Loader":
    """Of one store alone, without a config."""
    from raynium.data.loader import Loader
    from raynium.data.order import Order, RowShuffle
    from raynium.data.rows import StreamRows

    rows = StreamRows(store, seq_len)
    order = Order([RowShuffle(len(rows), seed=seed)])
    return Loader([rows], order, global_batch_size=global_batch_size, data_rank=data_rank, data_size=data_size)
