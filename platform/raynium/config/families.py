"""The model families as data: what sets one apart from the others, in a row each. The decoder's parts, its plan, names,
counts and Hugging Face's config.json follow from the row; dimensions are a run's own (`schema.ModelSection`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal


@dataclass(frozen=True)
class Family:
    """What no config of the family may choose.

    head_norms: whether each query and key head is normalised before it is turned by its position. qkv_biases: whether
    queries, keys and values have a bias. In Hugging Face's config.json, own_fields: what it has beside the fields of
    all families, in the one form that we have; defaults: what transformers takes for a field that is not there, where
    that is not the form that we have, or not what the other fields say.
    """

    head_norms: bool
    qkv_biases: bool
    # ---- in Hugging Face's config.json
    model_type: str
    class_name: str
    own_fields: Mapping[str, Any]
    defaults: Mapping[str, Any]


FAMILIES: dict[str, Family] = {
    # Llama 3 and what has its form: Llama 2, SmolLM2 and others.
    "llama3": Family(
        head_norms=False,
        qkv_biases=False,
        model_type="llama",
        class_name="LlamaForCausalLM",
        own_fields={"attention_bias": False, "mlp_bias": False},
        defaults={},
    ),
    # Without a window.
    "mistral": Family(
        head_norms=False,
        qkv_biases=False,
        model_type="mistral",
        class_name="MistralForCausalLM",
        own_fields={"sliding_window": None},
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
    ),
    # Qwen 2 and 2.5.
    "qwen2": Family(
        head_norms=False,
        qkv_biases=True,
        model_type="qwen2",
        class_name="Qwen2ForCausalLM",
        own_fields={"use_sliding_window": False},
        defaults={"num_key_value_heads": 32},
    ),
    "qwen3": Family(
        head_norms=True,
        qkv_biases=False,
        model_type="qwen3",
        class_name="Qwen3ForCausalLM",
        own_fields={"attention_bias": False, "use_sliding_window": False},
        defaults={"head_dim": 128, "num_key_value_heads": 32},
    ),
}

# Of the rows, so that a row is all that a new family needs here; a type checker can only know that they are text.
if TYPE_CHECKING:
    FamilyName = str
else:
    FamilyName = Literal[tuple(FAMILIES)]
