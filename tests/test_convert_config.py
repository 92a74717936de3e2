"""config.json of published models, of transformers, and of ours."""

import json
from typing import Any

import pytest

from raynium.config.load import load_config
from raynium.convert.config_json import config_from_model, model_from_config
from raynium.errors import CheckpointError
from raynium.models.flops import parameter_count

PUBLISHED: dict[str, dict[str, Any]] = {
    "llama3-8b": {  # meta-llama/Llama-3.1-8B
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    "qwen3-8b": {  # Qwen/Qwen3-8B-Base
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 12288,
        "max_position_embeddings": 32768,
        "max_window_layers": 36,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}


def published(model_type: str, class_name: str, numbers: str, **more: Any) -> dict[str, Any]:
    """numbers: of the vocabulary, hidden, intermediate, layers, heads, key/value heads, positions."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names = (*names, "num_key_value_heads", "max_position_embeddings")
    sizes = dict(zip(names, map(int, numbers.split()), strict=True))
    return {"model_type": model_type, "architectures": [class_name], "hidden_act": "silu", **sizes, **more}


# config.json as published, the family here, and the published number of parameters.
OTHERS: dict[str, tuple[dict[str, Any], str, int]] = {
    "meta-llama/Llama-2-7b-hf": (
        published("llama", "LlamaForCausalLM", "32000 4096 11008 32 32 32 4096")
        | {"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False},
        "llama3",
        6_738_415_616,
    ),
    "HuggingFaceTB/SmolLM2-135M": (
        published("llama", "LlamaForCausalLM", "49152 576 1536 30 9 3 8192", rope_theta=100000, rope_interleaved=False)
        | {"is_llama_config": True, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True}
        | {"initializer_range": 0.041666666666666664, "rms_norm_eps": 1e-05},
        "llama3",
        134_515_008,
    ),
    "mistralai/Mistral-7B-v0.3": (
        published("mistral", "MistralForCausalLM", "32768 4096 14336 32 32 8 32768", rope_theta=1000000.0)
        | {"sliding_window": None, "rms_norm_eps": 1e-05, "tie_word_embeddings": False},
        "mistral",
        7_248_023_552,
    ),
    "Qwen/Qwen2.5-0.5B": (
        published("qwen2", "Qwen2ForCausalLM", "151936 896 4864 24 14 2 32768", rope_theta=1000000.0)
        | {"sliding_window": 32768, "use_sliding_window": False, "use_mrope": False, "max_window_layers": 24}
        | {"rms_norm_eps": 1e-06, "tie_word_embeddings": True},
        "qwen2",
        494_032_768,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_published_models_are_read_as_they_are(name: str) -> None:
    config, family, num_parameters = OTHERS[name]
    model = model_from_config(config, where="config.json")
    assert model.family == family and parameter_count(model).total == num_parameters
    written = config_from_model(model, dtype="bfloat16", end_of_document_id=7)
    assert model_from_config(written, where="written") == model
    # vLLM takes a bias that Qwen 2 always has from a field that its files do not hold.
    assert ("attention_bias" in written) == (family == "llama3")


def test_a_mistral_with_a_window_is_refused_also_where_it_is_only_transformers_default() -> None:
    config = OTHERS["mistralai/Mistral-7B-v0.3"][0]
    for windowed in (config | {"sliding_window": 4096}, {k: v for k, v in config.items() if k != "sliding_window"}):
        with pytest.raises(CheckpointError, match="sliding_window is 4096; models that can be imported have None"):
            model_from_config(windowed, where="config.json")


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_models_are_our_presets(preset: str) -> None:
    ours = load_config(preset).model
    assert model_from_config(PUBLISHED[preset], where="config.json") == ours
    written = config_from_model(ours, dtype="bfloat16", end_of_document_id=7)
    for name, value in PUBLISHED[preset].items():
        if name not in ("bos_token_id", "eos_token_id", "pretraining_tp", "max_window_layers", "sliding_window"):
            assert written[name] == value, name


def test_what_is_left_out_is_what_transformers_takes(transformers: Any) -> None:
    sizes = {
        "vocab_size": 320,
        "hidden_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    }
    # Where 4 heads are left alone, Qwen's and Mistral's have 32 and 8 for keys and values.
    cases = {
        transformers.LlamaConfig: {},
        transformers.Qwen3Config: {},
        transformers.Qwen2Config: {},
        transformers.MistralConfig: {"sliding_window": None},
    }
    for config_class, given in cases.items():
        short = sizes | given | {"model_type": config_class.model_type}
        full = json.loads(config_class(**sizes, **given).to_json_string(use_diff=False))
        assert "rope_parameters" in full and "architectures" in full
        assert model_from_config(short, where="short") == model_from_config(full, where="full")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; models that can be imported are LlamaForCausalLM, Mistral"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": ["llama"]}, "config.json does not describe a model: "),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"architectures is \['LlamaForSequenceClassific"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; models that can be imported have 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is {'quant_method': 'fp8'}"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has .*'sliding_attention'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "the rotary positions are {'rope_type': 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "the rotary positions are {'type': 'linear'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "the rotary positions are .* over whole heads"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "config.json lacks low_freq_factor"),
        ({"rope_scaling": [1]}, "config.json does not describe a model: "),
        ({"hidden_size": ...}, "config.json lacks hidden_size, which settles the model"),
        ({"num_attention_heads": 0, "head_dim": None}, "config.json does not describe a model: integer division"),
        ({"vocab_size": "many"}, "config.json does not describe a model: vocab_size: Input should be a valid integer"),
        ({"rms_norm_eps": 0}, "config.json does not describe a model: norm_eps: "),
    ],
)
def test_another_architecture_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    config = {name: value for name, value in (PUBLISHED["llama3-8b"] | changes).items() if value is not ...}
    with pytest.raises(CheckpointError, match=message):
        model_from_config(config, where="config.json")
