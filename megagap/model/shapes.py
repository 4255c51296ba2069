"""Names and shapes of a model's parameters, as ``transformers``' ``LlamaForCausalLM`` has them."""

from math import prod

from megagap.config import Model


def parameter_count(model: Model) -> int:
    """All parameters, without padding; a tied embedding counts once."""
    return sum(prod(shape) for shape in model_tensors(model).values())


def is_norm_gain(name: str) -> bool:
    """Whether the parameter is the gain of an RMSNorm."""
    return name.endswith("norm.weight")


def vocabulary_tensors(model: Model) -> tuple[str, ...]:
    """Names of the parameters that have a row for each token id."""
    return ("model.embed_tokens.weight", *(() if model.tie_word_embeddings else ("lm_head.weight",)))


def model_tensors(model: Model) -> dict[str, tuple[int, ...]]:
    """Global shape of every parameter by name, in the order of the forward pass."""
    hidden, inner = model.hidden_size, model.intermediate_size
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    linears = {
        "self_attn.q_proj": (queries, hidden, model.attention_bias),
        "self_attn.k_proj": (keys, hidden, model.attention_bias),
        "self_attn.v_proj": (keys, hidden, model.attention_bias),
        "self_attn.o_proj": (hidden, queries, model.attention_bias),
        "mlp.gate_proj": (inner, hidden, model.mlp_bias),
        "mlp.up_proj": (inner, hidden, model.mlp_bias),
        "mlp.down_proj": (hidden, inner, model.mlp_bias),
    }
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab_size, hidden)}
    for layer in range(model.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = (hidden,)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for name, (rows, columns, has_bias) in linears.items():
            tensors[f"{prefix}.{name}.weight"] = (rows, columns)
            if has_bias:
                tensors[f"{prefix}.{name}.bias"] = (rows,)
    tensors["model.norm.weight"] = (hidden,)
    if not model.tie_word_embeddings:
        tensors["lm_head.weight"] = (model.vocab_size, hidden)
    return tensors
