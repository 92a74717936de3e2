"""What the tests of Hugging Face folders share: small models of every kind, and their weights on both sides."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import job_text

from raynium.config.load import parse_config
from raynium.config.schema import Config

SIZES = {"vocab_size": 320, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 12, "ffn_size": 48}
JOB = job_text({"data.seq_len": 16} | {f"model.{name}": size for name, size in SIZES.items()})
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 24}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied, scaled rope": {"embeddings": "tied", "rope_theta": 1e4, "norm_eps": 1e-3}
    | {f"rope_scaling.{key}": value for key, value in SCALING.items()},
    # As Llama 2 and SmolLM2 have it.
    "llama, as many key heads, tied": {"num_kv_heads": 4, "embeddings": "tied", "rope_theta": 1e4},
    "mistral": {"family": "mistral", "rope_theta": 1e6},
    "qwen2": {"family": "qwen2", "rope_theta": 1e6, "norm_eps": 1e-6},
    "qwen2, tied": {"family": "qwen2", "embeddings": "tied", "rope_theta": 1e6},
    "qwen3": {"family": "qwen3", "rope_theta": 1e6},
    "qwen3, tied": {"family": "qwen3", "embeddings": "tied"},
}


def config_of(name: str = "llama", **changes: Any) -> Config:
    """The job of one of MODELS, with other fields of its model."""
    return parse_config(JOB, {f"model.{key}": value for key, value in (MODELS[name] | changes).items()})


def same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder, through the library, by name."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
