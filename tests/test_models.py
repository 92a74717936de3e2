"""The decoder against transformers' own of each family; the arithmetic about it; how weights begin."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from first_weights import initialise
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator

from raynium.config.adapter import AdapterSection
from raynium.config.families import FAMILIES
from raynium.config.load import load_config
from raynium.config.schema import ModelSection
from raynium.models import init
from raynium.models.attention import rope_tables
from raynium.models.decoder import Decoder
from raynium.models.flops import flops_per_token, parameter_count
from raynium.models.init import TILE_COLUMNS, TILE_ROWS, init_block, init_parameter
from raynium.models.names import hugging_face_names
from raynium.models.plan import divided_sizes, tensor_parallel_plan

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 12,
    "ffn_size": 80,
    "max_seq_len": 96,
    "init_std": 0.15,  # large enough for attention to be far from uniform
}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 24}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, grouped queries, tied": {"num_kv_heads": 2, "embeddings": "tied"},
    "llama, one kv head, scaled rope": {"num_kv_heads": 1, "rope_scaling": SCALING, "rope_theta": 1e4},
    "llama, wide heads": {"num_heads": 6, "num_kv_heads": 3, "head_dim": 32, "norm_eps": 1e-3},
    "mistral": {"family": "mistral", "num_kv_heads": 2, "rope_theta": 1e4},
    "qwen2, grouped queries": {"family": "qwen2", "num_kv_heads": 2, "rope_theta": 1e6},
    "qwen2, tied": {"family": "qwen2", "embeddings": "tied", "norm_eps": 1e-6},
    "qwen3, grouped queries": {"family": "qwen3", "num_kv_heads": 2, "rope_theta": 1e6},
    "qwen3, wide heads, tied": {"family": "qwen3", "num_kv_heads": 1, "head_dim": 16, "embeddings": "tied"},
}


def section(name: str) -> ModelSection:
    return ModelSection.model_validate(SMALL | MODELS[name])


def random_decoder(model: ModelSection) -> Decoder:
    decoder = Decoder(model)
    initialise(decoder, seed=3, config=model)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            # A norm of ones would hide a norm in the wrong place, a bias of zeros itself.
            if "norm" in name or "bias" in name:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return decoder


def test_every_family_is_compared() -> None:
    assert {section(name).family for name in MODELS} == FAMILIES.keys()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_equal_transformers(transformers_model: Callable[..., Any], name: str) -> None:
    model = section(name)
    ours, theirs = random_decoder(model), transformers_model(model, attn_implementation="eager")
    renamed = {hugging_face_names(model)[name]: parameter for name, parameter in ours.named_parameters()}
    loaded = theirs.load_state_dict(renamed, strict=False)
    assert not loaded.unexpected_keys
    assert loaded.missing_keys == (["lm_head.weight"] if model.embeddings == "tied" else [])
    theirs.eval()

    tokens = torch.randint(0, model.vocab_size, (3, 64), generator=torch.Generator().manual_seed(9))
    logits, expected = ours(tokens), theirs(tokens).logits
    assert expected.abs().max() > 1, "logits this small would agree whatever the model"
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_parameter_count_is_that_of_the_real_model(name: str) -> None:
    model = section(name)
    decoder = Decoder(model)
    total = sum(parameter.numel() for parameter in decoder.parameters())
    looked_up = decoder.embedding.weight.numel() if model.embeddings == "untied" else 0
    assert parameter_count(model) == (total, total - looked_up)
    assert hugging_face_names(model).keys() == dict(decoder.named_parameters()).keys()


def test_flops_of_llama3_8b() -> None:
    """Published: 8.03 billion parameters. Attention at 8,192 tokens adds 12 * 32 layers * 4096 * 8192."""
    model = ModelSection(
        vocab_size=128_256,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        ffn_size=14_336,
        max_seq_len=8192,
    )
    assert parameter_count(model).total == 8_030_261_248
    flops = flops_per_token(model, 8192)
    assert flops.six_n == 6 * (8_030_261_248 - 128_256 * 4096)
    assert flops.with_attention - flops.six_n == 12_884_901_888


def test_what_does_not_learn_takes_four_operations_a_number_and_not_six() -> None:
    model, multiplied = load_config("llama3-8b").model, 8_030_261_248 - 128_256 * 4096
    frozen = flops_per_token(model, 8192, AdapterSection(rank=16))
    assert frozen.six_n == 4 * multiplied + 6 * 41_943_040
    with_head = flops_per_token(model, 8192, AdapterSection(rank=16, train_also=("head",)))
    assert with_head.six_n - frozen.six_n == 2 * 128_256 * 4096
    assert frozen.with_attention - frozen.six_n == 12_884_901_888


def test_rope_tables_are_float32_whatever_the_model_computes_in() -> None:
    model = section("llama")
    assert {table.dtype for table in rope_tables(model, num_tokens=4, device=torch.device("cpu"))} == {torch.float32}
    with pytest.raises(AssertionError, match="97 tokens, but RoPE is valid for 96"):
        rope_tables(model, num_tokens=97, device=torch.device("cpu"))


def test_a_bfloat16_model_returns_bfloat16_logits_near_the_float32_ones() -> None:
    decoder = random_decoder(section("qwen3, grouped queries"))
    tokens = torch.arange(40)[None]
    expected = decoder(tokens)
    logits = decoder.bfloat16()(tokens)
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


def test_the_model_looks_only_back() -> None:
    decoder = random_decoder(section("qwen3, grouped queries"))
    tokens = torch.arange(20)[None]
    changed = tokens.clone()
    changed[0, 12] = 90
    same = (decoder(tokens) == decoder(changed)).all(-1)[0].tolist()
    assert same == [True] * 12 + [False] * 8


# ---- First weights ---------------------------------------------------------------------------------------------------


def test_first_weights_depend_on_seed_and_name_only() -> None:
    model = section("llama")

    def draw(name: str, seed: int) -> torch.Tensor:
        return init_parameter(name, shape=(40, 30), seed=seed, config=model)

    torch.manual_seed(1)
    first = draw("blocks.0.attention.q.weight", 0)
    torch.manual_seed(2)
    assert torch.equal(draw("blocks.0.attention.q.weight", 0), first)
    assert not torch.equal(draw("blocks.0.attention.q.weight", 1), first)
    assert not torch.equal(draw("blocks.1.attention.q.weight", 0), first)
    # Bits that must not change between releases and machines: a run started elsewhere would not be the same run.
    assert first.flatten()[:3].tolist() == [0.10308782011270523, 0.10901185125112534, 0.018691513687372208]


def test_a_seeds_bits_stay_in_every_tile() -> None:
    """Beyond the first tile too, and at the edge, where the last tile is narrower."""
    weight = init_parameter("head.weight", shape=(40, 300), seed=0, config=section("llama"))
    assert weight[31:33, 255:257].flatten().tolist() == [
        0.05403904244303703,
        0.1001150980591774,
        0.07461173087358475,
        -0.04373910650610924,
    ]
    assert weight[39, 299].item() == -0.0905473381280899


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """(shape of a matrix, offsets and shape of a block of it), around the sizes of a tile."""
    sizes, offsets, lengths = [], [], []
    for most in (3 * TILE_ROWS + 5, 3 * TILE_COLUMNS + 5):
        size = draw(st.integers(1, most))
        begin = draw(st.integers(0, size))
        sizes.append(size)
        offsets.append(begin)
        lengths.append(draw(st.integers(0, size - begin)))
    return tuple(sizes), tuple(offsets), tuple(lengths)  # pyright: ignore[reportReturnType]


@settings(deadline=None, max_examples=200)
@given(boxes(), st.integers(1, 9))
def test_any_block_equals_that_part_of_the_whole(
    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]], threads: int
) -> None:
    model, name = section("llama"), "blocks.1.ffn.down.weight"
    global_shape, offsets, shape = box
    block = init_block(
        name, global_shape=global_shape, offsets=offsets, shape=shape, seed=4, config=model, threads=threads
    )
    whole = init_parameter(name, shape=global_shape, seed=4, config=model)
    rows, columns = (slice(begin, begin + size) for begin, size in zip(offsets, shape, strict=True))
    assert block.shape == shape
    assert torch.equal(block, whole[rows, columns])


@pytest.mark.parametrize(
    ("shard", "offsets", "shape", "most_drawn"),
    [
        ("an even FSDP share of rows", (1024, 0), (128, 4096), 128 * 4096),
        ("a tensor-parallel share of columns", (0, 1024), (4096, 512), 4096 * 512),
        ("a few rows of a large group", (1021, 0), (2, 4096), 31 * 4096),
        ("an uneven share", (1001, 100), (333, 1000), (333 + 31) * (1000 + 2 * 255)),
    ],
)
def test_a_rank_draws_its_own_values_and_those_of_tiles_across_its_edge(
    shard: str, offsets: tuple[int, int], shape: tuple[int, int], most_drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = count_drawn(monkeypatch)
    place: dict[str, Any] = {"global_shape": (4096, 4096), "offsets": offsets, "shape": shape}
    init_block("head.weight", **place, seed=0, config=section("llama"), threads=3)
    assert shape[0] * shape[1] <= sum(drawn) <= most_drawn


def count_drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what first weights are drawn from now on."""
    drawn: list[int] = []

    class Counting(Generator):
        def standard_normal(self, *args: Any, **options: Any) -> Any:
            values = super().standard_normal(*args, **options)
            drawn.append(values.size)
            return values

    monkeypatch.setattr(init, "Generator", Counting)
    return drawn


