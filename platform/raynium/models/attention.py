"""Attention and what it must know of where tokens stand: rotary positions, and which document each belongs to.

Shapes as in `models/decoder.py`. `Places` is made once a forward pass, for all layers. Rows of one document (no
`documents_BT`) are causal and have the positions 0 .. T - 1. In a row of several documents a token sees those before
it in its own document only, and positions begin anew with each: its logits are those of the document alone.

Which kernel computes that is chosen in `places`, by the device: on CUDA FlexAttention with a block mask, which skips
what lies between documents; elsewhere scaled_dot_product_attention with a dense mask, whose shapes are static.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raynium.config.schema import ModelSection, RopeScaling

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Of queries and of keys, in FlexAttention.
BLOCK = 128


class Kept(NamedTuple):
    """Of one layer: keys and values, [B, G, N, K], of which the last T are to be those of the tokens at hand."""

    keys_BGNK: Tensor
    values_BGNK: Tensor


class Places(NamedTuple):
    """Where the tokens of a micro-batch stand and what they may look at.

    cos, sin: of each position's angles, float32, the halves of a head repeated side by side; [T, K], or [B, T, K] where
    rows hold several documents. mask: None for causal rows; [B, 1, T, T] of the compute dtype, to be added to scores;
    or FlexAttention's. kept: for a generated text (`models/cache.py`).
    """

    cos: Tensor
    sin: Tensor
    mask: "Tensor | BlockMask | None"
    kept: Kept | None = None


def places(config: ModelSection, tokens_BT: Tensor, documents_BT: Tensor | None, *, dtype: torch.dtype) -> Places:
    """dtype: of queries and keys. documents_BT: see `data/batch.py`; None: each row is one document."""
    cos_TK, sin_TK = rope_tables(config, num_tokens=tokens_BT.shape[1], device=tokens_BT.device)
    if documents_BT is None:
        return Places(cos_TK, sin_TK, None)
    positions_BT = positions_in_documents(documents_BT)
    on_cuda = documents_BT.device.type == "cuda"
    mask = block_mask(documents_BT) if on_cuda else dense_mask(documents_BT, dtype)
    return Places(cos_TK[positions_BT], sin_TK[positions_BT], mask)


def attend(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, places: Places) -> Tensor:
    """Rotates queries and keys, and mixes values as the rows' documents allow. Returns mixed_BHTK."""
    q_BHTK, k_BGTK = rotate(q_BTHK, places).transpose(1, 2), rotate(k_BTGK, places).transpose(1, 2)
    v_BGTK, grouped = v_BTGK.transpose(1, 2), q_BTHK.shape[2] != k_BTGK.shape[2]
    mask, num_tokens = places.mask, q_BTHK.shape[1]
    if places.kept is not None:
        keys_BGNK, values_BGNK = places.kept
        keys_BGNK[:, :, -num_tokens:], values_BGNK[:, :, -num_tokens:] = k_BGTK, v_BGTK
        k_BGTK, v_BGTK = keys_BGNK, values_BGNK
    if mask is None or isinstance(mask, Tensor):
        # A lone token that comes after others sees them all.
        causal = mask is None and k_BGTK.shape[2] == num_tokens
        # enable_gqa: on the CPU a third faster than repeating k and v.
        return F.scaled_dot_product_attention(
            q_BHTK, k_BGTK, v_BGTK, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )
    from torch.nn.attention.flex_attention import flex_attention

    # In a compiled block it becomes part of that graph.
    fused = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
    return fused(q_BHTK, k_BGTK, v_BGTK, block_mask=mask, enable_gqa=grouped)


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    """Uncompiled, FlexAttention holds all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


# ---- Documents -------------------------------------------------------------------------------------------------------


def positions_in_documents(documents_BT: Tensor) -> Tensor:
    """int64 [B, T]: each token's place in its document, from 0. Static shapes, and nothing waits for the device."""
    places_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    begins_BT = F.pad(documents_BT[:, 1:] != documents_BT[:, :-1], (1, 0))
    return places_T - (places_T * begins_BT).cummax(1).values


