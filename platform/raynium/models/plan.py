"""The tensor-parallel plan as data: how each module of the decoder is split over the ranks of the tensor axis.

Torch-free, read by every engine. Sequence parallelism is part of it: between the matrix layers, hidden states are split
over the tensor axis along tokens, so norms and residuals cost 1/tp of the memory and time.
"""

from typing import Literal, NamedTuple

from raynium.config.schema import ModelSection

Split = Literal[
    "vocabulary",  # embedding table split by vocabulary rows; output summed over ranks and split along tokens
    "gather",  # no parameter: the module's first argument is gathered from split-along-tokens to whole
    "column",  # linear split by output features; whole input, output stays split
    "row",  # linear split by input features; output summed over ranks and split along tokens
    "sequence",  # parameter whole on every rank, each works on its tokens; gradients are summed over ranks
    "heads",  # parameter whole on every rank, each works on its heads; gradients are summed over ranks
    "logits",  # linear split by vocabulary rows; input gathered from split-along-tokens, logits stay split
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