def test_a_block_outside_its_parameter_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError, match=r"head.weight: \(3, 0\) \+ \(2, 4\)"):
        init_block("head.weight", global_shape=(4, 4), offsets=(3, 0), shape=(2, 4), seed=0, config=section("llama"))
    with pytest.raises(AssertionError, match=r"not \(2, 2, 2\)"):
        init_parameter("experts.weight", shape=(2, 2, 2), seed=0, config=section("llama"))


def test_tiles_have_nothing_to_do_with_each_other() -> None:
    weight = init_parameter("head.weight", shape=(96, 1024), seed=0, config=section("llama"))
    tiles = weight.unflatten(0, (3, TILE_ROWS)).unflatten(2, (4, TILE_COLUMNS)).transpose(1, 2).flatten(2).flatten(0, 1)
    between = torch.corrcoef(tiles) - torch.eye(12)
    assert between.abs().max() < 5 / math.sqrt(tiles.shape[1])


def test_first_weights_have_the_promised_spread() -> None:
    model = section("llama")

    def std(name: str) -> float:
        weight = init_parameter(name, shape=(400, 300), seed=0, config=model)
        assert weight.dtype == torch.float32 and weight.mean().abs() < 0.01 * model.init_std
        return weight.std().item() / model.init_std

    plain = ["embedding.weight", "head.weight", "blocks.1.attention.v.weight", "blocks.1.ffn.gate.weight"]
    into_residual = ["blocks.1.attention.o.weight", "blocks.0.ffn.down.weight"]
    assert [std(name) for name in plain] == pytest.approx([1.0] * 4, rel=0.01)
    assert [std(name) for name in into_residual] == pytest.approx([1 / math.sqrt(4)] * 2, rel=0.01)
    assert init_parameter("final_norm.weight", shape=(8,), seed=0, config=model).tolist() == [1.0] * 8


