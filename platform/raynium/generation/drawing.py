"""How the next token is drawn from logits: the definitions, and the order, of transformers. V: vocabulary, B: rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raynium.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Drawing:
    """max_new_tokens: of a text, at most. temperature: divides the logits; 0: the likeliest token each time. top_p: of
    the likeliest tokens that together have this probability. repetition_penalty: positive logits of tokens that the
    prompt or the text holds are divided by it, negative ones multiplied. seed: of the first text; the second has the
    next. stop: texts, or ids of tokens, that end a text and are no part of it.

    ConfigError with every value that makes no sense.
    """

    max_new_tokens: int = 120
    temperature: float = 0.8
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: str | int | Sequence[str | int] = ()

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "at least 0, which takes the likeliest token each time"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1, which leaves all tokens"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0; 1 changes nothing"),
            "seed": (self.seed >= 0, "at least 0"),
            "stop": ("" not in self.stops, "texts with at least one character, or ids of tokens"),
        }
        wrong = [
            f"{name} is {getattr(self, name)!r}: it must be {rule}"
            for name, (holds, rule) in rules.items()
            if not holds
        ]
        if wrong:
            raise ConfigError(wrong)

    @property
    def stops(self) -> tuple[str | int, ...]:
        return (self.stop,) if isinstance(self.stop, str | int) else tuple(self.stop)


def penalised(logits_BV: "Tensor", seen_BV: "Tensor", penalty: float) -> "Tensor":
    """seen_BV: bool, the tokens that a row holds."""
    less_BV = logits_BV.where(logits_BV < 0, logits_BV / penalty).where(logits_BV >= 0, logits_BV * penalty)
    return less_BV.where(seen_BV, logits_BV)


def probabilities(logits_BV: "Tensor", drawing: Drawing) -> "Tensor":
    """float32 [B, V]. For a temperature above 0."""
    import torch

    logits_BV = logits_BV / drawing.temperature
    if drawing.top_p < 1:
        ascending_BV, order_BV = logits_BV.sort(-1)
        # Those before which, from the least likely on, at most 1 - top_p has been passed; the likeliest stays.
        unlikely_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1 - drawing.top_p
        unlikely_BV[:, -1] = False
        logits_BV = logits_BV.masked_fill(unlikely_BV.scatter(1, order_BV, unlikely_BV), -torch.inf)
    return logits_BV.softmax(-1)
