"""The model families as data: what sets one apart from the others, in a row each. The decoder's parts, its plan, names,
counts and Hugging Face's config.json follow from the row; dimensions are a run's own (`schema.ModelSection`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal


@dataclass(frozen=True)
class Family:
    """What no config of the family may choose.

    head_norms: whether each query and key head is normalised before it is turned by its position. In Hugging Face's
    config.json, default_head_dim: where the file names none; None: hidden_size / heads. own_fields: what it has beside
    the fields of all families, in the one form that we have.
    """

    head_norms: bool
    # ---- in Hugging Face's config.json
    model_type: str
    class_name: str
    default_head_dim: int | None
    own_fields: Mapping[str, Any]


FAMILIES: dict[str, Family] = {
    "llama3": Family(
        head_norms=False,
        model_type="llama",
        class_name="LlamaForCausalLM",
        default_head_dim=None,
        own_fields={"mlp_bias": False},
    ),
    "qwen3": Family(
        head_norms=True,
        model_type="qwen3",
        class_name="Qwen3ForCausalLM",
        default_head_dim=128,
        own_fields={"use_sliding_window": False},
    ),
}

# Of the rows, so that a row is all that a new family needs here; a type checker can only know that they are text.
if TYPE_CHECKING:
    FamilyName = str
else:
    FamilyName = Literal[tuple(FAMILIES)]
