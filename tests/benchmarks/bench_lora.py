"""Our LoRA step beside PEFT's on the same model and batches: python tests/benchmarks/bench_lora.py

Both train rank 16 on all linear layers of one Llama in float32 from the same weights, each in a process of its own with
one thread, and take turns of a few steps, so that what else the machine does falls on both. PEFT's loop is
transformers' model with `get_peft_model`, F.cross_entropy, clipping and fused AdamW on what learns. Memory is the peak
of resident memory over what the process had before it built its model. Passes if our step takes at most 1.05 times
PEFT's, in the median of turns, and our peak is at most PEFT's.
"""

import statistics
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmark import heading, parser, verdict
from turns import by_turns, in_processes, peaks, take_turns

sys.path.insert(0, str(Path(__file__).parents[1]))
from peer_models import transformers_model
from peft_twin import first_weights, peft_model

from raynium.accelerators.cpu import CpuAccelerator
from raynium.config.schema import Config, ModelSection
from raynium.config.world import World
from raynium.data.batch import Batch
from raynium.engines.base import Votes
from raynium.engines.native import build_native_engine
from raynium.tasks.pretraining import Pretraining

MOST_TIME, MOST_MEMORY = 1.05, 1.0
ROWS = 4


def config(tiny: bool) -> Config:
    sizes = {"vocab_size": 8192, "hidden_size": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64}
    small = {"vocab_size": 256, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    seq_len = 16 if tiny else 512
    model = (small if tiny else sizes) | {"ffn_size": 48 if tiny else 1408, "max_seq_len": seq_len}
    return Config.model_validate(
        {
            "run": {"name": "bench"},
            "cluster": {"accelerator": "cpu"},
            "model": model,
            "adapter": {"rank": 16},
            "data": {"path": "/nowhere", "seq_len": seq_len},
            "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "weight_decay": 0.0},
            "train": {"steps": 10_000, "global_batch_size": ROWS, "micro_batch_size": ROWS},
        }
    )


def batch_of(config: Config, step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    shape = (ROWS, config.data.seq_len + 1)
    ids = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), {}, None)


def ours(config: Config) -> Callable[[int], float]:
    engine = build_native_engine(config, World.of(config), CpuAccelerator(), Pretraining())
    return lambda step: engine.step(batch_of(config, step), step=step, votes=Votes()).loss


def theirs(config: Config) -> Callable[[int], float]:
    import peft
    import transformers

    def model_of(model: ModelSection) -> Any:
        return transformers_model(transformers, model, use_cache=False)

    model = peft_model(peft, model_of, config, first_weights(config)).train()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(number: int) -> float:
        batch = batch_of(config, number)
        logits = model(input_ids=batch.tokens_BT).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


LOOPS = {"ours": ours, "PEFT": theirs}


def run(name: str, tiny: bool, steps: int, connection: Connection) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if name == "PEFT":
        import peft
        import transformers  # noqa: F401

        del peft
    take_turns(lambda: LOOPS[name](config(tiny)), connection, steps=steps)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=8)
    options.add_argument("--steps", type=int, default=2, help="of a turn")
    arguments = options.parse_args()
    turns, steps = (1, 1) if arguments.tiny else (arguments.turns, arguments.steps)
    heading()
    with in_processes(run, LOOPS, arguments.tiny, steps) as connections:
        answers = by_turns(connections, turns)
        memory = peaks(connections)
    seconds = {name: [taken / steps for taken, _ in of_loop] for name, of_loop in answers.items()}
    losses = {name: of_loop[-1][1] for name, of_loop in answers.items()}
    ratio = statistics.median(mine / peer for mine, peer in zip(seconds["ours"], seconds["PEFT"], strict=True))
    print("| loop | step, s | peak memory, MB | last loss |")
    print("|---|---|---|---|")
    for name in LOOPS:
        print(f"| {name} | {statistics.median(seconds[name]):.3f} | {memory[name] / 1e6:.0f} | {losses[name]:.5f} |")
    of_memory = memory["ours"] / memory["PEFT"]
    print(f"\nours / PEFT: step {ratio:.3f} (at most {MOST_TIME}), memory {of_memory:.3f} (at most {MOST_MEMORY:g})")
    return verdict(ratio <= MOST_TIME and of_memory <= MOST_MEMORY, arguments.tiny)


if __name__ == "__main__":
    sys.exit(main())
