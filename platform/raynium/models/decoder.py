"""The decoder of every family (`config/families.py`) in plain torch. It knows no mesh, no rank and no dtype policy.

Shapes in names:
    B  sequences            T  tokens of a sequence      V  vocabulary
    D  hidden_size          F  ffn_size                  K  head_dim
    H  query heads          G  key/value heads (grouped-query attention: each serves H / G query heads)

Engines apply parallelism from outside, so no line here may assume the whole model: attention counts the heads it was
given (tensor parallelism leaves H / tp of them), and RoPE tables are arguments, not buffers (nothing to lose on
the meta device, to cast to bfloat16, or to store in a checkpoint).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raynium.config.schema import ModelSection, RopeScaling


class Decoder(nn.Module):
    """Token ids to next-token logits. Parameters are float32 until an engine says otherwise."""

    def __init__(self, config: ModelSection):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make head and embedding one parameter if the config says so; again after anything that replaced one."""
        if self.config.embeddings == "tied":
            self.head.weight = self.embedding.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """tokens_BT: integers below V, T <= max_seq_len. Returns logits_BTV in the dtype of the parameters."""
        rope = rope_tables(self.config, num_tokens=tokens_BT.shape[1], device=tokens_BT.device)
        hidden_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD, rope=rope)
        return self.head(self.final_norm(hidden_BTD))


class DecoderBlock(nn.Module):
    """One pre-norm layer: attention, then SwiGLU, each added to the residual stream."""

    def __init__(self, config: ModelSection):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn = SwiGLU(config)

    def forward(self, hidden_BTD: Tensor, *, rope: "Rope") -> Tensor:
        hidden_BTD = hidden_BTD + self.attention(self.attention_norm(hidden_BTD), rope=rope)
        return hidden_BTD + self.ffn(self.ffn_norm(hidden_BTD))


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions; some families normalise each query and key head first."""

    def __init__(self, config: ModelSection):
        super().__init__()
        self.head_dim = config.head_dim
        self.q = nn.Linear(config.hidden_size, config.num_heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)
        head_norms = config.traits.head_norms
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if head_norms else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if head_norms else nn.Identity()

    def forward(self, hidden_BTD: Tensor, *, rope: "Rope") -> Tensor:
        q_BTHK = self.q_norm(self.q(hidden_BTD).unflatten(-1, (-1, self.head_dim)))
        k_BTGK = self.k_norm(self.k(hidden_BTD).unflatten(-1, (-1, self.head_dim)))
        v_BTGK = self.v(hidden_BTD).unflatten(-1, (-1, self.head_dim))
        mixed_BHTK = F.scaled_dot_product_attention(
            rotate(q_BTHK, rope).transpose(1, 2),
            rotate(k_BTGK, rope).transpose(1, 2),
            v_BTGK.transpose(1, 2),
            is_causal=True,
            # On the CPU a third faster than repeating k and v.
            enable_gqa=q_BTHK.shape[2] != k_BTGK.shape[2],
        )
        return self.o(mixed_BHTK.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """The gated feed-forward layer: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelSection):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.down = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(hidden_BTD)) * self.up(hidden_BTD))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim, computed in float32 (or wider) and returned in the input's dtype.

    Written out because F.rms_norm takes almost twice as long on CPU (torch 2.13) and is no more accurate.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(at_least_float32(x.dtype))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


# ---- Rotary positions ------------------------------------------------------------------------------------------------


class Rope(NamedTuple):
    """Cosine and sine of each position's angles, float32, the halves of a head repeated side by side."""

    cos_TK: Tensor
    sin_TK: Tensor


def rope_tables(config: ModelSection, *, num_tokens: int, device: torch.device) -> Rope:
    """The tables of positions 0 .. num_tokens - 1. Made anew each forward: 20 µs for 256 tokens on a CPU core."""
    assert num_tokens <= config.max_seq_len, f"{num_tokens} tokens, but RoPE is valid for {config.max_seq_len}"
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**steps
    if config.rope_scaling is not None:
        frequencies = scale_frequencies(frequencies, config.rope_scaling)
    angles = torch.outer(torch.arange(num_tokens, dtype=torch.float32, device=device), frequencies)
    angles_TK = torch.cat((angles, angles), dim=-1)
    return Rope(angles_TK.cos(), angles_TK.sin())


def scale_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: slow frequencies are divided by `factor`, fast ones kept, those between blended."""
    wavelengths = 2 * math.pi / frequencies
    # Of each frequency, within the original context.
    turns = scaling.original_max_seq_len / wavelengths
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rotate(x_BTHK: Tensor, rope: Rope) -> Tensor:
    """Turn each pair (i, i + K/2) of a head by its position's angle, in float32 or wider; returns the input's dtype."""
    wide = x_BTHK.to(at_least_float32(x_BTHK.dtype))
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    cos_T1K, sin_T1K = rope.cos_TK.unsqueeze(1), rope.sin_TK.unsqueeze(1)
    return (wide * cos_T1K + turned * sin_T1K).to(x_BTHK.dtype)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 stays (the reference of the tests runs in it); everything narrower becomes float32."""
    return torch.promote_types(dtype, torch.float32)
