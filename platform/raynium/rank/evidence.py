"""What is kept of the step that ended a run: its numbers, the gradient's norm in each layer, its samples as text."""

import json
import logging
from collections.abc import Callable, Sequence

from raynium.data.batch import Batch
from raynium.data.loader import Loader
from raynium.engines.base import Engine, StepResult
from raynium.errors import DataError, StoreError

logger = logging.getLogger(__name__)

# Of the step's samples so many are shown, of each so many characters.
MOST_SAMPLES = 32
MOST_CHARACTERS = 2000


class Evidence:
    """One per rank. Nothing is computed before it is asked for."""

    def __init__(self, engine: Engine, loader: Loader, *, stores: Sequence[str], text: Callable[[Sequence[int]], str]):
        """stores: names, by the mixture's numbers. text: of token ids."""
        self._engine, self._loader, self._stores, self._text = engine, loader, stores, text

    def of(self, step: int, batch: Batch, result: StepResult, why: str) -> str:
        """JSON. Collective, since the norms take another backward: after a step that nothing was learned from they are
        that step's own; after one that leapt, those of the parameters that it left.
        """
        told = {
            "step": step,
            "why": why,
            "loss": result.loss,
            "gradient_norm": result.grad_norm,
            "learned_from": result.updated,
            "layer_gradient_norms": self._engine.layer_norms(batch, step=step),
        }
        try:
            samples = [
                {"sample": number, "store": self._stores[store], "row": row, "text": self._shown(tokens.tolist())}
                for number, store, row, tokens in self._loader.tokens(step, most=MOST_SAMPLES)
            ]
        except (DataError, StoreError) as error:
            samples = f"they cannot be read: {error}"
        # NaN is no JSON; as text it can be read by everybody.
        return json.dumps(_as_text(told | {"samples": samples}), indent=2, ensure_ascii=False, allow_nan=False)

    def _shown(self, tokens: Sequence[int]) -> str:
        text = self._text(tokens)
        more = len(text) - MOST_CHARACTERS
        return text if more <= 0 else f"{text[:MOST_CHARACTERS]}… and {more:,} characters more"


def _as_text(value: object) -> object:
    if isinstance(value, dict):
        return {name: _as_text(each) for name, each in value.items()}
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value
