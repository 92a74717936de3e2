"""Which matrices an adapter changes, and how many numbers it has: arithmetic on configs, no torch."""

import math

from raynium.config.adapter import AdapterSection
from raynium.config.schema import ModelSection

ALL_LINEAR = "all-linear"
# PEFT's name of an adapted matrix → ours, within a block.
TARGETS = {
    "q_proj": "attention.q",
    "k_proj": "attention.k",
    "v_proj": "attention.v",
    "o_proj": "attention.o",
    "gate_proj": "ffn.gate",
    "up_proj": "ffn.up",
    "down_proj": "ffn.down",
}
# Ends of parameter names: of A [rank, inputs] and B [outputs, rank].
DOWN, UP = "lora_A", "lora_B"


def unknown_targets(adapter: AdapterSection) -> list[str]:
    """Those that name no matrix of a block."""
    return [name for name in adapter.targets if name != ALL_LINEAR and name not in TARGETS]


def target_names(adapter: AdapterSection) -> tuple[str, ...]:
    """PEFT's names of the adapted matrices, each once, in the order of a block; none without an adapter."""
    if adapter.rank is None:
        return ()
    return tuple(name for name in TARGETS if ALL_LINEAR in adapter.targets or name in adapter.targets)


def adapter_scale(adapter: AdapterSection) -> float:
    """What B·A is multiplied with."""
    assert adapter.rank is not None
    return adapter.alpha / (math.sqrt(adapter.rank) if adapter.rank_stabilised else adapter.rank)


def learns_whole(name: str, model: ModelSection, adapter: AdapterSection) -> bool:
    """Whether all of the decoder's parameter `name` ("blocks.0.ffn.up.weight") learns; without an adapter all do."""
    if adapter.rank is None:
        return True
    module = name.removesuffix(".weight")
    tied = model.embeddings == "tied" and module in ("embedding", "head") and bool(adapter.train_also)
    return tied or module in adapter.train_also


def is_adapters(name: str) -> bool:
    """Whether a parameter is an adapter's own, A or B."""
    return name.endswith((f".{DOWN}", f".{UP}"))


def adapter_sizes(model: ModelSection) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each matrix of a block that may be adapted, by PEFT's name."""
    hidden, queries, keys = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
    up = (model.ffn_size, hidden)
    return attention | {"o_proj": (hidden, queries), "gate_proj": up, "up_proj": up, "down_proj": up[::-1]}


def adapter_parameters_per_block(model: ModelSection, adapter: AdapterSection) -> int:
    """Numbers in all A and B of one block."""
    sizes = adapter_sizes(model)
    return (adapter.rank or 0) * sum(sum(sizes[name]) for name in target_names(adapter))
