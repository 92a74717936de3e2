"""The memory estimate against counts of the real decoder, and its behaviour as the layout changes."""

import pytest
import torch

from raynium.config.families import FAMILIES
from raynium.config.load import load_config
from raynium.config.world import World
from raynium.models.attention import block_mask
from raynium.models.decoder import Decoder
from raynium.models.flops import parameter_count
from raynium.planning.memory import MemoryEstimate, estimate_memory, parameter_parts

PRESETS = ["quickstart", "llama3-1b", "llama3-8b", "llama3-70b", "qwen3-8b"]


def estimate(preset, *overrides) -> MemoryEstimate:
    config = load_config(preset, overrides)
    return estimate_memory(config, data_parallel=World.of(config).data)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_parts_are_those_of_the_decoder(preset):
    model = load_config(preset).model
    with torch.device("meta"):
        decoder = Decoder(model)
    shapes = [parameter.shape for parameter in decoder.parameters()]
    parts = parameter_parts(model)
    assert parts.norms == sum(shape.numel() for shape in shapes if len(shape) == 1)
    assert parts.split == sum(shape.numel() for shape in shapes if len(shape) == 2)
    assert parts.norms + parts.split == parameter_count(model).total


@pytest.mark.parametrize("preset", PRESETS)
def test_one_rank_holds_every_parameter_in_float32(preset):
    one_rank = ("cluster.nodes=1", "cluster.ranks_per_node=1", "parallel.tensor=1")
    total = parameter_count(load_config(preset).model).total
    alone = estimate(preset, *one_rank)
    assert (alone.parameters, alone.gradients, alone.optimizer) == (4 * total, 4 * total, 8 * total)


