"""The same model and adapter in PEFT: transformers' model with our weights, and our A and B in PEFT's layers."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raynium.config.schema import Config
from raynium.models.adapter import target_names
from raynium.models.decoder import Decoder
from raynium.models.init import init_parameter
from raynium.models.lora import adapt
from raynium.models.names import hugging_face_names


def first_weights(config: Config) -> dict[str, Tensor]:
    """Every parameter of the adapted decoder as a run of this config begins, by our name, float32."""
    with torch.device("meta"):
        model = Decoder(config.model)
        adapt(model, config.adapter, frozen_dtype=torch.float32)
    seed = config.run.seed
    return {
        name: init_parameter(name, shape=tuple(parameter.shape), seed=seed, config=config.model)
        for name, parameter in model.named_parameters()
    }


def with_weights(model: Any, config: Config, weights: dict[str, Tensor]) -> Any:
    """transformers' `model`, with these of our weights; an adapter's are left out."""
    state = {theirs: weights[ours] for ours, theirs in hugging_face_names(config.model).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def with_some_b(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, every B drawn at random: at first it is 0, and an adapter changes nothing."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(value.shape, generator=generator) / 10 if name.endswith("lora_B") else value
        for name, value in weights.items()
    }


def peft_name(ours: str, config: Config) -> str:
    """PEFT's name, within its model, of an A or B of ours."""
    module, _, leaf = ours.rpartition(".")
    theirs = hugging_face_names(config.model)[f"{module}.weight"].removesuffix("weight")
    return f"base_model.model.{theirs}{leaf}.default.weight"


def peft_model(peft: Any, transformers_model: Callable[..., Any], config: Config, weights: dict[str, Tensor]) -> Any:
    """PEFT's model, with our A and B."""
    adapter = config.adapter
    settings = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rank_stabilised,
        target_modules=list(target_names(adapter)),
        task_type="CAUSAL_LM",
    )
    base = with_weights(transformers_model(config.model), config, weights)
    with warnings.catch_warnings():
        # PEFT asks transformers by a name that is about to go.
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(base, settings)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            if "lora_" in name:
                parameters[peft_name(name, config)].copy_(value)
    return model