# ---- The tensor-parallel plan ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3, grouped queries"])
def test_the_plan_names_every_module_that_has_parameters_and_no_other(name: str) -> None:
    model = section(name)
    planned = {rule.module for rule in tensor_parallel_plan(model)}
    decoder = Decoder(model)
    modules = {re.sub(r"\.\d+\.", ".*.", path) for path, _ in decoder.named_modules()}
    owners = {re.sub(r"\.\d+\.", ".*.", path).removesuffix(".weight") for path, _ in decoder.named_parameters()}
    assert owners <= planned <= modules


def test_the_sizes_that_the_degree_must_divide() -> None:
    assert divided_sizes(section("llama, wide heads"), seq_len=64) == {
        "model.num_heads": 6,
        "model.num_kv_heads": 3,
        "model.ffn_size": 80,
        "model.vocab_size": 97,
        "data.seq_len": 64,
    }


# ---- Adapters --------------------------------------------------------------------------------------------------------


def test_an_adapter_begins_as_pefts_does_in_any_layout() -> None:
    """A: uniform over ±1/sqrt(inputs), the same numbers in every block; B: zeros."""
    model, inputs = section("llama"), 600
    whole = init_parameter("blocks.1.attention.q.lora_A", shape=(70, inputs), seed=3, config=model)
    bound = 1 / math.sqrt(inputs)
    assert 0.99 * bound < whole.abs().max() < bound and abs(whole.mean()) < 0.02 * bound
    assert whole.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    at = {"global_shape": (70, inputs), "offsets": (30, 250), "shape": (9, 20), "seed": 3, "config": model}
    assert torch.equal(init_block("blocks.1.attention.q.lora_A", **at), whole[30:39, 250:270])
    other = init_parameter("blocks.0.attention.q.lora_A", shape=(70, inputs), seed=3, config=model)
    assert not torch.equal(whole, other)
    up = init_parameter("blocks.1.attention.q.lora_B", shape=(40, 8), seed=3, config=model)
    assert torch.equal(up, torch.zeros(40, 8))
