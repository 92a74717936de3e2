"""Keys and values of the tokens so far, so that each more costs one token's work. Names of dims as in `decoder.py`.

M: the tokens that a cache has room for. A row's first `pads_B` tokens fill it up on the left, so that rows of unequal
length end together; nobody sees them, and positions begin after them: a row's logits are those of the row alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from raynium.config.schema import ModelSection
from raynium.models.attention import Kept, Places, rope_tables


class Cache:
    """Of every layer. Give it to `Decoder.forward` with the tokens that come next."""

    def __init__(self, config: ModelSection, *, pads: Sequence[int], num_tokens: int, dtype: torch.dtype):
        """pads: of each row. num_tokens: it has room for, at most `max_seq_len`. On the CPU."""
        assert num_tokens <= config.max_seq_len
        shape = (config.num_layers, len(pads), config.num_kv_heads, num_tokens, config.head_dim)
        # Pages that no token reaches are never touched.
        self._keys, self._values = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        self._cos_MK, self._sin_MK = rope_tables(config, num_tokens=num_tokens, device=torch.device("cpu"))
        self._pads_B = torch.tensor(pads)
        self._padded = any(pads)
        self._dtype = dtype
        self.length = 0

    @property
    def is_full(self) -> bool:
        return self.length == self._keys.shape[3]

    def places(self, num_new: int) -> list[Places]:
        """Of the next `num_new` tokens in every layer, whose keys and values attention writes into the views."""
        begin, end = self.length, self.length + num_new
        assert end <= self._keys.shape[3], f"{end} tokens, and there is room for {self._keys.shape[3]}"
        self.length = end
        cos, sin = self._cos_MK[begin:end], self._sin_MK[begin:end]
        if self._padded:
            # Those that fill up have a place too, which nobody looks at.
            positions_BT = (torch.arange(begin, end) - self._pads_B[:, None]).clamp(min=0)
            cos, sin = self._cos_MK[positions_BT], self._sin_MK[positions_BT]
        mask = self._mask(begin, end)
        return [
            Places(cos, sin, mask, Kept(keys[:, :, :end], values[:, :, :end]))
            for keys, values in zip(self._keys, self._values, strict=True)
        ]

    def begin_with(self, other: "Cache", length: int) -> None:
        """With the first tokens of another one, of the same model and as many rows; neither is filled up."""
        assert self.length == 0 and length <= other.length and not (self._padded or other._padded)
        self._keys[:, :, :, :length] = other._keys[:, :, :, :length]
        self._values[:, :, :, :length] = other._values[:, :, :, :length]
        self.length = length

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Forget all rows but these."""
        chosen = torch.tensor(rows)
        # Contiguous copies of what is held; the room after it comes anew.
        self._keys, self._values = (each.index_select(1, chosen) for each in (self._keys, self._values))
        self._pads_B = self._pads_B[chosen]

    def _mask(self, begin: int, end: int) -> Tensor | None:
        """As `attention.dense_mask`, [B, 1, T, M so far]; None where a causal kernel, or none, says the same."""
        num_new = end - begin
        if not self._padded and (begin == 0 or num_new == 1):
            return None
        seen_BTN = torch.arange(end) >= self._pads_B[:, None, None]
        if num_new > 1:
            seen_BTN = seen_BTN & (torch.arange(end) <= torch.arange(begin, end)[:, None])
        zero = torch.zeros((), dtype=self._dtype)
        return zero.where(seen_BTN, torch.finfo(self._dtype).min)[:, None]
