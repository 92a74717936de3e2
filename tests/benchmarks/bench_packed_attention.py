"""A step over rows of several documents against the unmasked one: python tests/benchmarks/bench_packed_attention.py

Quickstart's model and sizes on one rank of one thread, forward and backward and AdamW, by the native engine. Both take
turns on the same tokens, so what is compared is attention within documents: the mask, positions that begin anew, and
that a causal kernel skips what a masked one does not. Passes if a step takes at most 1.15 times as long.
"""

import statistics
import sys
import time
from dataclasses import replace

import torch
from benchmark import ROOT, heading, parser, verdict

from raynium.accelerators.detect import detect
from raynium.config.load import load_config
from raynium.config.world import World
from raynium.data.batch import Batch
from raynium.engines.base import Votes
from raynium.engines.native import build_native_engine
from raynium.tasks.pretraining import Pretraining

MOST_RATIO = 1.15
TURNS = 40
# Tokens of a document, on average.
DOCUMENTS = (16, 64, 128)


def main() -> int:
    arguments = parser(__doc__).parse_args()
    heading()
    torch.set_num_threads(1)
    turns, documents = (2, DOCUMENTS[:1]) if arguments.tiny else (TURNS, DOCUMENTS)
    print("| compute | tokens of a document | plain step, ms | packed step, ms | ratio |")
    print("|---|---|---|---|---|")
    ratios = [compare(dtype, tokens, turns) for dtype in ("float32", "bfloat16") for tokens in documents]
    print(f"\nlargest ratio {max(ratios):.3f}, at most {MOST_RATIO}")
    return verdict(max(ratios) <= MOST_RATIO, arguments.tiny)


def compare(dtype: str, tokens_of_document: int, turns: int) -> float:
    """Print one row of the table; returns packed seconds / plain seconds, the median over turns."""
    overrides = ["data.path=/nowhere", "cluster.ranks_per_node=1", f"engine.dtype={dtype}"]
    config = load_config("quickstart", overrides, base_folder=ROOT)
    engine = build_native_engine(config, World.of(config), detect("cpu"), Pretraining())
    shape = (config.train.global_batch_size, config.data.seq_len)
    generator = torch.Generator().manual_seed(0)
    begins = torch.rand(shape, generator=generator) < 1 / tokens_of_document
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    plain = Batch(tokens, tokens.roll(-1, 1))
    packed = replace(plain, documents_BT=begins.long().cumsum(1).sub(begins[:, :1].long()))
    seconds: list[tuple[float, float]] = []
    for turn in range(turns + 2):
        of_turn = {}
        # The second of a turn finds warmer caches.
        for name, batch in (("plain", plain), ("packed", packed))[:: 1 if turn % 2 else -1]:
            began = time.thread_time()
            engine.step(batch, step=turn + 1, votes=Votes())
            of_turn[name] = time.thread_time() - began
        seconds.append((of_turn["plain"], of_turn["packed"]))
    engine.close()
    # The first two turns warm up.
    plain_ms, packed_ms = (1e3 * statistics.median(each) for each in zip(*seconds[2:], strict=True))
    ratio = statistics.median(packed / plain for plain, packed in seconds[2:])
    print(f"| {dtype} | {tokens_of_document} | {plain_ms:.1f} | {packed_ms:.1f} | {ratio:.3f} |", flush=True)
    return ratio


if __name__ == "__main__":
    sys.exit(main())