def test_state_is_split_over_all_ranks_but_norms_over_the_fsdp_ranks_only():
    parts = parameter_parts(load_config("llama3-8b").model)
    assert estimate("llama3-8b").parameters == 4 * (-(-parts.split // 64) + -(-parts.norms // 16))


def test_twice_the_nodes_halve_the_state_and_nothing_else():
    one, two = estimate("llama3-8b"), estimate("llama3-8b", "cluster.nodes=2")
    assert two.optimizer == pytest.approx(one.optimizer / 2, rel=1e-6)
    assert (two.activations, two.logits, two.gathered_blocks) == (one.activations, one.logits, one.gathered_blocks)


@pytest.mark.parametrize("embeddings", ["tied", "untied"])
def test_a_stage_holds_its_blocks_and_one_table_but_the_activations_of_all_micro_batches_under_way(embeddings):
    shape = ("cluster.ranks_per_node=1", "parallel.tensor=1", f"model.embeddings={embeddings}")
    whole, two_stages = estimate("llama3-8b", *shape), estimate("llama3-8b", *shape[1:], *shape[:1], "cluster.nodes=2",
        "parallel.pipeline=2")  # fmt: skip
    with torch.device("meta"):
        decoder = Decoder(load_config("llama3-8b").model)
    held = [*decoder.blocks[:16].parameters(), *decoder.head.parameters(), *decoder.final_norm.parameters()]
    assert two_stages.parameters == 4 * sum(parameter.numel() for parameter in held)
    assert (two_stages.activations, two_stages.logits) == (whole.activations, whole.logits)


def test_activations_and_logits_follow_the_tokens_of_a_micro_batch():
    one, two = estimate("llama3-8b", "data.seq_len=2048"), estimate("llama3-8b", "data.seq_len=4096")
    assert (two.activations, two.logits) == (2 * one.activations, 2 * one.logits)
    assert two.parameters == one.parameters
    rows = estimate("llama3-8b", "data.seq_len=2048", "train.micro_batch_size=2")
    assert (rows.activations, rows.logits) == (two.activations, two.logits)


def test_logits_of_many_tokens_are_a_piece_and_what_sums_up_over_pieces():
    vocabulary = 128256 // 4
    whole, pieces = estimate("llama3-8b"), estimate("llama3-8b", "train.micro_batch_size=2")
    assert whole.logits == 8192 * vocabulary * 2, "pieces would take 256 MiB, and 4096 × 4 bytes for each column"
    assert pieces.logits == 4096 * vocabulary * 2 + vocabulary * 4096 * 4
    adapted = estimate("llama3-8b", "train.micro_batch_size=2", "adapter.rank=8")
    assert adapted.logits == 4096 * vocabulary * 2, "the head does not learn"
    under_nxd = estimate("llama3-8b", "train.micro_batch_size=2", "engine.kind=nxd", "engine.compile=none")
    assert under_nxd.logits == 2 * 8192 * vocabulary * (2 + 4)


def test_rows_of_several_documents_have_one_mask_for_all_layers():
    one, packed = estimate("llama3-8b"), estimate("llama3-8b", "data.packing=documents")
    assert packed.activations - one.activations == 2 * 8192 * 8192
    # On CUDA a mask of blocks, of the size that it has.
    cuda = ("cluster.accelerator=cuda", "cluster.instance_type=null")
    one, packed = estimate("llama3-8b", *cuda), estimate("llama3-8b", *cuda, "data.packing=documents")
    assert packed.activations - one.activations == 4 * 4 * 64 * 64
    mask = block_mask(torch.zeros(1, 8192, dtype=torch.int64))
    blocks = (mask.kv_indices, mask.full_kv_indices, mask.q_indices, mask.full_q_indices)
    assert sum(each.nbytes for each in blocks if each is not None) == 4 * 4 * 64 * 64


def test_float32_takes_twice_the_bytes_of_compute_but_not_of_state():
    half, full = estimate("llama3-8b"), estimate("llama3-8b", "engine.dtype=float32")
    assert full.logits == half.logits // 2, "in pieces, whose sum takes no more than the gradient itself"
    assert full.gathered_blocks == 2 * half.gathered_blocks
    assert full.parameters == half.parameters


def test_checkpointing_keeps_one_block_and_every_blocks_input():
    tokens, hidden, num_layers = 8192, 4096, 32
    everything = estimate("llama3-8b", "parallel.tensor=1", "engine.activation_checkpointing=none")
    inputs = num_layers * tokens * hidden * 2
    kept = estimate("llama3-8b", "parallel.tensor=1", "engine.compile=none")
    assert kept.activations - inputs == pytest.approx(everything.activations / num_layers)
    compiled = estimate("llama3-8b", "parallel.tensor=1")
    assert compiled.activations - kept.activations == inputs, "attention's output is as large as a block's input here"


def test_a_lone_float32_rank_gathers_nothing():
    lone = ("cluster.ranks_per_node=1",)
    assert estimate("quickstart", *lone, "engine.dtype=float32").gathered_blocks == 0
    assert estimate("quickstart", *lone, "engine.dtype=bfloat16").gathered_blocks > 0


def test_the_words_name_every_part():
    gib = 2**30
    words = MemoryEstimate(gib, gib, 2 * gib, gib // 2, gib // 4, gib // 4).in_words()
    assert words == (
        "5.00 GiB a rank (parameters 1.00, gradients 1.00, optimizer 2.00, gathered blocks 0.50, activations 0.25, "
        "logits 0.25)"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_formula_counts_what_autograd_saves(family, dtype):
    """Two more blocks of the real decoder keep as many bytes for the backward pass as the estimate says (1 rank)."""
    base = [f"model.family={family}", "cluster.ranks_per_node=1", "train.micro_batch_size=2", "data.seq_len=64"]
    base.append(f"engine.dtype={dtype}")
    configs = [load_config("quickstart", [*base, f"model.num_layers={n}"]) for n in (1, 3)]
    one_saved, three_saved = (_saved_bytes(config) for config in configs)
    one_planned, three_planned = (estimate_memory(config, data_parallel=1).activations for config in configs)
    # The estimate leaves out one number per token and head, or per token and norm.
    assert three_saved - one_saved == pytest.approx(three_planned - one_planned, rel=0.01)


def _saved_bytes(config) -> int:
    """Bytes of distinct storages, parameters apart, that the forward pass keeps for the backward pass."""
    torch.manual_seed(0)
    decoder = Decoder(config.model).to(getattr(torch, config.engine.dtype))
    own = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}
    storages: dict[
        int, int
    ] = {}  # address → bytes; the saved tensors stay alive with the output, so no address repeats

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens_BT = torch.zeros(config.train.micro_batch_size, config.data.seq_len, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = decoder(tokens_BT)
    assert output.requires_grad
    return sum(storages.values())


def test_an_adapter_is_all_that_has_gradients_and_moments():
    """Llama 3 8B: 8,030,261,248 weights in two bytes, and 41,943,040 of rank 16 with its gradient and two moments."""
    lone = ("cluster.ranks_per_node=1", "parallel.tensor=1", "cluster.instance_type=null", "adapter.rank=16")
    alone = estimate("llama3-8b", *lone)
    assert alone.parameters == 8_030_261_248 * 2 + 41_943_040 * 4
    assert (alone.gradients, alone.optimizer) == (41_943_040 * 4, 41_943_040 * 8)
    assert alone.gathered_blocks == 0, "what does not learn is used where it lies"
    shared = estimate("llama3-8b", "adapter.rank=16")
    whole = estimate("llama3-8b")
    assert shared.parameters < 0.6 * whole.parameters and shared.gathered_blocks < whole.gathered_blocks
    tables = estimate("llama3-8b", *lone, "adapter.train_also=[embedding, head]")
    assert tables.gradients == (41_943_040 + 2 * 128_256 * 4096) * 4
