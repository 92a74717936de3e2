"""Our parameter names beside Hugging Face's, which all families share. Layouts are equal: no transposes."""

from raynium.config.schema import ModelSection

_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}
_HEAD_NORMS = {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}


def hugging_face_names(model: ModelSection) -> dict[str, str]:
    """Ours to theirs, every parameter once. Tied embeddings have no `head.weight`, as in Hugging Face's files."""
    names = {"embedding.weight": "model.embed_tokens.weight"}
    block = _BLOCK | (_HEAD_NORMS if model.traits.head_norms else {})
    for layer in range(model.num_layers):
        for ours, theirs in block.items():
            names[f"blocks.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
        for each in "qkv" if model.traits.qkv_biases else "":
            names[f"blocks.{layer}.attention.{each}.bias"] = f"model.layers.{layer}.self_attn.{each}_proj.bias"
    names["final_norm.weight"] = "model.norm.weight"
    if model.embeddings == "untied":
        names["head.weight"] = "lm_head.weight"
    return names
