"""What a ``config.json`` may say beside a plain Llama: what would change the results is refused, the rest ignored.

``transformers`` keeps every key, whether its Llama knows it or not: models that grew out of Llama add multipliers,
windows, norms and code of their own, often under ``model_type = "llama"``. Without them the same weights give other
logits, and nobody would notice.
"""

import re
from pathlib import Path
from typing import Any

from megagap.errors import CheckpointError

_KNOWN = {
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "hidden_act", "mlp_bias"),
    *("attention_bias", "attention_dropout", "rms_norm_eps", "head_dim"),
}
"""Keys of ``transformers``' own Llama that the words below would match, and that are read or say nothing."""

_CHANGING = re.compile(
    "|".join(
        (
            r"(^|_)(multipliers?|scales?|scaling|scalar|mup|dim_model_base)(_|$)",  # factors (Granite, MiniCPM, µP)
            r"(^|_)(soft)?cap(ping)?(_|$)|clip_qkv",  # bounds (Gemma, OLMo)
            r"window|chunk_size|sparse|(^|_)sinks?(_|$)|(^|_)(causal|bidirectional)(_|$)|layer_types|global_attn",
            r"attention_(type|mask|class)|attn_types?|parallel_(residual|attn|attention|block)|pruned_heads",
            r"(^|_)qk_|[qk]_norm|norm_(type|position|after|before|placement)|(post|pre|sandwich)_\w*norm",
            r"rotary|^rope_|_rope(_|$)|(^|_)(alibi|nope)(_|$)|position_embedding_type",
            r"(^|_)(moe|experts?|lora_rank)(_|$)",
        )
    )
)
"""Names of keys that stand for other arithmetic than Llama's."""

_IMPLEMENTATION = re.compile(r"implementation|flash|sdpa|xformers|fused|kernel|cache|parallel_size|dropout|_version$")
"""How something is computed, not what."""

_MUST_BE_TRUE = re.compile(r"(is|use)_(causal|rope)|scale_attn_weights")


def refuse_extensions(path: Path, config: dict[str, Any]) -> None:
    """Raises :class:`CheckpointError` naming the first key of ``config``, read from ``path``, that a plain Llama has no
    counterpart of and that would change its results."""
    code = config.get("auto_map")
    if isinstance(code, dict):
        code = {key: value for key, value in code.items() if key != "AutoTokenizer"}
    if code:
        raise CheckpointError(
            f"{path}: auto_map names code that comes with the model ({_shown(code)}), which is not run\n"
            "  only models that transformers' own classes compute can be read. If they do, remove auto_map "
            f"from {path.name}."
        )
    for key, value in config.items():
        if key in _KNOWN or _IMPLEMENTATION.search(key) or not _CHANGING.search(key) or _is_neutral(key, value, config):
            continue
        raise CheckpointError(
            f"{path}: {key} is {_shown(value)}; Llama has no such setting, and ignoring it would change the results\n"
            "  only plain Llama 2 and 3 and OLMo 2 models can be read. If the model does not use it, remove it from "
            f"{path.name}."
        )


def _is_neutral(key: str, value: Any, config: dict[str, Any]) -> bool:
    """Whether the key says no more than what a Llama does anyway."""
    if _MUST_BE_TRUE.fullmatch(key):
        return value is None or value is True
    if key in ("sliding_window", "max_window_layers") and config.get("use_sliding_window", True) is False:
        return True
    if key == "max_window_layers" and not config.get("sliding_window"):
        return True
    if key.startswith("rope_") and not isinstance(value, bool):
        return value is None
    if isinstance(value, list):
        return set(map(str, value)) <= {"full_attention"} if "types" in key else not value
    if key == "position_embedding_type":
        return value in (None, "rope", "rotary")
    if isinstance(value, int | float) and re.search(r"multiplier|scal", key) and not isinstance(value, bool):
        # Attention's own factor is 1 / sqrt(head_dim), not 1.
        return value == 1 and not re.search(r"attention|attn|query", key)
    return value in (None, False, 0, "", {}, "none")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
