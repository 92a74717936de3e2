"""The tensor-parallel plan as data: how each module of the decoder is split over the ranks of the tensor axis.

Torch-free, read by every engine. Sequence parallelism is part of it: between the matrix layers, hidden states are split
over the tensor axis along tokens, so norms and residuals cost 1/tp of the memory and time.
"""

from typing import Literal, NamedTuple

from raynium.config.schema import ModelSection

Split = Literal[
    # The embedding table is split by vocabulary rows; its output is summed over ranks and split along tokens.
    "vocabulary",
    # No parameter: the module's first argument is gathered from split along tokens to whole.
    "gather",
    # A linear layer is split by output features; its input is whole, its output stays split.
    "column",
    # A linear layer is split by input features; its output is summed over ranks and split along tokens.
    "row",
    # The parameter is whole on every rank, each works on its tokens; gradients are summed over ranks.
    "sequence",
    # The parameter is whole on every rank, each works on its heads; gradients are summed over ranks.
    "heads",
    # A linear layer is split by vocabulary rows; its input is gathered along tokens to whole, its logits stay split.
    "logits",
]


class Rule(NamedTuple):
    """How one kind of module is split. `*` in the name stands for any layer index."""

    module: str
    split: Split


def tensor_parallel_plan(model: ModelSection) -> tuple[Rule, ...]:
    """Every module that the tensor axis touches, in the order of the forward pass."""
    head_norms = (Rule("blocks.*.attention.q_norm", "heads"), Rule("blocks.*.attention.k_norm", "heads"))
    return (
        Rule("embedding", "vocabulary"),
        Rule("blocks.*.attention_norm", "sequence"),
        Rule("blocks.*.attention", "gather"),
        Rule("blocks.*.attention.q", "column"),
        Rule("blocks.*.attention.k", "column"),
        Rule("blocks.*.attention.v", "column"),
        *(head_norms if model.traits.head_norms else ()),
        Rule("blocks.*.attention.o", "row"),
        Rule("blocks.*.ffn_norm", "sequence"),
        Rule("blocks.*.ffn", "gather"),
        Rule("blocks.*.ffn.gate", "column"),
        Rule("blocks.*.ffn.up", "column"),
        Rule("blocks.*.ffn.down", "row"),
        Rule("final_norm", "sequence"),
        Rule("head", "logits"),
    )


def divided_sizes(model: ModelSection, *, seq_len: int) -> dict[str, int]:
    """The sizes, by config field, that the tensor-parallel degree must divide for this plan to hold."""
    return {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.num_kv_heads,
        "model.ffn_size": model.ffn_size,
        "model.vocab_size": model.vocab_size,
        "data.seq_len": seq_len,
    }


def layer_of(name: str) -> str:
    """That a parameter belongs to: "blocks.3" of "blocks.3.ffn.up.weight", "head" of "head.weight"."""
    first, second, *_ = name.split(".")
    return f"{first}.{second}" if second.isdigit() else first
