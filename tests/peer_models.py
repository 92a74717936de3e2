"""Transformers' and TRL's counterparts of what a config of ours says."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raynium.config.schema import Config, ModelSection


def transformers_model(transformers: Any, model: "ModelSection", **more: Any) -> Any:
    """Transformers' own model of these dimensions, its weights drawn by it. more: of its config."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if (scaling := model.rope_scaling) is not None:
        rope |= {"rope_type": "llama3"} | scaling.model_dump(exclude={"original_max_seq_len"})
        rope["original_max_position_embeddings"] = scaling.original_max_seq_len
    model_class = getattr(transformers, model.traits.class_name)
    config = model_class.config_class(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_seq_len,
        rms_norm_eps=model.norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=model.embeddings == "tied",
        **{**model.traits.own_fields, **more},
    )
    return model_class(config)


def trainer_arguments(config: "Config") -> dict[str, Any]:
    """What TRL's trainers are told so that a step is ours: AdamW at a constant rate, on the CPU; nothing is saved."""
    optimizer = config.optimizer
    assert optimizer.schedule == "constant" and optimizer.warmup_steps == 0
    return {
        "max_steps": config.train.num_steps,
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_epsilon": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.clip_norm,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def gradients_of_the_first_step(transformers: Any, model: Any) -> tuple[dict[str, Any], Any]:
    """By parameter, once its trainer has taken a step; and the callback that the trainer must be given for that."""
    gradients: dict[str, Any] = {}

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                gradients.update({name: p.grad.clone() for name, p in model.named_parameters()})

    return gradients, Look()
