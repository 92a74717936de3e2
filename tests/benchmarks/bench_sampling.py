"""Sampling beside `transformers.generate` with its cache: python tests/benchmarks/bench_sampling.py

Both hold the same weights, drawn at random, in float32, on one thread of one process, and take turns; seconds are that
thread's own, so that they leave out what else the machine does. A call reads the prompts, of 16 tokens each, and draws
`--tokens` more for each of them: greedily, and by temperature and top-p as `raynium sample` may. Greedy tokens must be
equal. Passes if ours draws at least as many tokens a second in every row.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmark import heading, parser, verdict

sys.path.insert(0, str(Path(__file__).parents[1]))
from peer_models import transformers_model

from raynium.config.schema import ModelSection
from raynium.generation.continuation import Continuation
from raynium.generation.drawing import Drawing
from raynium.models.decoder import Decoder
from raynium.models.names import hugging_face_names

LEAST = 1.0
PROMPT_TOKENS = 16
QUICKSTART = {"vocab_size": 2048, "hidden_size": 192, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
QUICKSTART |= {"head_dim": 48, "ffn_size": 512, "max_seq_len": 512}
LARGE = {"vocab_size": 16_384, "hidden_size": 768, "num_layers": 12, "num_heads": 12, "num_kv_heads": 4}
LARGE |= {"head_dim": 64, "ffn_size": 2560, "max_seq_len": 512}
TINY = {"vocab_size": 64, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
TINY |= {"head_dim": 8, "ffn_size": 32, "max_seq_len": 64}
DRAWN = {"temperature": 0.8, "top_p": 0.9}


def models(sizes: dict[str, Any]) -> tuple[Decoder, Any]:
    """Ours and theirs, with the very same tensors."""
    section = ModelSection(**sizes, embeddings="tied")
    torch.manual_seed(0)
    theirs = transformers_model(transformers, section, pad_token_id=0, eos_token_id=None, bos_token_id=None).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.05)
    weights = theirs.state_dict()
    own = {name: weights[other] for name, other in hugging_face_names(section).items()}
    with torch.device("meta"):
        ours = Decoder(section)
    ours.load_state_dict(own | {"head.weight": own["embedding.weight"]}, assign=True)
    return ours.eval(), theirs


def our_tokens(model: Decoder, prompts: list[list[int]], count: int, drawing: Drawing) -> list[list[int]]:
    continuation = Continuation(model, prompts, silent=[], drawing=drawing)
    return [list(row) for row in zip(*(continuation.draw() for _ in range(count)), strict=True)]


def their_tokens(model: Any, prompts: list[list[int]], count: int, drawing: Drawing) -> list[list[int]]:
    ids = torch.tensor(prompts)
    asked: dict[str, Any] = {"max_new_tokens": count, "attention_mask": torch.ones_like(ids), "use_cache": True}
    if drawing.temperature == 0:
        asked |= {"do_sample": False}
    else:
        asked |= {"do_sample": True, "temperature": drawing.temperature, "top_p": drawing.top_p, "top_k": 0}
    # Its types do not say that a model can be called.
    generate: Any = model.generate
    return generate(ids, **asked)[:, PROMPT_TOKENS:].tolist()


def tokens_a_second(
    sizes: dict[str, Any], rows: int, changes: dict[str, Any], *, count: int, turns: int
) -> tuple[float, float, float]:
    """Ours, theirs, and the median of the turns' ratios."""
    ours, theirs = models(sizes)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(1, sizes["vocab_size"], (rows, PROMPT_TOKENS), generator=generator).tolist()
    drawing = Drawing(count, **({"temperature": 0.0} | changes))
    seconds: tuple[list[float], list[float]] = ([], [])
    # The first turn warms up.
    for turn in range(turns + 1):
        drawn = []
        for draw, model, own in ((our_tokens, ours, seconds[0]), (their_tokens, theirs, seconds[1])):
            began = time.thread_time()
            drawn.append(draw(model, prompts, count, drawing))  # pyright: ignore[reportArgumentType]
            if turn > 0:
                own.append(time.thread_time() - began)
        assert all(len(row) == count for both in drawn for row in both)
        assert drawing.temperature > 0 or drawn[0] == drawn[1], "greedy tokens differ"
    total = rows * count
    ratio = statistics.median(peer / mine for mine, peer in zip(*seconds, strict=True))
    return total / statistics.median(seconds[0]), total / statistics.median(seconds[1]), ratio


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--turns", type=int, default=5)
    options.add_argument("--tokens", type=int, default=64, help="drawn of each prompt")
    arguments = options.parse_args()
    turns, count = (1, 4) if arguments.tiny else (arguments.turns, arguments.tokens)
    torch.set_num_threads(1)
    heading()
    all_sizes = {"tiny": TINY} if arguments.tiny else {"quickstart's, 1.6 M": QUICKSTART, "115 M": LARGE}
    print("| model | prompts | drawn | ours, tokens/s | transformers, tokens/s | ours, times as fast |")
    print("|---|---|---|---|---|---|")
    ratios = []
    for name, sizes in all_sizes.items():
        for rows in (1, 8):
            for drawn, changes in (("greedily", {}), ("top-p", DRAWN)):
                ours, theirs, ratio = tokens_a_second(sizes, rows, changes, count=count, turns=turns)
                ratios.append(ratio)
                print(f"| {name} | {rows} | {drawn} | {ours:,.0f} | {theirs:,.0f} | {ratio:.2f} |", flush=True)
    print(f"\nrequired: {LEAST:g} in every row")
    return verdict(min(ratios) >= LEAST, arguments.tiny)


if __name__ == "__main__":
    sys.exit(main())
