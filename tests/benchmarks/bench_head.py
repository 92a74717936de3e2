"""A head of 150,000 columns beside TRL's, which works in tiles too: python tests/benchmarks/bench_head.py

Both train one small Llama with a vocabulary of 151,936 on 8,192 tokens a step, in float32, each in a process of its own
with one thread. Ours is the engine's step; TRL's is transformers' model with `add_fused_lm_head`, as its SFT and DPO
trainers patch it, clipping and fused AdamW. "all" has a label at each token, "third" at every third, "dpo" pairs of
rows scored by DPO. Memory is the peak of resident memory over what the process had before it built its model. Passes if
our peak is at most TRL's in each case. The whole table of logits alone would be 5.0 GB.
"""

import statistics
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmark import heading, parser, verdict
from turns import by_turns, in_processes, peaks, take_turns

sys.path.insert(0, str(Path(__file__).parents[1]))
from peer_models import transformers_model

from raynium.accelerators.cpu import CpuAccelerator
from raynium.config.schema import Config
from raynium.config.world import World
from raynium.data.batch import IGNORED_LABEL, Batch
from raynium.engines.base import Votes
from raynium.engines.native import build_native_engine
from raynium.tasks.base import Task
from raynium.tasks.preferences import Dpo
from raynium.tasks.sft import Sft

MOST_MEMORY = 1.0
ROWS, BETA = 16, 0.1
CASES = ("all", "third", "dpo")


def config(tiny: bool) -> Config:
    seq_len = 16 if tiny else 512
    sizes = {"hidden_size": 256, "num_layers": 1, "num_heads": 4, "num_kv_heads": 4, "head_dim": 64, "ffn_size": 512}
    return Config.model_validate(
        {
            "run": {"name": "bench"},
            "cluster": {"accelerator": "cpu"},
            "model": sizes | {"vocab_size": 1024 if tiny else 151_936, "max_seq_len": seq_len},
            "data": {"path": "/nowhere", "seq_len": seq_len},
            "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "weight_decay": 0.0},
            "train": {"steps": 10_000, "global_batch_size": ROWS, "micro_batch_size": ROWS},
        }
    )


def batch_of(config: Config, case: str, step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, config.model.vocab_size, (ROWS, config.data.seq_len + 1), generator=generator)
    labels = ids[:, 1:].contiguous()
    if case == "third":
        labels = labels.where(torch.rand(labels.shape, generator=generator) < 1 / 3, IGNORED_LABEL)
    others = {"reference": torch.full((ROWS,), -12.0 * config.data.seq_len)} if case == "dpo" else {}
    return Batch(ids[:, :-1].contiguous(), labels, others, None)


def ours(config: Config, case: str) -> Callable[[int], float]:
    task: Task = Dpo(beta=BETA) if case == "dpo" else Sft()
    engine = build_native_engine(config, World.of(config), CpuAccelerator(), task)
    return lambda step: engine.step(batch_of(config, case, step), step=step, votes=Votes()).loss


def theirs(config: Config, case: str) -> Callable[[int], float]:
    import transformers

    trl_utils: Any = import_module("trl.trainer.utils")
    model = transformers_model(transformers, config.model, use_cache=False).train()
    trl_utils.add_fused_lm_head(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(number: int) -> float:
        batch = batch_of(config, case, number)
        out = model(input_ids=batch.tokens_BT, shift_labels=batch.labels_BT, fused_lm_head=True)
        if case == "dpo":
            rewards_S2 = BETA * (out.log_probs.sum(1) - batch.others["reference"]).unflatten(0, (-1, 2))
            loss = -F.logsigmoid(rewards_S2[:, 0] - rewards_S2[:, 1]).mean()
        else:
            loss = -out.log_probs.sum() / (batch.labels_BT != IGNORED_LABEL).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


LOOPS = {"ours": ours, "TRL": theirs}


def run(name: str, tiny: bool, case: str, connection: Connection) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if name == "TRL":
        import transformers  # noqa: F401

        import_module("trl.trainer.utils")
    take_turns(lambda: LOOPS[name](config(tiny), case), connection)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=3)
    arguments = options.parse_args()
    heading()
    print("| labels | loop | step, s | peak memory, MB | first loss |")
    print("|---|---|---|---|---|")
    ratios = {}
    for case in CASES:
        with in_processes(run, LOOPS, arguments.tiny, case) as connections:
            answers = by_turns(connections, 1 if arguments.tiny else arguments.turns)
            memory = peaks(connections)
        seconds = {name: [taken for taken, _ in of_loop] for name, of_loop in answers.items()}
        for name, of_loop in answers.items():
            taken = statistics.median(seconds[name])
            print(f"| {case} | {name} | {taken:.2f} | {memory[name] / 1e6:.0f} | {of_loop[0][1]:.4f} |")
        time_ratio = statistics.median(mine / peer for mine, peer in zip(seconds["ours"], seconds["TRL"], strict=True))
        ratios[case] = (time_ratio, memory["ours"] / memory["TRL"])
    print()
    for case, (time_ratio, of_memory) in ratios.items():
        print(f"{case}: ours / TRL step {time_ratio:.3f}, memory {of_memory:.3f} (at most {MOST_MEMORY:g})")
    return verdict(all(of_memory <= MOST_MEMORY for _, of_memory in ratios.values()), arguments.tiny)


if __name__ == "__main__":
    sys.exit(main())
