"""Which tokenizer ``transformers`` makes from a ``tokenizer.json``: not always the one that the file describes.

``tokenizer_class`` in ``tokenizer_config.json`` may name a class that takes only the vocabulary and merges of the file,
and prescribes how texts are normalised and split into words.
"""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from megagap.tokenizer.words import QWEN2_WORDS, QWEN3_5_WORDS

PLAIN = "PreTrainedTokenizerFast"
"""The class that takes a ``tokenizer.json`` as it is."""
GENERIC = {PLAIN, "TokenizersBackend", "PythonBackend", "MistralCommonBackend"}

Parts = Mapping[str, Any]
"""A normalizer, a pre-tokenizer or a decoder as ``tokenizer.json`` writes it."""


@dataclass(frozen=True)
class Pipeline:
    """What a class makes from a vocabulary, in terms of ``tokenizer.json``."""

    model: Parts
    """The type and the options."""
    normalizer: Parts | None
    pre_tokenizer: Parts
    special: Mapping[str, str | None]
    """The names of its special tokens if the settings give none; None where it says that it has none, in place of that
    with which the ``tokenizer.json`` would pad."""
    adds_again: Literal["names", "tokens"] | None = None
    """Whether it adds all special tokens once more, which sets their flags: by name, or each with flags of its own."""


@dataclass(frozen=True)
class ClassTable:
    """``classes.toml``."""

    own: frozenset[str]
    overruled: frozenset[str]
    same: dict[str, str]
    types: dict[str, str] = field(default_factory=dict)
    """The class by model type."""


@cache
def class_table() -> ClassTable:
    table = tomllib.loads(files("megagap.tokenizer").joinpath("classes.toml").read_text(encoding="utf-8"))
    types = {model: name for name, models in table["types"].items() for model in models}
    return ClassTable(frozenset(table["own"]), frozenset(table["overruled"]), table["same"], types)


def class_of(settings: Mapping[str, Any], model: Mapping[str, Any], is_byte_level: bool) -> str:
    """The class that ``AutoTokenizer`` uses: :data:`PLAIN`, or one of ``own`` in ``classes.toml``.

    ``settings`` are those of ``tokenizer_config.json``, ``model`` those of ``config.json``. ``is_byte_level``: whether
    the ``tokenizer.json`` is to ``transformers``, which looks for this word, in quotes, anywhere in the file.
    """
    table = class_table()
    declared = settings.get("tokenizer_class") or model.get("tokenizer_class")
    declared = declared.removesuffix("Fast") if isinstance(declared, str) else None
    model_type = model.get("model_type")
    registered = table.types.get(model_type) if isinstance(model_type, str) else None
    chosen = declared or registered
    if declared and registered and registered != declared:
        if registered in GENERIC:
            chosen = PLAIN
        elif model_type in table.overruled:
            chosen = registered
    if declared == "LlamaTokenizer" and is_byte_level and model_type not in table.overruled:
        chosen = PLAIN
    chosen = table.same.get(chosen, chosen) if chosen else PLAIN
    return chosen if chosen in table.own else PLAIN


def pipeline_of(name: str, settings: Mapping[str, Any], charsmap: str | None) -> Pipeline | None:
    """What the class ``name`` makes from a vocabulary with these settings; None if that is not known here.

    ``charsmap`` is the precompiled one in the normalizer of the ``tokenizer.json``. Raises ValueError for a setting
    that is not a boolean.
    """
    build = PIPELINES.get(name)
    return build(settings, charsmap) if build else None


def _flag(settings: Mapping[str, Any], key: str, default: bool) -> bool:
    value = settings.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}; it should be true or false")
    return default if value is None else value


def _bpe(**options: Any) -> dict[str, Any]:
    unused = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    return {"type": "BPE", **unused, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False} | options


def _bytes_of_bpe() -> dict[str, Any]:
    return _bpe(continuing_subword_prefix="", end_of_word_suffix="")


def byte_level(add_prefix_space: bool, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": use_regex}


def split_into_words(pattern: str, add_prefix_space: bool = False) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level(add_prefix_space, use_regex=False)]}


def _metaspace(scheme: str, split: bool) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


def _gpt2(settings: Mapping[str, Any], charsmap: str | None) -> Pipeline:
    end = "<|endoftext|>"
    words = byte_level(_flag(settings, "add_prefix_space", False), use_regex=True)
    special = {"unk_token": end, "bos_token": end, "eos_token": end, "pad_token": None}
    return Pipeline(_bytes_of_bpe(), None, words, special)


def _gpt_neox(settings: Mapping[str, Any], charsmap: str | None) -> Pipeline:
    gpt2 = _gpt2(settings, charsmap)
    special = {**gpt2.special, "pad_token": "<|padding|>"}
    return Pipeline(gpt2.model, {"type": "NFC"}, gpt2.pre_tokenizer, special)