def dense_mask(documents_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, T], to be added to scores: 0 where the query may look at the key.

    Elsewhere the least finite number, which makes a weight of exactly 0, since every token sees itself; an infinity
    could make NaN of it on devices that compute softmax in pieces. Not a boolean: each layer would make this of it, and
    keep it for its backward pass.
    """
    size = documents_BT.shape[1]
    causal_TT = torch.ones(size, size, dtype=torch.bool, device=documents_BT.device).tril()
    seen_BTT = (documents_BT[:, :, None] == documents_BT[:, None, :]) & causal_TT
    zero = torch.zeros((), dtype=dtype, device=documents_BT.device)
    return zero.where(seen_BTT, torch.finfo(dtype).min)[:, None]


def block_mask(documents_BT: Tensor) -> "BlockMask":
    """The same for FlexAttention, by blocks of BLOCK tokens: [B, 1, T / BLOCK, T / BLOCK]; no wait for the device.

    Equal to its `create_block_mask`, which holds all pairs of tokens: 10 GB for a row of 32,768 (torch 2.13, CPU).
    """
    from torch.nn.attention.flex_attention import BlockMask

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (documents_BT[row, query] == documents_BT[row, key]) & (query >= key)

    size = documents_BT.shape[1]
    # Documents rise along a row: an earlier block shares one with a later one if its last is the latter's first.
    first_BN, last_BN = documents_BT[:, ::BLOCK], documents_BT[:, BLOCK - 1 :: BLOCK]
    num_blocks, num_whole = first_BN.shape[1], last_BN.shape[1]
    last_BN = F.pad(last_BN, (0, num_blocks - num_whole), value=-1)
    numbers_N = torch.arange(num_blocks, device=documents_BT.device)
    earlier_NN = numbers_N[:, None] > numbers_N
    shares_BNN = earlier_NN & (first_BN[:, :, None] == last_BN[:, None, :])
    # Of one document both of them; a block that ends beyond the row has no last document.
    whole_BNN = earlier_NN & (last_BN[:, :, None] == first_BN[:, None, :])
    itself_NN = numbers_N[:, None] == numbers_N
    partial, whole = _blocks_in_order((shares_BNN & ~whole_BNN) | itself_NN), _blocks_in_order(whole_BNN)
    return BlockMask.from_kv_blocks(*partial, *whole, BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(size, size))


def _blocks_in_order(wanted_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """int32 [B, 1, N] and [B, 1, N, N]: of each block of queries how many blocks of keys it wants; all, those first."""
    wanted = wanted_BNN[:, None].int()
    return wanted.sum(-1, dtype=torch.int32), wanted.argsort(dim=-1, descending=True, stable=True).int()


# ---- Rotary positions ------------------------------------------------------------------------------------------------


def rope_tables(config: ModelSection, *, num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 .. num_tokens - 1, float32 [T, K]. Made anew each forward: 20 µs for 256 tokens
    on a CPU core.
    """
    assert num_tokens <= config.max_seq_len, f"{num_tokens} tokens, but RoPE is valid for {config.max_seq_len}"
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**steps
    if config.rope_scaling is not None:
        frequencies = scale_frequencies(frequencies, config.rope_scaling)
    angles = torch.outer(torch.arange(num_tokens, dtype=torch.float32, device=device), frequencies)
    angles_TK = torch.cat((angles, angles), dim=-1)
    return angles_TK.cos(), angles_TK.sin()


def scale_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: slow frequencies are divided by `factor`, fast ones kept, those between blended."""
    wavelengths = 2 * math.pi / frequencies
    # Of each frequency, within the original context.
    turns = scaling.original_max_seq_len / wavelengths
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rotate(x_BTHK: Tensor, places: Places) -> Tensor:
    """Turn each pair (i, i + K/2) of a head by its position's angle, in float32 or wider; returns the input's dtype."""
    wide = x_BTHK.to(at_least_float32(x_BTHK.dtype))
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    # The same for all heads.
    cos, sin = places.cos.unsqueeze(-2), places.sin.unsqueeze(-2)
    return (wide * cos + turned * sin).to(x_BTHK.dtype)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 stays (the reference of the tests runs in it); everything narrower becomes float32."""
    return torch.promote_types(dtype, torch.float32)
