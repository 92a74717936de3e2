"""Parameter counts and FLOPs per token from a config alone: arithmetic, no torch."""

from typing import NamedTuple

from raynium.config.adapter import AdapterSection
from raynium.config.schema import ModelSection
from raynium.models.adapter import adapter_parameters_per_block, learns_whole


class ParameterCount(NamedTuple):
    """total: every parameter once. multiplied: those that a token is multiplied with (see `flops_per_token`)."""

    total: int
    multiplied: int


class FlopsPerToken(NamedTuple):
    """Floating point operations of forward and backward for one token.

    six_n: of the matrices; of those that do not learn four operations a number and not six.
    """

    six_n: int
    with_attention: int


def parameter_count(model: ModelSection) -> ParameterCount:
    """Counts of the decoder in `models/decoder.py`."""
    table = model.vocab_size * model.hidden_size
    attention = model.hidden_size * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    ffn = 3 * model.hidden_size * model.ffn_size
    biases = model.head_dim * (model.num_heads + 2 * model.num_kv_heads) if model.traits.qkv_biases else 0
    of_blocks = model.num_layers * (attention + biases + ffn + norms_per_block(model))
    # This table is the head.
    multiplied = of_blocks + model.hidden_size + table
    lookup = table if model.embeddings == "untied" else 0
    return ParameterCount(total=multiplied + lookup, multiplied=multiplied)


def norms_per_block(model: ModelSection) -> int:
    """Parameters of one block's norms."""
    return 2 * model.hidden_size + (2 * model.head_dim if model.traits.head_norms else 0)


class LearnedCount(NamedTuple):
    """Parameters that have a gradient and an optimizer, and those that have not.

    adapter: in all A and B. whole: the model's own that learn. frozen: the model's own that do not.
    """

    adapter: int
    whole: int
    frozen: int


def learned_count(model: ModelSection, adapter: AdapterSection) -> LearnedCount:
    total = parameter_count(model).total
    if adapter.rank is None:
        return LearnedCount(adapter=0, whole=total, frozen=0)
    names = ("embedding.weight",) if model.embeddings == "tied" else ("embedding.weight", "head.weight")
    whole = model.vocab_size * model.hidden_size * sum(learns_whole(name, model, adapter) for name in names)
    of_adapter = model.num_layers * adapter_parameters_per_block(model, adapter)
    return LearnedCount(adapter=of_adapter, whole=whole, frozen=total - whole)


def flops_per_token(model: ModelSection, seq_len: int, adapter: AdapterSection | None = None) -> FlopsPerToken:
    """PaLM, appendix B (arXiv 2204.02311), as nanoGPT's `estimate_mfu` has it: 6 N + 12 L H K T.

    N leaves out an untied input embedding, which is looked up and not multiplied with, and counts the head, tied or
    not. The attention term counts the whole T × T square although half of it is masked: the convention of
    published MFU numbers. Recomputation by activation checkpointing is not counted (it is not useful work).

    Six are two for the forward pass and twice that for the backward pass, whose halves are the gradients of the inputs
    and of the weights (Kaplan et al., arXiv 2001.08361, §2.1). A matrix that does not learn lacks the last: 4 N.
    """
    adapter = adapter or AdapterSection()
    multiplied = parameter_count(model).multiplied
    six_n = 6 * multiplied
    if adapter.rank is not None:
        head = model.vocab_size * model.hidden_size if learns_whole("head.weight", model, adapter) else 0
        six_n = 4 * (multiplied - head) + 6 * (head + learned_count(model, adapter).adapter)
    attention = 12 * model.num_layers * model.num_heads * model.head_dim * seq_len
    return FlopsPerToken(six_n=six_n, with_attention=six_n + attention)