def _qwen(pattern: str, adds_again: Literal["names"] | None) -> Callable[[Mapping[str, Any], str | None], Pipeline]:
    end = "<|endoftext|>"

    def build(settings: Mapping[str, Any], charsmap: str | None) -> Pipeline:
        words = split_into_words(pattern, _flag(settings, "add_prefix_space", False))
        special = {"unk_token": end, "eos_token": end, "pad_token": end}
        return Pipeline(_bytes_of_bpe(), {"type": "NFC"}, words, special, adds_again)

    return build


def _llama(settings: Mapping[str, Any], charsmap: str | None) -> Pipeline:
    first = "always" if _flag(settings, "legacy", False) else "first"
    scheme = first if _flag(settings, "add_prefix_space", True) else "never"
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return Pipeline(_bpe(fuse_unk=True, byte_fallback=True), None, _metaspace(scheme, split=False), special)


def _gemma(settings: Mapping[str, Any], charsmap: str | None) -> Pipeline:
    names = ("unk", "bos", "eos", "pad", "mask")
    special = {f"{name}_token": f"<{name}>" for name in names}
    unknown = settings.get("unk_token") or special["unk_token"]
    unknown = unknown.get("content") if isinstance(unknown, dict) else unknown
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    words = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    return Pipeline(_bpe(fuse_unk=True, byte_fallback=True, unk_token=unknown), spaces, words, special)


def _cohere(settings: Mapping[str, Any], charsmap: str | None) -> Pipeline:
    words = byte_level(_flag(settings, "add_prefix_space", False), use_regex=True)
    digits = {"type": "Digits", "individual_digits": True}
    special = {
        "unk_token": "<UNK>", "bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "pad_token": "<PAD>",
        "cls_token": "<CLS>", "sep_token": "<SEP>", "mask_token": "<MASK_TOKEN>",
    }  # fmt: skip
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [digits, words]}
    return Pipeline(_bytes_of_bpe(), {"type": "NFC"}, pre_tokenizer, special, adds_again="tokens")


ROBERTA_SPECIAL = {
    "bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>", "unk_token": "<unk>",
    "pad_token": "<pad>", "mask_token": "<mask>",
}  # fmt: skip


def _roberta(settings: Mapping[str, Any], charsmap: str | None) -> Pipeline:
    words = byte_level(_flag(settings, "add_prefix_space", False), use_regex=True)
    return Pipeline(_bytes_of_bpe(), None, words, ROBERTA_SPECIAL)


def _xlm_roberta(settings: Mapping[str, Any], charsmap: str | None) -> Pipeline:
    null_is_false = {"add_prefix_space": True, **settings}
    scheme = "always" if _flag(null_is_false, "add_prefix_space", False) else "never"
    words = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, _metaspace(scheme, split=True)]}
    normalizer = {"type": "Precompiled", "precompiled_charsmap": charsmap} if charsmap else None
    model = {"type": "Unigram", "unk_id": 3, "byte_fallback": False}
    return Pipeline(model, normalizer, words, ROBERTA_SPECIAL)


def _bert(settings: Mapping[str, Any], charsmap: str | None) -> Pipeline:
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    unknown = settings.get("unk_token") or special["unk_token"]
    unknown = unknown.get("content") if isinstance(unknown, dict) else unknown
    accents = settings.get("strip_accents")
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": _flag(settings, "tokenize_chinese_chars", True),
        "strip_accents": None if accents is None else _flag(settings, "strip_accents", False),
        "lowercase": _flag(settings, "do_lower_case", True),
    }
    model = {
        "type": "WordPiece", "unk_token": unknown, "continuing_subword_prefix": "##", "max_input_chars_per_word": 100
    }  # fmt: skip
    return Pipeline(model, normalizer, {"type": "BertPreTokenizer"}, special)


PIPELINES: dict[str, Callable[[Mapping[str, Any], str | None], Pipeline]] = {
    "BertTokenizer": _bert,
    "CohereTokenizer": _cohere,
    "GPT2Tokenizer": _gpt2,
    "GPTNeoXTokenizer": _gpt_neox,
    "GemmaTokenizer": _gemma,
    "LlamaTokenizer": _llama,
    "Qwen2Tokenizer": _qwen(QWEN2_WORDS, adds_again="names"),
    "Qwen3_5Tokenizer": _qwen(QWEN3_5_WORDS, adds_again=None),
    "RobertaTokenizer": _roberta,
    "XLMRobertaTokenizer": _xlm_roberta,
}
"""Written after the classes of these names in transformers 5.24; all others are refused."""
