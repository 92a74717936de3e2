"""The decoder of every family (`config/families.py`) in plain torch. It knows no mesh, no rank and no dtype policy.

Shapes in names:
    B  sequences            T  tokens of a sequence      V  vocabulary
    D  hidden_size          F  ffn_size                  K  head_dim
    H  query heads          G  key/value heads (grouped-query attention: each serves H / G query heads)

Engines apply parallelism from outside, so no line here may assume the whole model: attention counts the heads it was
given (tensor parallelism leaves H / tp of them), and RoPE tables are arguments, not buffers (nothing to lose on
the meta device, to cast to bfloat16, or to store in a checkpoint).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raynium.config.schema import ModelSection
from raynium.models.attention import Places, at_least_float32, attend, places
from raynium.models.cache import Cache


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

    def forward(
        self,
        tokens_BT: Tensor,
        documents_BT: Tensor | None = None,
        *,
        cache: Cache | None = None,
        finish: Callable[[nn.Linear, Tensor], Any] | None = None,
    ) -> Any:
        """tokens_BT: integers below V, T <= max_seq_len. documents_BT: as in `data/batch.py`. cache: of the tokens
        before these, and then of these, too; only the logits of the last token of each row are computed with one.

        Returns logits_BTV in the dtype of the parameters; or what `finish` makes of the head and its input, hidden_BTD.
        """
        hidden_BTD = self.embedding(tokens_BT)
        if cache is None:
            where = places(self.config, tokens_BT, documents_BT, dtype=hidden_BTD.dtype)
            of_blocks = [where] * len(self.blocks)
        else:
            of_blocks = cache.places(tokens_BT.shape[1])
        for block, where in zip(self.blocks, of_blocks, strict=True):
            hidden_BTD = block(hidden_BTD, places=where)
        if cache is not None:
            hidden_BTD = hidden_BTD[:, -1:]
        hidden_BTD = self.final_norm(hidden_BTD)
        return self.head(hidden_BTD) if finish is None else finish(self.head, hidden_BTD)


class DecoderBlock(nn.Module):
    """One pre-norm layer: attention, then SwiGLU, each added to the residual stream."""

    def __init__(self, config: ModelSection):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn = SwiGLU(config)

    def forward(self, hidden_BTD: Tensor, *, places: Places) -> Tensor:
        hidden_BTD = hidden_BTD + self.attention(self.attention_norm(hidden_BTD), places=places)
        return hidden_BTD + self.ffn(self.ffn_norm(hidden_BTD))


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions; some families normalise each query and key head first."""

    def __init__(self, config: ModelSection):
        super().__init__()
        self.head_dim = config.head_dim
        biases = config.traits.qkv_biases
        self.q = nn.Linear(config.hidden_size, config.num_heads * config.head_dim, bias=biases)
        self.k = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=biases)
        self.v = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=biases)
        self.o = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)
        head_norms = config.traits.head_norms
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if head_norms else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if head_norms else nn.Identity()

    def forward(self, hidden_BTD: Tensor, *, places: Places) -> Tensor:
        q_BTHK = self.q_norm(self.q(hidden_BTD).unflatten(-1, (-1, self.head_dim)))
        k_BTGK = self.k_norm(self.k(hidden_BTD).unflatten(-1, (-1, self.head_dim)))
        v_BTGK = self.v(hidden_BTD).unflatten(-1, (-1, self.head_dim))
        mixed_BHTK = attend(q_BTHK, k_BTGK, v_BTGK, places)
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
