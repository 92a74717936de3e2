"""Rows of tokens that a model goes on with, a token at a time, with a cache. B: rows, V: vocabulary."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from raynium.errors import CheckpointDamaged
from raynium.generation.drawing import Drawing, penalised, probabilities
from raynium.models.cache import Cache
from raynium.models.decoder import Decoder


class Continuation:
    """Each row is continued as it would be alone, by a generator of its own.

    A row that outgrows the model's `max_seq_len` goes on from its later half: see `window_start`.
    """

    def __init__(
        self,
        model: Decoder,
        contexts: Sequence[Sequence[int]],
        *,
        silent: Sequence[int],
        drawing: Drawing,
        earlier: "Continuation | None" = None,
    ):
        """contexts: at least one token each. silent: tokens that are never drawn. earlier: of one row, as this one,
        which may begin as that went: then what both hold is not computed again.
        """
        assert contexts and all(contexts)
        self.contexts = [list(context) for context in contexts]
        self.drawing = drawing
        self._model = model
        self._earlier = earlier
        self._silent = torch.tensor(silent, dtype=torch.int64)
        self._generators = [torch.Generator().manual_seed(drawing.seed + row) for row in range(len(contexts))]
        self._seen_BV: Tensor | None = None
        if drawing.repetition_penalty != 1:
            self._seen_BV = torch.zeros(len(contexts), model.config.vocab_size, dtype=torch.bool)
            for row, context in enumerate(contexts):
                self._seen_BV[row, torch.tensor(context)] = True
        self._cache: Cache | None = None
        self._starts: list[int] = []

    @torch.inference_mode()
    def draw(self) -> list[int]:
        """The next token of each row, which it then has. CheckpointDamaged for logits that are no numbers."""
        logits_BV = self._logits()
        if self._seen_BV is not None:
            logits_BV = penalised(logits_BV, self._seen_BV, self.drawing.repetition_penalty)
        logits_BV[:, self._silent] = -torch.inf
        highest = logits_BV.max(-1)
        if not highest.values.isfinite().all():
            raise CheckpointDamaged(
                "the model's logits are not all numbers: its weights are damaged, or training had diverged; sample an "
                "earlier checkpoint (RUN@STEP)"
            )
        if self.drawing.temperature == 0:
            tokens_B = highest.indices
        else:
            chances_BV = probabilities(logits_BV, self.drawing)
            drawn = zip(chances_BV, self._generators, strict=True)
            tokens_B = torch.cat([torch.multinomial(chances_V, 1, generator=own) for chances_V, own in drawn])
        if self._seen_BV is not None:
            self._seen_BV[torch.arange(len(tokens_B)), tokens_B] = True
        tokens = tokens_B.tolist()
        for context, token in zip(self.contexts, tokens, strict=True):
            context.append(token)
        return tokens

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self.contexts = [self.contexts[row] for row in rows]
        self._generators = [self._generators[row] for row in rows]
        self._starts = [self._starts[row] for row in rows]
        if self._seen_BV is not None:
            self._seen_BV = self._seen_BV[torch.tensor(rows)]
        if self._cache is not None:
            self._cache.keep_rows(rows)

    def _logits(self) -> Tensor:
        """float32 [B, V], of the tokens that come next."""
        most = self._model.config.max_seq_len
        starts = [window_start(len(context), most) for context in self.contexts]
        # Full before any row is where the longest has left, and the others are filled up to its length.
        if self._cache is not None and starts == self._starts and not self._cache.is_full:
            tokens_BT = torch.tensor([context[-1:] for context in self.contexts])
            return self._model(tokens_BT, cache=self._cache)[:, -1].float()
        self._starts = starts
        windows = [context[start:] for context, start in zip(self.contexts, starts, strict=True)]
        longest = max(map(len, windows))
        pads = [longest - len(window) for window in windows]
        room = min(most, longest + self.drawing.max_new_tokens)
        dtype = self._model.embedding.weight.dtype
        self._cache = Cache(self._model.config, pads=pads, num_tokens=room, dtype=dtype)
        self._begin_as_earlier()
        tokens_BT = torch.tensor([[0] * pad + window for pad, window in zip(pads, windows, strict=True)])
        return self._model(tokens_BT[:, self._cache.length :], cache=self._cache)[:, -1].float()

    def _begin_as_earlier(self) -> None:
        earlier, self._earlier = self._earlier, None
        if earlier is None or earlier._cache is None or any((*earlier._starts, *self._starts)):
            return
        assert self._cache is not None
        [before], [context] = earlier.contexts, self.contexts
        # The last one's logits are wanted, so it is always computed.
        most = min(earlier._cache.length, len(context) - 1)
        common = next((place for place in range(most) if before[place] != context[place]), most)
        self._cache.begin_with(earlier._cache, common)


def window_start(num_tokens: int, max_seq_len: int) -> int:
    """The first token that the model still sees: 0 while all fit. Then, each time the window is full, it loses half of
    what the model can see at once, so that the cache is made anew only then.
    """
    half = max(1, max_seq_len // 2)
    return math.ceil(max(0, num_tokens - max_seq_len) / half) * half
