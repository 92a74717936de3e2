"""Hugging Face's config.json and our model section, both ways. Arithmetic on dicts, no torch.

Written in the form that every release of transformers reads (`rope_theta` beside `rope_scaling`, `torch_dtype`); read
in that form and in the newer one (`rope_parameters`, `dtype`).
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ValidationError

from raynium.checkpoint.format.manifest import first_problem
from raynium.checkpoint.ref import CheckpointRef
from raynium.config.families import FAMILIES
from raynium.config.schema import ModelSection, RopeScaling
from raynium.errors import CheckpointError, CheckpointMismatch
from raynium.models.flops import parameter_count

Dtype = Literal["float32", "bfloat16"]

# What our decoder has in one form only. A config.json may leave these out: then transformers takes this very form.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "use_sliding_window": False,
}
# Well above every model there is, and far below what would take a machine's memory only to be described.
_MOST_LAYERS, _MOST, _MOST_PARAMETERS = 10_000, 10**9, 10**13


def saved_model(ref: CheckpointRef) -> ModelSection:
    """The model section of the run that saved this checkpoint. CheckpointMismatch if it names none."""
    config = ref.manifest.state.get("config")
    try:
        return ModelSection.model_validate(config["model"] if isinstance(config, dict) else None)
    except (KeyError, ValidationError) as error:
        raise CheckpointMismatch(
            f"{ref.uri} does not say which model it holds: its state has no valid config.model, as a run would write it"
        ) from error


def config_from_model(model: ModelSection, *, dtype: Dtype, end_of_document_id: int) -> dict[str, Any]:
    """config.json of an exported model.

    Beginning and end of a text are one token, as in training, where it stands between documents.
    """
    return {
        "architectures": [model.traits.class_name],
        "model_type": model.traits.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": _scaling_from(model.rope_scaling) if model.rope_scaling is not None else None,
        "tie_word_embeddings": model.embeddings == "tied",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **model.traits.own_fields,
        "initializer_range": model.init_std,
        "bos_token_id": end_of_document_id,
        "eos_token_id": end_of_document_id,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def model_from_config(config: Mapping[str, Any], *, where: str) -> ModelSection:
    """The model section of a config.json. where: the file, for messages.

    CheckpointError if it is of no family of ours, lacks something, or has what our decoder does not do.
    """
    try:
        model = ModelSection.model_validate(_fields(config, where), strict=True)
    except KeyError as error:
        raise CheckpointError(f"{where} lacks {error.args[0]}, which settles the model") from error
    except ValidationError as error:
        raise CheckpointError(f"{where} does not describe a model: {first_problem(error)}") from error
    # Such as a list where a number should be, or no heads.
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where} does not describe a model: {error}") from error
    counts = {"num_hidden_layers": (model.num_layers, _MOST_LAYERS)}
    counts |= {name: (value, _MOST) for name, value in model if isinstance(value, int)}
    if model.rope_scaling is not None:
        counts["original_max_position_embeddings"] = (model.rope_scaling.original_max_seq_len, _MOST)
    counts["the number of parameters"] = (parameter_count(model).total, _MOST_PARAMETERS)
    for name, (count, most) in counts.items():
        if count > most:
            raise CheckpointError(f"{where}: {name} is {count!r:.40}, over {most:,}, as in no model: is it damaged?")
    return model


def _fields(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    names = {family.model_type: name for name, family in FAMILIES.items()}
    classes = ", ".join(family.class_name for family in FAMILIES.values())
    if config.get("model_type") not in names:
        raise CheckpointError(
            f"{where}: model_type is {config.get('model_type')!r:.200}; models that can be imported are {classes}"
        )
    name = names[config["model_type"]]
    family = FAMILIES[name]
    if config.get("architectures") not in (None, [family.class_name]):
        raise CheckpointError(
            f"{where}: architectures is {config['architectures']!r:.200}; models that can be imported are {classes}"
        )
    config = {**family.defaults, **config}
    _refuse_other_forms(config, _FIXED | dict(family.own_fields), where)
    if not isinstance(tied := config.get("tie_word_embeddings"), bool | None):
        raise CheckpointError(f"{where}: tie_word_embeddings is {tied!r:.200}: it must be true or false")
    num_heads = config["num_attention_heads"]
    return {
        "family": name,
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": num_heads,
        "num_kv_heads": config.get("num_key_value_heads") or num_heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // num_heads,
        "ffn_size": config["intermediate_size"],
        "max_seq_len": config["max_position_embeddings"],
        # This is what transformers takes where it is left out.
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "embeddings": "tied" if tied else "untied",
        **_rope(config, where),
        **({"init_std": config["initializer_range"]} if config.get("initializer_range") else {}),
    }


def _refuse_other_forms(config: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    for name, only in fixed.items():
        found = config.get(name)
        if found is not None and (found != only or isinstance(found, bool) != isinstance(only, bool)):
            raise CheckpointError(f"{where}: {name} is {found!r:.200}; models that can be imported have {only!r}")
    layer_types = set(config.get("layer_types") or ())
    if layer_types - {"full_attention"}:
        raise CheckpointError(
            f"{where}: layer_types has {sorted(layer_types)!r:.200}; models that can be imported have "
            "full_attention only"
        )


def _rope(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """rope_theta and rope_scaling of our section. KeyError for a field that its kind of scaling needs."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or kind not in ("default", "llama3"):
        raise CheckpointError(
            f"{where}: the rotary positions are {rope!r:.200}; models that can be imported have the kind default or "
            "llama3, over whole heads"
        )
    scaling = None
    if kind == "llama3":
        scaling = {
            "factor": rope["factor"],
            "low_freq_factor": rope["low_freq_factor"],
            "high_freq_factor": rope["high_freq_factor"],
            "original_max_seq_len": rope["original_max_position_embeddings"],
        }
    return {"rope_theta": theta, "rope_scaling": scaling}


def _scaling_from(scaling: RopeScaling) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_seq_len,
    }
