"""Our SFT step beside TRL's trainer on the same packed rows: python tests/benchmarks/bench_sft.py

Both train one Llama in float32 on rows of several chats, a third of whose tokens are labels; each in a process of its
own with one thread, and they take turns of a few steps, so that what else the machine does falls on both. TRL's is
SFTTrainer as it comes (AdamW fused), given the rows with their position ids, by which transformers keeps attention
within a chat. A step is everything between two batches: forward, backward, clipping, update. Passes if ours takes at
most as long, in the median of turns.
"""

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from benchmark import heading, parser, verdict
from turns import by_turns, in_processes

sys.path.insert(0, str(Path(__file__).parents[1]))
from peer_models import trainer_arguments, transformers_model

from raynium.accelerators.cpu import CpuAccelerator
from raynium.config.schema import Config
from raynium.config.world import World
from raynium.data.batch import IGNORED_LABEL, Batch
from raynium.engines.base import Votes
from raynium.engines.native import build_native_engine
from raynium.tasks.sft import Sft

MOST_TIME = 1.0
ROWS, CHATS_OF_ROW = 4, 6
MOST_STEPS = 10_000


def config(tiny: bool) -> Config:
    sizes = {"vocab_size": 8192, "hidden_size": 384, "num_layers": 6, "num_heads": 6, "num_kv_heads": 3, "head_dim": 64}
    small = {"vocab_size": 256, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    seq_len = 48 if tiny else 512
    model = (small if tiny else sizes) | {"ffn_size": 48 if tiny else 1024, "max_seq_len": seq_len + 1}
    return Config.model_validate(
        {
            "run": {"name": "bench"},
            "task": "sft",
            "cluster": {"accelerator": "cpu"},
            "model": model,
            "data": {"path": "/nowhere", "seq_len": seq_len, "packing": "documents", "records": "chats"},
            "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "weight_decay": 0.0},
            "train": {"steps": MOST_STEPS, "global_batch_size": ROWS, "micro_batch_size": ROWS},
        }
    )


def row_of(config: Config, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and labels [T + 1] as TRL has them, a label at its own place, and the number of each place's chat."""
    generator = torch.Generator().manual_seed(number)
    length = config.data.seq_len + 1
    ids = torch.randint(0, config.model.vocab_size, (length,), generator=generator)
    begins = torch.randperm(length - 1, generator=generator)[: CHATS_OF_ROW - 1].sort().values + 1
    documents = torch.zeros(length, dtype=torch.long)
    documents[begins] = 1
    labels = ids.where(torch.rand(length, generator=generator) < 1 / 3, IGNORED_LABEL)
    # The first token of a chat follows nothing.
    labels[begins] = labels[0] = IGNORED_LABEL
    return ids, labels, documents.cumsum(0)


def ours(config: Config, look: "Look") -> None:
    engine = build_native_engine(config, World.of(config), CpuAccelerator(), Sft())
    for step in range(1, MOST_STEPS):
        rows = [row_of(config, (step - 1) * ROWS + number) for number in range(ROWS)]
        ids, labels, documents = (torch.stack(column) for column in zip(*rows, strict=True))
        batch = Batch(ids[:, :-1].contiguous(), labels[:, 1:].contiguous(), {}, documents[:, :-1].contiguous())
        look.begin()
        result = engine.step(batch, step=step, votes=Votes())
        if not look.end(result.loss):
            return


def theirs(config: Config, look: "Look") -> None:
    import datasets
    import transformers

    # Its classes are loaded when they are asked for, which a checker of types does not see.
    trl: Any = import_module("trl")

    built = transformers_model(transformers, config.model, use_cache=False)

    class Steps(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            look.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = not look.end(0.0)

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels", "position_ids")}

    rows = []
    for number in range(512 * ROWS):
        ids, labels, documents = row_of(config, number)
        begins = torch.searchsorted(documents, documents)
        positions = torch.arange(len(ids)) - begins
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist(), "position_ids": positions.tolist()})
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), eos_token="e", pad_token="e")
        trainer = trl.SFTTrainer(
            model=built,
            args=trl.SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=ROWS,
                max_length=None,
                gradient_checkpointing=False,
                remove_unused_columns=False,
                logging_steps=MOST_STEPS,
                **trainer_arguments(config),
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            data_collator=collate,
            callbacks=[Steps()],
        )
        trainer.train()


def _tokenizer() -> Any:
    import tokenizers

    return tokenizers.Tokenizer(tokenizers.models.WordLevel({"e": 0}, unk_token="e"))


LOOPS: dict[str, Callable[[Config, "Look"], None]] = {"ours": ours, "TRL": theirs}


class Look:
    """Of a loop: waits for "go" before each turn, and answers with its seconds a step."""

    def __init__(self, connection: Connection, steps: int):
        self._connection, self._steps = connection, steps
        self._seconds: list[float] = []

    def begin(self) -> None:
        if not self._seconds:
            self._connection.recv()
        self._began = time.perf_counter()

    def end(self, loss: float) -> bool:
        self._seconds.append(time.perf_counter() - self._began)
        if len(self._seconds) == self._steps:
            self._connection.send(sum(self._seconds) / self._steps)
            self._seconds.clear()
        return True


def run(name: str, tiny: bool, steps: int, connection: Connection) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    LOOPS[name](config(tiny), Look(connection, steps))


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=10)
    options.add_argument("--steps", type=int, default=3, help="of a turn")
    arguments = options.parse_args()
    turns, steps = (1, 1) if arguments.tiny else (arguments.turns, arguments.steps)
    heading()
    with in_processes(run, LOOPS, arguments.tiny, steps) as connections:
        seconds = by_turns(connections, turns)
    ratio = statistics.median(mine / peer for mine, peer in zip(seconds["ours"], seconds["TRL"], strict=True))
    print("| loop | step, s |")
    print("|---|---|")
    for name in LOOPS:
        print(f"| {name} | {statistics.median(seconds[name]):.3f} |")
    print(f"\nours / TRL {ratio:.3f}, at most {MOST_TIME:g}")
    return verdict(ratio <= MOST_TIME, arguments.tiny)


if __name__ == "__main__":
    sys.exit(main())
